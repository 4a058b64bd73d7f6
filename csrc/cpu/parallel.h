// One parallel region, on the OpenMP runtime that torch has loaded.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>

namespace fastnn::cpu {

// Set in a forked child: the threads of the parent's pool are not there, and a region would wait for them for ever.
extern bool forked;

// Runs f(thread, threads) on `threads` threads; on the caller's alone inside another region or in a forked child.
// f is called with the number of threads that really run, which may be fewer than asked for.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1 || forked || omp_in_parallel()) {
    f(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
}

// Tasks 0 … count - 1 of a region, each taken by whichever thread is free. For tasks that write where no other does: who
// runs one must not show in the result.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}
  bool take(int64_t& task) { return (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

// The half-open share [begin, end) of `count` items that falls to one thread, in multiples of `grain`.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t count, int64_t grain, int thread, int threads) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t begin = grains * thread / threads * grain, end = grains * (thread + 1) / threads * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

// A call whose arithmetic takes less than some tens of µs on one core is not worth a region: `flops` counts
// multiply-adds twice, `bytes` is what has to come from memory.
inline int worth_threads(int threads, double flops, double bytes) {
  return flops < 1.5e6 && bytes < 2.5e5 ? 1 : threads;
}

}  // namespace fastnn::cpu
