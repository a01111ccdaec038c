// Work shared by threads: those of the caller's runtime of OpenMP where they are lent, else a small pool of our own that
// lives as long as the process. Knows nothing of Python: callers release its lock first.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace twodice {

class Pool {
   public:
    // The pool of this process. It is never destroyed: its threads sleep until the process ends, and a child made by
    // fork, which inherits no threads, starts a new one; what was lent is not usable there.
    static Pool& instance() {
        Pool* pool = slot().load(std::memory_order_acquire);
        if (!pool) {
            static std::mutex making;
            std::lock_guard<std::mutex> lock(making);
            pool = slot().load(std::memory_order_acquire);
            if (!pool) {
                pool = new Pool;
                slot().store(pool, std::memory_order_release);
#if defined(__unix__) || defined(__APPLE__)
                static const int once = pthread_atfork(nullptr, nullptr, [] {
                    slot().store(nullptr);
                    lent().store(nullptr);
                });
                (void)once;
#endif
            }
        }
        return *pool;
    }

    // Calls fn(context, begin, end) over [0, n) in chunks of `grain`, on at most `threads` threads, this one included.
    // A second caller at the same time works alone. A worker of our own that wakes too late is not waited for.
    void run(int64_t n, int64_t grain, int threads, void (*fn)(void*, int64_t, int64_t), void* context) {
        std::unique_lock<std::mutex> own(busy_, std::try_to_lock);
        if (!own || threads <= 1 || n <= grain) {
            fn(context, 0, n);
            return;
        }
        if (const Team team = lent().load(std::memory_order_acquire)) {
            // All of them even for few chunks: libgomp ends the threads that a smaller team leaves out.
            fn_ = fn, context_ = context, n_ = n, grain_ = grain;
            next_.store(0, std::memory_order_relaxed);
            team([](void* pool) { static_cast<Pool*>(pool)->chunks(); }, this, static_cast<unsigned>(threads), 0);
            return;
        }
        threads = static_cast<int>(std::min<int64_t>(threads, (n + grain - 1) / grain));
        {
            std::lock_guard<std::mutex> lock(state_);
            for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
            fn_ = fn, context_ = context, n_ = n, grain_ = grain;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = threads - 1;
        }
        for (int i = 1; i < threads; ++i) wake_.notify_one();
        chunks();
        std::unique_lock<std::mutex> lock(state_);
        wanted_ = 0;
        done_.wait(lock, [this] { return active_ == 0; });
    }

    // GOMP_parallel(function, data, threads, flags) of the runtime of OpenMP that the caller's other operations use, or
    // null. Its threads are awake between those operations, and ours would have to share the processors with them.
    using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static void lend(Team team) {
        instance();
        lent().store(team, std::memory_order_release);
    }
    static bool is_lent() { return lent().load(std::memory_order_acquire) != nullptr; }

   private:
    static std::atomic<Team>& lent() {
        static std::atomic<Team> team{nullptr};
        return team;
    }
    static std::atomic<Pool*>& slot() {
        static std::atomic<Pool*> pool{nullptr};
        return pool;
    }

    void chunks() {
        for (int64_t begin; (begin = next_.fetch_add(grain_, std::memory_order_relaxed)) < n_;)
            fn_(context_, begin, std::min(n_, begin + grain_));
    }

    void work() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_, ++active_;
            lock.unlock();
            chunks();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, state_;
    std::condition_variable wake_, done_;
    int workers_ = 0, wanted_ = 0, active_ = 0;
    std::atomic<int64_t> next_{0};
    int64_t n_ = 0, grain_ = 1;
    void (*fn_)(void*, int64_t, int64_t) = nullptr;
    void* context_ = nullptr;
};

// fn(begin, end) over [0, n), in any order and on any of the threads; fn must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, int num_threads, F&& fn) {
    if (n <= 0) return;
    if (num_threads <= 1 || n <= grain) {
        fn(static_cast<int64_t>(0), n);
        return;
    }
    using Body = std::remove_reference_t<F>;
    Pool::instance().run(
        n, grain, num_threads, [](void* f, int64_t begin, int64_t end) { (*static_cast<Body*>(f))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace twodice
