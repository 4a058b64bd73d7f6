// linear's wgmma kernel on the CPU against sums in double: both tiles, every layout, edges of tiles, several tiles a
// block, splits, activations; what TMA cannot describe goes to the other kernel. Small integers are exact.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/linear_launch.h"
#include "cuda_runtime.h"
#include "problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

int failures = 0, cases = 0, every = 1;

struct Case {
  int tile, splits;
  int64_t M, N, K;
  Layout a = Rows, b = Rows;
  int gap = 0;  // rows are padded to whole 16 bytes and by this
  Activation activation = Activation::None;
  bool bias = true, preactivation = false;
  int shift = 0;
  bool tma = true;  // whether the kernel is expected to run
};

int padded(int64_t dense, int gap) { return static_cast<int>((8 - dense % 8) % 8) + gap; }

template <class T>
void check(const Case& c) {
  if (++cases % every) return;
  host::machine.order = static_cast<host::Machine::Order>(cases / every % 3);
  const bool exact = c.activation == Activation::None;
  double (*const draw)() = exact ? small_integer : normal;
  const Matrix<T> x(c.M, c.K, c.a, padded(c.a == Rows ? c.K : c.M, c.gap), c.shift, draw);
  const Matrix<T> w(c.N, c.K, c.b, padded(c.b == Rows ? c.K : c.N, c.gap), c.shift, draw);
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
  const LinearPlan plan = linear_split(LinearKernel::Wgmma, c.tile, c.K, c.splits);
  Buffer<char> workspace(linear_partial_bytes(p.dtype, c.M, c.N, plan.splits));
  std::fill_n(workspace.data.get(), workspace.size, '\xff');
  const int64_t earlier = host::wgmmas;
  const Status status = linear_forward_planned(p, plan, {workspace.data.get(), workspace.size}, nullptr);
  const auto complain = [&](const std::string& what) {
    if (++failures <= 20)
      std::printf("FAILED %s: tile %d splits %d dtype %d, %ldx%ldx%ld, layouts %d %d, gap %d, activation %d\n",
                  what.c_str(), c.tile, c.splits, static_cast<int>(p.dtype), c.M, c.N, c.K, c.a, c.b, c.gap,
                  static_cast<int>(c.activation));
  };
  if (!status.ok()) return complain(status.message);
  if ((host::wgmmas > earlier) != c.tma) return complain("another kernel ran");
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = c.bias ? bias.values[n] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < c.K; ++k) {
        const double product = x.values[m * c.K + k] * w.values[n * c.K + k];
        sum += product, size += std::fabs(product);
      }
      const double want = activated(c.activation, sum), allowed = 0x1p-22 * size * (2 + std::sqrt(1.0 * c.K));
      const double got = to_double(output.data[m * c.N + n]), kept = to_double(before.data[m * c.N + n]);
      const auto close = [&](double value, double wanted) {
        return exact ? value == to_double(from_double<T>(wanted))
                     : std::fabs(value - wanted) <= allowed + epsilon<T> * (std::fabs(wanted) + allowed) + 0x1p-24;
      };
      if (!close(got, want)) return complain("output " + std::to_string(got) + " for " + std::to_string(want));
      if (c.preactivation && !close(kept, sum)) return complain("pre-activation");
    }
}

template <class T>
void check_tile(int tile) {
  const LinearTile t = kWgmmaTiles[tile];
  for (const Layout a : {Rows, Columns})
    for (const Layout b : {Rows, Columns}) {
      for (const int gap : {0, 8}) {
        check<T>({tile, 1, t.m, t.n, 2 * t.k, a, b, gap});
        check<T>({tile, 1, t.m + 1, t.n + 1, 2 * t.k + 5, a, b, gap});
      }
      check<T>({tile, 1, 2 * t.m + 40, 2 * t.n + 3, 7 * t.k + 1, a, b});  // three blocks have six tiles
      for (const int splits : {2, 3}) check<T>({tile, splits, t.m / 2 + 3, t.n + 12, 5 * t.k + 3, a, b});
      for (const int64_t k : {2, 8, 15, 63, 65}) check<T>({tile, 1, 70, 24, k, a, b});
      for (const int64_t m : {1, 9, 63, 64, 65, 127}) check<T>({tile, 1, m, 40, t.k, a, b});
      for (const int64_t n : {1, 7, 63, 65, t.n - 1}) check<T>({tile, 1, 66, n, t.k, a, b});
    }
  check<T>({tile, 1, 70, 24, 1});
  check<T>({tile, 1, 5 * t.m, t.n, 100});
  check<T>({tile, 1, 64, 7 * t.n - 8, 64});
  check<T>({tile, 1, 20, 36, 20 * t.k});  // more steps than stages, several times round
  check<T>({tile, 4, 300, 20, 16 * t.k});
  for (int activation = 0; activation <= static_cast<int>(Activation::Mish); ++activation) {
    const auto a = static_cast<Activation>(activation);
    check<T>({tile, 1, 70, 67, 53, Rows, Rows, 0, a, true, true});
    check<T>({tile, 2, 5, t.n + 8, 2 * t.k, Rows, Rows, 0, a, false, true});
  }
}

// What TMA cannot describe, a driver that gives no maps, a build without sm_90a: the kernel of sm_80 has the same splits.
template <class T>
void check_fall_back() {
  for (const int splits : {1, 2}) {
    Case c = {0, splits, 70, 40, 200};
    c.tma = false;
    c.gap = 1, check<T>(c);
    c.gap = 4, check<T>(c);
    c.gap = 0, c.shift = 1, check<T>(c);
    c.shift = 0, c.a = c.b = Columns, c.gap = 2, check<T>(c);
    c.gap = 0, host::machine.no_driver = true, check<T>(c);
    host::machine.no_driver = false, host::machine.no_body = true, check<T>(c);
    host::machine.no_body = false;
  }
}

// The plan's own choice, forward and backward: wgmma on sm_90 alone, and the same answers as everywhere.
template <class T>
void check_dispatch() {
  const int64_t M = 250, N = 264, K = 392;
  for (const int capability : {80, 90, 120}) {
    if (++cases % every) continue;
    host::machine.capability = capability;
    const Matrix<T> x(M, K, Rows, 0, 0, small_integer), w(N, K, Rows, 0, 0, small_integer);
    const Matrix<T> grad(M, N, Rows, 0, 0, small_integer);
    Buffer<T> output(M * N), grad_input(M * K), grad_weight(N * K);
    LinearForward f = {};
    f.dtype = dtype_of<T>, f.M = M, f.N = N, f.K = K;
    f.input = x.data, f.input_row = x.row, f.input_col = x.col;
    f.weight = w.data, f.weight_row = w.row, f.weight_col = w.col, f.output = output.data.get();
    LinearBackward b = {};
    b.dtype = f.dtype, b.M = M, b.N = N, b.K = K;
    b.grad_output = grad.data, b.grad_row = grad.row, b.grad_col = grad.col;
    b.input = x.data, b.input_row = x.row, b.input_col = x.col;
    b.weight = w.data, b.weight_row = w.row, b.weight_col = w.col;
    b.grad_input = grad_input.data.get(), b.grad_weight = grad_weight.data.get();
    Buffer<char> workspace(std::max(linear_forward_workspace(f), linear_backward_workspace(b)));
    const int64_t before = host::wgmmas;
    bool right = linear_forward(f, {workspace.data.get(), workspace.size}, nullptr).ok();
    const int64_t between = host::wgmmas;
    right &= linear_backward(b, {workspace.data.get(), workspace.size}, nullptr).ok();
    right &= (between > before) == (capability == 90) && (host::wgmmas > between) == (capability == 90);
    const auto same = [&](const Buffer<T>& got, int64_t rows, int64_t cols, int64_t depth, auto left, auto other) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < depth; ++k) sum += left(i, k) * other(k, j);
          right &= to_double(got.data[i * cols + j]) == to_double(from_double<T>(sum));
        }
    };
    const auto X = [&](int64_t m, int64_t k) { return x.values[m * K + k]; };
    const auto W = [&](int64_t n, int64_t k) { return w.values[n * K + k]; };
    const auto G = [&](int64_t m, int64_t n) { return grad.values[m * N + n]; };
    same(output, M, N, K, X, [&](int64_t k, int64_t n) { return W(n, k); });
    same(grad_input, M, K, N, G, W);
    same(grad_weight, N, K, M, [&](int64_t n, int64_t m) { return G(m, n); }, X);
    if (!right && ++failures <= 20)
      std::printf("FAILED dispatch: dtype %d sm_%d\n", static_cast<int>(f.dtype), capability);
  }
  host::machine.capability = 90;
}

}  // namespace

// linear_sm90_test [every]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  host::machine.capability = 90, host::machine.multiprocessors = 3, host::machine.shared_bytes = 232448;
  for (const int tile : {0, 1}) check_tile<Float16>(tile), check_tile<BFloat16>(tile);
  check_fall_back<Float16>(), check_fall_back<BFloat16>();
  check_dispatch<Float16>(), check_dispatch<BFloat16>();
  std::printf("linear on wgmma: %d cases, %d failed\n", cases, failures);
  return failures != 0;
}
