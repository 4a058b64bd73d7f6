// Working memory of one call: aligned to a cache line, freed at the end of its scope, contents undefined.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastnn::cpu {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace fastnn::cpu
