// What tests of linear share: a case, and the kernel that it forces held against sums in double. Inputs are small integers
// where no activation is asked for, so that every order of summation is exact.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

#include "cuda/linear_launch.h"
#include "problem.h"

namespace fastnn::cuda {

inline int failures = 0, cases = 0, every = 1;  // of the cases, each `every`th is run

struct Case {
  LinearKernel kernel;
  int tile, splits;
  int64_t M, N, K;
  Layout a = Rows, b = Rows;
  int gap = 0, shift = 0;
  Activation activation = Activation::None;
  bool bias = true, preactivation = false;
  bool whole = false;  // lines are padded to whole 16 bytes, and then by gap

  int gap_of(Layout layout, int64_t rows, int64_t cols) const {
    const int64_t dense = layout == Rows ? cols : rows;
    return gap + (whole ? static_cast<int>((8 - dense % 8) % 8) : 0);
  }
};

// Whether it was run.
template <class T>
bool check(const Case& c) {
  if (++cases % every) return false;
  host::machine.order = static_cast<host::Machine::Order>(cases / every % 3);
  const bool exact = c.activation == Activation::None;
  double (*const draw)() = exact ? small_integer : normal;
  const Matrix<T> x(c.M, c.K, c.a, c.gap_of(c.a, c.M, c.K), c.shift, draw);
  const Matrix<T> w(c.N, c.K, c.b, c.gap_of(c.b, c.N, c.K), c.shift, draw);
  const Matrix<T> bias(1, c.N, Rows, 0, 0, draw);
  Buffer<T> output(c.M * c.N), before(c.M * c.N);
  for (int64_t i = 0; i < c.M * c.N; ++i) output.data[i] = before.data[i] = from_double<T>(NAN);
  LinearForward p = {};
  p.dtype = dtype_of<T>, p.activation = c.activation;
  p.M = c.M, p.N = c.N, p.K = c.K;
  p.input = x.data, p.input_row = x.row, p.input_col = x.col;
  p.weight = w.data, p.weight_row = w.row, p.weight_col = w.col;
  p.bias = c.bias ? bias.data : nullptr;
  p.output = output.data.get(), p.preactivation = c.preactivation ? before.data.get() : nullptr;
  const LinearPlan plan = linear_split(c.kernel, c.tile, c.K, c.splits);
  const Status status = linear_forward_planned(p, plan, Memory(), nullptr);
  const auto complain = [&](const std::string& what) {
    if (++failures <= 20)
      std::printf(
          "FAILED %s: kernel %d tile %d splits %d dtype %d, %ldx%ldx%ld, layouts %d %d, gap %d shift %d, activation "
          "%d\n",
          what.c_str(), static_cast<int>(c.kernel), c.tile, c.splits, static_cast<int>(p.dtype), c.M, c.N, c.K, c.a,
          c.b, c.gap, c.shift, static_cast<int>(c.activation));
    return true;
  };
  if (!status.ok()) return complain(status.message);
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = c.bias ? bias.values[n] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < c.K; ++k) {
        const double product = x.values[m * c.K + k] * w.values[n * c.K + k];
        sum += product, size += std::fabs(product);
      }
      // Sums are kept in float: an error of eps for each term; every activation's slope is at most 1.2.
      const double unit = std::is_same_v<T, double> ? 0x1p-52 : c.kernel == LinearKernel::Tf32 ? 0x1p-12 : 0x1p-23;
      const double want = activated(c.activation, sum), got = to_double(output.data[m * c.N + n]);
      const double allowed = exact ? 0 : 1.2 * unit * size * (2 + std::sqrt(1.0 * c.K)) + 4 * unit * std::fabs(want);
      const double rounding = (sizeof(T) == 2 ? epsilon<T> : 0);
      const bool close = exact ? got == to_double(from_double<T>(want))
                               : std::fabs(got - want) <= allowed + rounding * (std::fabs(want) + allowed) + 0x1p-25;
      if (!close) return complain("output " + std::to_string(got) + " for " + std::to_string(want));
      const double kept = to_double(before.data[m * c.N + n]);
      if (c.preactivation && !(std::fabs(kept - sum) <= allowed + rounding * (std::fabs(sum) + allowed) + 0x1p-25))
        return complain("pre-activation " + std::to_string(kept) + " for " + std::to_string(sum));
    }
  return true;
}

}  // namespace fastnn::cuda
