// Stages 2 and 3 of the chain on one row: bias, masks, banned ids, penalties, n-grams, DRY. A part of
// sampling_level.hpp. The twin of src/twodice/kernels/sampling_edit.py.

// Repetition, presence and frequency on the ids of past[begin, end); those from `text` on are counted.
template <class F>
struct Penalties {
    const int64_t* past = nullptr;
    int64_t begin = 0, end = 0, text = 0;
    F repetition = 1, presence = 0, frequency = 0;

    bool lower() const { return repetition >= 1 && presence >= 0 && frequency >= 0; }
    // Values of ids that the history has, each with how often the text has it. No branch: what a value is, and whether the
    // text has it, cannot be predicted.
    void change(F* x, const int32_t* said, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            const F less = x[i] / repetition, more = x[i] * repetition, seldom = x[i] > 0 ? less : more;
            const F often = (seldom - static_cast<F>(said[i]) * frequency) - presence;
            x[i] = said[i] > 0 ? often : seldom;
        }
    }
};

template <class F>
class Row;

template <class F>
class Edits {
   public:
    Edits(const Job& job, const Settings& set, Scratch& scratch, Row<F>& into, int64_t row)
        : job_(job), set_(set), s_(scratch), into_(into), n_(into.size()), row_(row) {
        if (job.past_offsets) {
            past_ = job.past_ids + job.past_offsets[row];
            length_ = job.past_offsets[row + 1] - job.past_offsets[row];
            prompt_ = job.past_prompts ? job.past_prompts[row] : 0;
        }
    }

    static bool wanted(const Job& job, const Settings& set) {
        const bool repeats = set.penalty != 1.0 || set.presence != 0.0 || set.frequency != 0.0 || set.ngram > 0 ||
                             set.dry_multiplier > 0;
        return job.mask || set.bias.begin < set.bias.end || set.allowed.begin < set.allowed.end ||
               set.banned.begin < set.banned.end || set.min_tokens > 0 || (repeats && job.past_offsets);
    }

    // Everything but the allowed ids, which the caller takes out of the row.
    void run() {
        for (int64_t j = set_.bias.begin; j < set_.bias.end; ++j)
            into_.change(job_.ids[j], [&](F x) { return x + static_cast<F>(job_.values[j]); });
        if (job_.mask) into_.mask(job_.mask + row_ * job_.mask_stride);
        ban(set_.banned);
        const bool counted = job_.past_offsets && job_.past_prompts;
        if ((counted ? length_ - prompt_ : 0) < set_.min_tokens) ban(set_.stop);
        if (!past_) return;
        penalise();
        ban_ngrams();
        dry();
    }

   private:
    void drop(int64_t id) {
        into_.change(id, [](F) { return static_cast<F>(-INFINITY); });
    }

    void ban(const List& list) {
        for (int64_t j = list.begin; j < list.end; ++j) drop(job_.ids[j]);
    }

    void penalise() {
        const bool repeated = set_.penalty != 1.0, counted = set_.presence != 0.0 || set_.frequency != 0.0;
        if (!repeated && !counted) return;
        const int64_t begin = set_.penalty_range > 0 && set_.penalty_range < length_ ? length_ - set_.penalty_range : 0;
        const int64_t behind = prompt_ < begin ? begin : prompt_;  // the prompt
        const int64_t text = set_.rules & kCountPrompt ? begin : behind;
        const int64_t first = !repeated ? text : set_.rules & kRepeatText ? behind : begin;  // no engine has both rules
        Penalties<F> all{past_, first, length_, counted ? text : length_};
        all.repetition = static_cast<F>(set_.penalty);
        all.presence = static_cast<F>(set_.presence), all.frequency = static_cast<F>(set_.frequency);
        into_.wait(all);
    }

    void ban_ngrams() {
        const int64_t n = set_.ngram;
        if (n <= 0 || length_ < n) return;
        if (n == 1)
            for (int64_t j = 0; j < length_; ++j) drop(past_[j]);
        else
            repeats(length_, [&](int64_t following, int64_t length) {
                if (length >= n - 1) drop(following);
            });
    }

    // Calls fn(following, length) for each token of the last n but the first, and the longest run that ends these n and
    // also stands before it. Both are read from the end: the common beginning of two reversed texts is the Z function
    // of the reversed history, one walk however much the text goes round in circles.
    template <class Fn>
    void repeats(int64_t n, Fn fn) {
        auto at = [end = past_ + length_](int64_t back) { return end[-1 - back]; };  // 0 is the last token
        auto& z = s_.run;
        z.assign(static_cast<size_t>(n), 0);
        int64_t left = 0, right = 0;
        for (int64_t i = 1; i < n; ++i) {
            int64_t length = i < right ? std::min<int64_t>(right - i, z[i - left]) : 0;
            while (i + length < n && at(length) == at(i + length)) ++length;
            z[i] = static_cast<int32_t>(length);
            if (i + length > right) left = i, right = i + length;
            fn(at(i - 1), length);
        }
    }

    bool breaks(int64_t id) const {
        return std::binary_search(job_.ids + set_.breaker.begin, job_.ids + set_.breaker.end, id);
    }

    void dry() {
        if (!(set_.dry_multiplier > 0)) return;
        const int64_t n = set_.dry_range > 0 && set_.dry_range < length_ ? set_.dry_range : length_;
        int64_t room = 0;  // tokens after the last breaker: no run is longer
        while (room < n && !breaks(past_[length_ - 1 - room])) ++room;
        if (room == 0) return;
        auto& longest = s_.numbers;
        longest.resize(std::max<size_t>(longest.size(), static_cast<size_t>(n_)), 0);
        const int64_t allowed = set_.dry_allowed < 1 ? 1 : set_.dry_allowed;
        repeats(n, [&](int64_t following, int64_t length) {
            const int64_t found = length < room ? length : room;
            if (found >= allowed && found > longest[following] && !breaks(following))
                longest[following] = static_cast<int32_t>(found);
        });
        for (int64_t j = length_ - n + 1; j < length_; ++j) {
            const int64_t following = past_[j];
            if (longest[following] == 0) continue;
            into_.change(following, [&](F x) { return x - static_cast<F>(penalty_of(longest[following])); });
            longest[following] = 0;
        }
    }

    double penalty_of(int64_t length) const {
        double penalty = set_.dry_multiplier;
        for (int64_t j = set_.dry_allowed; j < length; ++j) {
            penalty *= set_.dry_base;
            if (penalty >= kDryMost) return kDryMost;
            if (set_.dry_base == 1.0) break;
        }
        return penalty;
    }

    const Job& job_;
    const Settings& set_;
    Scratch& s_;
    Row<F>& into_;
    const int64_t n_, row_;
    const int64_t* past_ = nullptr;
    int64_t length_ = 0, prompt_ = 0;
};
