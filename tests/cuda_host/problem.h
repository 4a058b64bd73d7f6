// What tests of kernels share: values of each dtype, matrices of any layout in buffers of exactly their size,
// activations and their derivatives in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda_runtime.h"
#include "fastnn/cuda.h"
#include "fastnn/types.h"

namespace fastnn::cuda {

inline std::mt19937 generator(1);

inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }
inline double to_double(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline double to_double(Float16 x) { return host::half_to_float(x.bits); }

template <class T>
T from_double(double x) {
  if constexpr (std::is_same_v<T, Float16>) return {host::float_to_half(static_cast<float>(x))};
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return {static_cast<uint16_t>(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
  if constexpr (sizeof(T) > 2) return static_cast<T>(x);
}

template <class T>
inline constexpr DType dtype_of = std::is_same_v<T, float>      ? DType::Float32
                                  : std::is_same_v<T, double>   ? DType::Float64
                                  : std::is_same_v<T, BFloat16> ? DType::BFloat16
                                                                : DType::Float16;
template <class T>
inline constexpr double epsilon = std::is_same_v<T, float>      ? 0x1p-23
                                  : std::is_same_v<T, double>   ? 0x1p-52
                                  : std::is_same_v<T, BFloat16> ? 0x1p-8
                                                                : 0x1p-11;

inline double activated(Activation a, double z) {
  const double sigmoid = 1 / (1 + std::exp(-z)), softplus = z > 20 ? z : std::log1p(std::exp(z));
  switch (a) {
    case Activation::None: return z;
    case Activation::Relu: return z < 0 ? 0 : z;
    case Activation::Gelu: return z / 2 * (1 + std::erf(z * std::sqrt(0.5)));
    case Activation::GeluTanh: return z / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::Silu: return z * sigmoid;
    case Activation::Sigmoid: return sigmoid;
    case Activation::Tanh: return std::tanh(z);
    case Activation::LeakyRelu: return z > 0 ? z : z * 0.01;
    case Activation::Elu: return z > 0 ? z : std::expm1(z);
    case Activation::Hardswish: return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    case Activation::Relu6: return std::fmin(std::fmax(z, 0), 6);
    case Activation::Softplus: return softplus;
    case Activation::Mish: return z * std::tanh(softplus);
  }
  return z;
}

// A buffer of exactly its size: AddressSanitizer stands behind its last element and before its first.
template <class T>
struct Buffer {
  explicit Buffer(int64_t size) : size(size), data(new T[static_cast<size_t>(size)]) {}
  int64_t size;
  std::unique_ptr<T[]> data;
};

// A call's workspace: exactly what it asks for, with no number in it.
struct Memory {
  operator Workspace() {
    return {[](void* own, int64_t bytes) -> void* {
              Buffer<char>& buffer = static_cast<Memory*>(own)->buffer;
              buffer = Buffer<char>(bytes);
              std::memset(buffer.data.get(), 0xff, static_cast<size_t>(bytes));
              return buffer.data.get();
            },
            this};
  }
  Buffer<char> buffer{0};
};

// A matrix by strides: with columns dense, with rows dense (transposed), or neither; `shift` elements off alignment,
// `gap` elements between its lines.
enum Layout { Rows, Columns, Scattered };
template <class T>
struct Matrix {
  Matrix(int64_t rows, int64_t cols, Layout layout, int gap, int shift, double (*draw)())
      : row(layout == Columns ? 1
            : layout == Rows  ? cols + gap
                              : 2 * cols + 1),
        col(layout == Columns ? rows + gap
            : layout == Rows  ? 1
                              : 2),
        buffer(rows && cols ? shift + (rows - 1) * row + (cols - 1) * col + 1 : shift),
        data(buffer.data.get() + shift),
        values(rows * cols) {
    for (int64_t i = 0; i < buffer.size; ++i) buffer.data[i] = from_double<T>(NAN);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        values[i * cols + j] = to_double(data[i * row + j * col] = from_double<T>(draw()));
  }
  int64_t row, col;
  Buffer<T> buffer;
  T* data;
  std::vector<double> values;
};

inline double small_integer() { return static_cast<double>(static_cast<int>(generator() % 5) - 2); }
inline double normal() { return std::normal_distribution<double>()(generator); }

// f'(z) in double, by the symmetric difference of f: an error of some 1e-10.
inline double slope(Activation a, double z) {
  const double h = 1e-5;
  return (activated(a, z + h) - activated(a, z - h)) / (2 * h);
}

}  // namespace fastnn::cuda
