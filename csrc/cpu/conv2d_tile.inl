// What the convolution kernels share: one pass over an output grid, and a register tile whose rows are pointers.
//
// Forward and the gradient of the input are the same pass: a list of taps (dy, dx, where its weight lies) applied at
// every point of a grid. The gradient of a strided convolution is stride_h * stride_w passes, one for each phase of the
// input's grid, each with the taps that reach it and stride 1.
//
// The tile multiplies ROWS rows, each given by a pointer, with a packed panel [depth][NR]. Neither weights in NCHW nor
// pixels in NHWC need packing for it: a row is a weight's (c, r, s) run, or the channels of a pixel under a tap.
// 6 x 16 floats on AVX2 (12 accumulators of 16 registers); 8 x 32 on AVX-512, since 14 row pointers would not fit.
#pragma once

#include "cpu/activation.inl"
#include "cpu/gemm.inl"
#include "fastnn/conv2d.h"

namespace fastnn::cpu::FASTNN_ISA {

inline constexpr int kTileRows = FASTNN_VECTOR_REGISTERS == 32 ? 8 : 6;

struct Tap {
  int64_t dy, dx;  // source pixel = (y * step_h + dy, x * step_w + dx)
  int64_t weight;  // offset of its weight, elements
};

// T: storage type. Channels are those of one group; strides are in elements.
template <class T>
struct Conv2dPass {
  using C = Compute<T>;
  const T* source;
  const T* source_end;  // past the last element: vector loads stop here
  ImageStrides source_strides;
  int64_t H, W;  // of the source
  T* target;
  T* pre_activation;  // null, or a second target with the same strides
  ImageStrides target_strides;
  int64_t OH, OW;  // of the grid
  int64_t step_h, step_w;
  int64_t N, groups, in, out;
  const Tap* taps;
  int64_t tap_count;
  const T* weight;
  int64_t weight_group, weight_out, weight_in;  // strides
  const C* packed;                              // null, or what the kernel's pack function wrote
  const T* bias;                                // [groups * out] or null
  Activation activation;
  int threads;

  int64_t depth() const { return in * tap_count; }
  // (c, tap) of one output channel lie next to each other.
  bool weight_in_order() const {
    bool ordered = weight_in == tap_count || in == 1;
    for (int64_t t = 0; ordered && t < tap_count; ++t) ordered = taps[t].weight == t;
    return ordered;
  }
  // The activation is a minimum and a maximum, and nothing else is to be stored.
  bool clamps() const {
    return !pre_activation &&
           (activation == Activation::None || activation == Activation::Relu || activation == Activation::Relu6);
  }
  double flops() const { return 2.0 * N * groups * out * OH * OW * depth(); }
};

struct TapBox {
  int64_t y0, y1, x0, x1;  // least and largest dy, dx
  template <class T>
  explicit TapBox(const Conv2dPass<T>& p) : y0(p.taps[0].dy), y1(y0), x0(p.taps[0].dx), x1(x0) {
    for (int64_t t = 1; t < p.tap_count; ++t) {
      y0 = std::min(y0, p.taps[t].dy), y1 = std::max(y1, p.taps[t].dy);
      x0 = std::min(x0, p.taps[t].dx), x1 = std::max(x1, p.taps[t].dx);
    }
  }
};

// The forward's pass (source is the input), grad_output in the place of its target, and where the sums go.
template <class T>
struct Conv2dGradWeight {
  Conv2dPass<T> p;
  const T* grad;  // strides p.target_strides
  Compute<T>* grad_weight;
  ImageStrides strides;  // of k, c, r, s; a tap's offset is p.taps[t].weight

  void put(int64_t group, int64_t k, int64_t c, int64_t t, Compute<T> sum) const {
    grad_weight[(group * p.out + k) * strides.image + c * strides.channel + p.taps[t].weight] = sum;
  }
};

// Hands out task numbers; which thread takes which does not matter to the result.
template <class F>
void for_each_task(int64_t tasks, int threads, const F& f) {
  TaskQueue queue(tasks);
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    for (int64_t task; queue.take(task);) f(task);
  });
}

template <class T, class C>
FASTNN_INLINE void copy_run(T* to, const C* from, int64_t count) {
  constexpr int L = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

// Every second element of 2 * lanes, from FIRST on. The mask is a constant of the program text, as in swap_lanes.
template <class C, int FIRST, int... LANE>
FASTNN_INLINE Vec<C> every_second(Vec<C> a, Vec<C> b, std::integer_sequence<int, LANE...>) {
  return __builtin_shuffle(a, b, Vec<Bits<C>>{static_cast<Bits<C>>(2 * LANE + FIRST)...});
}
template <class C, int FIRST = 0>
FASTNN_INLINE Vec<C> every_second(Vec<C> a, Vec<C> b) {
  return every_second<C, FIRST>(a, b, std::make_integer_sequence<int, kLanes<C>>{});
}
template <class T>
FASTNN_INLINE Vec<Compute<T>> load_even(const T* from) {
  return every_second<Compute<T>>(load(from), load(from + kLanes<Compute<T>>));
}

// a0 b0 a1 b1 …, the first or the second vector of them.
template <class C, bool HIGH, int... LANE>
FASTNN_INLINE Vec<C> pairs(Vec<C> a, Vec<C> b, std::integer_sequence<int, LANE...>) {
  constexpr int L = kLanes<C>;
  return __builtin_shuffle(a, b, Vec<Bits<C>>{static_cast<Bits<C>>((LANE + (HIGH ? L : 0)) / 2 + LANE % 2 * L)...});
}
template <class C, bool HIGH>
FASTNN_INLINE Vec<C> pairs(Vec<C> a, Vec<C> b) {
  return pairs<C, HIGH>(a, b, std::make_integer_sequence<int, kLanes<C>>{});
}

// Rows of weights, [out][in][taps] for each group, in compute type: the weights as they lie where that is their order,
// else a copy.
//
// Some rows at a time, since for the gradient of the input they are columns of the weight: neighbours there.
template <class T>
void order_weights(const Conv2dPass<T>& p, Compute<T>* to) {
  constexpr int L = kLanes<Compute<T>>;
  constexpr int64_t kRows = 16;  // whole vectors, whatever the ISA
  const int64_t parts = (p.out + kRows - 1) / kRows, depth = p.depth();
  for_each_task(p.groups * parts, worth_threads(p.threads, 0, double(p.groups * p.out * depth * sizeof(T))),
                [&](int64_t task) {
                  const int64_t group = task / parts, k0 = task % parts * kRows, k1 = std::min(k0 + kRows, p.out);
                  const T* from = p.weight + group * p.weight_group;
                  Compute<T>* const rows = to + group * p.out * depth;
                  if (p.weight_in_order()) {
                    for (int64_t k = k0; k < k1; ++k) copy_run(rows + k * depth, from + k * p.weight_out, depth);
                    return;
                  }
                  int64_t c = 0;
                  if (p.tap_count == 1 && p.weight_out == 1 && k1 - k0 == kRows)
                    for (; c + L <= p.in; c += L, from += L * p.weight_in)
                      for (int64_t k = k0; k < k1; k += L) {
                        Vec<Compute<T>> line[L];
#pragma GCC unroll 16
                        for (int i = 0; i < L; ++i) line[i] = load(from + p.taps[0].weight + i * p.weight_in + k);
                        transpose_in_place<Compute<T>>(line);
#pragma GCC unroll 16
                        for (int i = 0; i < L; ++i) store(rows + (k + i) * depth + c, line[i]);
                      }
                  for (; c < p.in; ++c, from += p.weight_in)
                    for (int64_t k = k0; k < k1; ++k) {
                      Compute<T>* const line = rows + k * depth + c * p.tap_count;
                      for (int64_t t = 0; t < p.tap_count; ++t)
                        line[t] = load_one(from + k * p.weight_out + p.taps[t].weight);
                    }
                });
}

// The rows to read: packed before, the weights themselves, or a copy made for this call.
template <class T>
struct WeightRows {
  using C = Compute<T>;
  Scratch<C> copy;
  const C* data;
  static bool as_they_lie(const Conv2dPass<T>& p) {
    return std::is_same_v<T, C> && p.weight_in_order() && (p.out == 1 || p.weight_out == p.depth()) &&
           (p.groups == 1 || p.weight_group == p.out * p.depth());
  }
  explicit WeightRows(const Conv2dPass<T>& p) : copy(p.packed || as_they_lie(p) ? 0 : p.groups * p.out * p.depth()) {
    if (p.packed) {
      data = p.packed;
    } else if (as_they_lie(p)) {
      data = reinterpret_cast<const C*>(p.weight);
    } else {
      order_weights(p, copy.data());
      data = copy;
    }
  }
};

// copy_run for rows written one after the other: whole vectors, where they end before `from_end`; what is written past
// `count` (less than a vector) is for the next row to overwrite.
template <class T>
FASTNN_INLINE void copy_over(Compute<T>* to, const T* from, int64_t count, const T* from_end) {
  constexpr int L = kLanes<Compute<T>>;
  if (from + (count + L - 1) / L * L > from_end) return copy_run(to, from, count);
  for (int64_t i = 0; i < count; i += L) store(to + i, load(from + i));
}
// The same with zeros.
template <class C>
FASTNN_INLINE void zero_over(C* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<C>) store(to + i, zero<C>());
}

// Calls f(integral_constant<ROWS>) for exactly `rows` (1 … kTileRows).
template <class F>
FASTNN_INLINE void with_exact_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    default:
      if constexpr (kTileRows == 8)
        return rows == 7 ? f(std::integral_constant<int, 7>{}) : f(std::integral_constant<int, 8>{});
  }
}

// Rows are split as evenly as can be: 32 is 6 + 6 + 5 + 5 + 5 + 5, since a tile of two rows waits for its own FMAs.
struct EvenRows {
  int64_t count, tiles;
  explicit EvenRows(int64_t rows) : count(rows), tiles((rows + kTileRows - 1) / kTileRows) {}
  int64_t begin(int64_t tile) const { return count * tile / tiles; }
};

// acc[i][:] += sum over segments s and k < depth of a[s * kTileRows + i][k] * b[(s * depth + k) * NR + :].
// VECTORS is 2, or 1 where the panel's second half is empty.
template <class C, int ROWS, int VECTORS>
FASTNN_INLINE void tile_kernel(int64_t segments, const C* const* a, int64_t depth, const C* __restrict b,
                               Vec<C> (&acc)[ROWS][VECTORS]) {
  constexpr int L = kLanes<C>, NR = kNR<C>;
  for (int64_t s = 0; s < segments; ++s, a += kTileRows) {
    const C* row[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) row[i] = a[i];
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, b += NR) {
      Vec<C> column[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) column[j] = load(b + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Vec<C> x = splat<C>(row[i][k]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(x, column[j], acc[i][j]);
      }
    }
  }
}

// The general way of store_rows: any activation, width, distance and type, from sums in memory.
template <class T>
__attribute__((noinline)) void store_sums(const Conv2dPass<T>& p, Compute<T>* sums, int rows, int vectors, int64_t cols,
                                          int64_t step, const int64_t* places) {
  using C = Compute<T>;
  const int64_t width = vectors * kLanes<C>, count = std::min<int64_t>(cols, width);
  auto write = [&](T* base) {
    for (int i = 0; i < rows; ++i) {
      T* to = base + places[i];
      const C* from = sums + i * width;
      if (step == 1)
        copy_run(to, from, count);
      else
        for (int64_t x = 0; x < count; ++x) store_one(to + x * step, from[x]);
    }
  };
  if (p.pre_activation) write(p.pre_activation);
  if (p.activation != Activation::None) activate_in_place<C>(p.activation, sums, rows * width);
  write(p.target);
}

// Writes `cols` finished sums of each of ROWS rows, through the activation. place(i) is the offset of row i in the
// target, `step` the distance between its elements there.
template <class T, int ROWS, int VECTORS, class Place>
FASTNN_INLINE void store_rows(Vec<Compute<T>> (&acc)[ROWS][VECTORS], const Conv2dPass<T>& p, int64_t cols, int64_t step,
                              const Place& place) {
  using C = Compute<T>;
  constexpr int L = kLanes<C>;
  if constexpr (std::is_same_v<T, C>) {
    if (cols >= VECTORS * L && step == 1 && p.clamps()) {
      // A comparison with NaN is false: NaN stays.
      const Vec<C> low = splat<C>(p.activation == Activation::None ? -std::numeric_limits<C>::infinity() : C(0));
      const Vec<C> high = splat<C>(p.activation == Activation::Relu6 ? C(6) : std::numeric_limits<C>::infinity());
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(p.target + place(i) + j * L, vmin(high, vmax(low, acc[i][j])));
      return;
    }
  }
  alignas(64) C sums[ROWS * VECTORS * L];
  int64_t places[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    places[i] = place(i);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(sums + (i * VECTORS + j) * L, acc[i][j]);
  }
  store_sums<T>(p, sums, ROWS, VECTORS, cols, step, places);
}

}  // namespace fastnn::cpu::FASTNN_ISA
