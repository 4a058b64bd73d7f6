// Working memory of one call: aligned to a cache line, freed at the end of its scope, contents undefined.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastnn::cpu {

// Bytes that all threads hold now, and held at most: what a kernel takes beyond its tensors is told by bench/ and bound
// by tests. Always on: two additions a buffer, some nanoseconds beside the malloc.
inline std::atomic<int64_t> scratch_held{0}, scratch_peak{0};

inline void count_scratch(int64_t bytes) {
  const int64_t held = scratch_held.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t peak = scratch_peak.load(std::memory_order_relaxed);
  while (held > peak && !scratch_peak.compare_exchange_weak(peak, held, std::memory_order_relaxed)) {
  }
}

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    bytes_ = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    if (!data_) throw std::bad_alloc();
    count_scratch(bytes_);
  }
  ~Scratch() {
    if (!data_) return;
    std::free(data_);
    count_scratch(-bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fastnn::cpu
