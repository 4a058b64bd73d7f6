// linear's wgmma kernel on the CPU against sums in double: both tiles, every layout, edges of tiles, several tiles a
// block, splits, activations; what TMA cannot describe goes to the other kernel. Small integers are exact.
#include <cstdio>
#include <cstdlib>

#include "linear_problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

// `runs`: whether wgmma is expected to serve.
template <class T>
void check_wgmma(Case c, bool runs = true) {
  c.kernel = LinearKernel::Wgmma, c.whole = true;
  const int64_t earlier = host::wgmmas;
  if (!check<T>(c) || (host::wgmmas > earlier) == runs) return;
  ++failures;
  std::printf("FAILED: another kernel served %ldx%ldx%ld, layouts %d %d, gap %d\n", c.M, c.N, c.K, c.a, c.b, c.gap);
}

template <class T>
void check_tile(int tile) {
  const LinearTile t = kWgmmaTiles[tile];
  for (const Layout a : {Rows, Columns})
    for (const Layout b : {Rows, Columns}) {
      for (const int gap : {0, 8}) {
        check_wgmma<T>({LinearKernel::Wgmma, tile, 1, t.m, t.n, 2 * t.k, a, b, gap});
        check_wgmma<T>({LinearKernel::Wgmma, tile, 1, t.m + 1, t.n + 1, 2 * t.k + 5, a, b, gap});
      }
      check_wgmma<T>(
          {LinearKernel::Wgmma, tile, 1, 2 * t.m + 40, 2 * t.n + 3, 7 * t.k + 1, a, b});  // three blocks have six tiles
      for (const int splits : {2, 3})
        check_wgmma<T>({LinearKernel::Wgmma, tile, splits, t.m / 2 + 3, t.n + 12, 5 * t.k + 3, a, b});
      for (const int64_t k : {2, 8, 15, 63, 65}) check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 70, 24, k, a, b});
      for (const int64_t m : {1, 9, 63, 64, 65, 127}) check_wgmma<T>({LinearKernel::Wgmma, tile, 1, m, 40, t.k, a, b});
      for (const int64_t n : {1, 7, 63, 65, t.n - 1}) check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 66, n, t.k, a, b});
    }
  check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 70, 24, 1});
  check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 5 * t.m, t.n, 100});
  check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 64, 7 * t.n - 8, 64});
  check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 20, 36, 20 * t.k});  // more steps than stages, several times round
  check_wgmma<T>({LinearKernel::Wgmma, tile, 4, 300, 20, 16 * t.k});
  for (int activation = 0; activation <= static_cast<int>(Activation::Mish); ++activation) {
    const auto a = static_cast<Activation>(activation);
    check_wgmma<T>({LinearKernel::Wgmma, tile, 1, 70, 67, 53, Rows, Rows, 0, 0, a, true, true});
    check_wgmma<T>({LinearKernel::Wgmma, tile, 2, 5, t.n + 8, 2 * t.k, Rows, Rows, 0, 0, a, false, true});
  }
}

// What TMA cannot describe, a driver that gives no maps, a build without sm_90a: the kernel of sm_80 has the same splits.
template <class T>
void check_fall_back() {
  for (const int splits : {1, 2}) {
    Case c = {LinearKernel::Wgmma, 0, splits, 70, 40, 200};
    c.gap = 1, check_wgmma<T>(c, false);
    c.gap = 4, check_wgmma<T>(c, false);
    c.gap = 0, c.shift = 1, check_wgmma<T>(c, false);
    c.shift = 0, c.a = c.b = Columns, c.gap = 2, check_wgmma<T>(c, false);
    c.gap = 0, host::machine.no_driver = true, check_wgmma<T>(c, false);
    host::machine.no_driver = false, host::machine.no_body = true, check_wgmma<T>(c, false);
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
    const int64_t before = host::wgmmas;
    bool right = linear_forward(f, Memory(), nullptr).ok();
    const int64_t between = host::wgmmas;
    right &= linear_backward(b, Memory(), nullptr).ok();
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
