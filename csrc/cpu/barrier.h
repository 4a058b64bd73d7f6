// A barrier between the threads of one region that meet every few microseconds, where futex calls would cost more than
// the work between them. It spins, and yields the core when another thread has not come for long.
#pragma once

#include <sched.h>

#include <atomic>

namespace fastnn::cpu {

class Barrier {
 public:
  // Returns when `count` threads have called it.
  void wait(int count) {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins > 4000) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace fastnn::cpu
