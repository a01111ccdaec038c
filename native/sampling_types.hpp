// What the parts of the sampler share: the table of settings, a job, a result, the buffers of a thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "sampling_said.hpp"

namespace twodice {

enum Type : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Status : int { kOk = 0, kNan = 1, kInfinite = 2, kEmpty = 3 };
enum Need : int {  // NEEDS in kernels/sampling_settings.py
    kNeedLogprob = 1,
    kNeedRaw = 2,
    kNeedTemperature = 4,
    kNeedRank = 8,
    kNeedKept = 16,
    kNeedMass = 32,
    kNeedEntropy = 64,
    kNeedTemperatureEntropy = 128,
};
enum Stage : uint8_t {
    kEnd = 0,
    kTemperature = 1,
    kDynatemp = 2,
    kGreedy = 3,
    kTopNSigma = 4,
    kTopK = 5,
    kTopP = 6,
    kMinP = 7,
    kTopH = 8,
    kTypical = 9,
    kEpsilon = 10,
    kEta = 11,
    kXtc = 12,
    kMirostat = 13,
};
enum Rule : int32_t {
    kTiesAtK = 1,
    kHighIdFirst = 2,
    kJoint = 4,
    kCountPrompt = 8,
    kXtcExpected = 16,
    kTopHOf100 = 32,
    kRepeatText = 64,
};
enum Purpose : uint32_t { kPurposeToken = 0, kPurposeXtc = 1 };

struct List {
    int64_t begin, end;
};

struct Settings {  // ROW in kernels/sampling_settings.py
    uint8_t stages[16];
    double temperature, dynatemp_range, dynatemp_exponent, top_n_sigma, top_p, log_min_p, top_h, typical_p;
    double log_epsilon, log_eta, xtc_probability, log_xtc_threshold, mirostat_tau, mirostat_eta;
    double dry_multiplier, dry_base;
    int64_t top_k, penalty_range, ngram, dry_allowed, dry_range, min_tokens;
    List bias, allowed, banned, stop, breaker;
    double penalty, presence, frequency;
    int64_t rules;
};
static_assert(sizeof(Settings) == 304, "as packed by numpy");

struct Logits {
    const char* data;
    int type;
    int64_t rows, vocabulary, row_bytes, column_stride;
};

struct Job {
    const Settings* settings;
    bool one_setting;
    const int64_t* ids;  // every list of every row
    const double* values;
    const uint64_t* keys;
    bool one_key;
    const int64_t *positions, *completions;  // or null: then the one for all rows
    int64_t one_position, one_completion;
    const int64_t *past_ids, *past_offsets, *past_prompts;  // or null
    const uint32_t* mask;                                   // or null
    int64_t mask_stride;
    double* state;  // or null
    int need;
};

struct Result {
    int64_t token = -1, rank = -1;
    double logprob = NAN, raw = NAN, temperature = NAN, mass = NAN, entropy = NAN, temperature_entropy = NAN;
    std::vector<int64_t> kept;
};

// Buffers that a thread keeps between rows and calls, so that no page is touched for the first time in a hot call.
template <class F, class K>
struct Buffers {
    std::vector<F> values, raw;
    std::vector<F> maxima;  // by block; behind the last one -inf, a vector and more
    std::vector<K> keys;
};

struct Distance {  // of one token's -log p to the entropy, with its mass
    double distance;
    int64_t mass;
};

struct Candidate {  // a token that may be drawn: its place, its 16 leading bits, its value as a score without noise
    uint32_t index, high;
    double z;
};

struct Scratch {
    Said said;
    Buffers<float, uint64_t> narrow;
    Buffers<double, unsigned __int128> wide;
    std::vector<int32_t> numbers;        // a number an id, all 0 between uses
    std::vector<int32_t> run;            // the length of the repeat that ends at each place
    std::vector<uint8_t> held, stale;    // by block: its values can be read; its maximum must be taken again
    std::vector<int32_t> first_waiting;  // by block: a place in the history whose id it has and whose penalty waits, or -1
    std::vector<int32_t> next_waiting;   // by that place: the next one of the block, or -1
    std::vector<Distance> distances;
    std::vector<Candidate> candidates;

    template <class F>
    auto& buffers() {
        if constexpr (sizeof(F) == 4)
            return narrow;
        else
            return wide;
    }
};

}  // namespace twodice
