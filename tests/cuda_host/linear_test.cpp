// linear's CUDA kernels on the CPU, each of them against sums in double: every dtype, layout, activation and edge of a
// tile. Inputs are small integers where no activation is asked for, so that every order of summation is exact.
#include <sys/mman.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"
#include "linear_problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

constexpr Activation kAll[] = {Activation::None, Activation::Relu,      Activation::Gelu,  Activation::GeluTanh,
                               Activation::Silu, Activation::Sigmoid,   Activation::Tanh,  Activation::LeakyRelu,
                               Activation::Elu,  Activation::Hardswish, Activation::Relu6, Activation::Softplus,
                               Activation::Mish};

template <class T>
void check_kernel(LinearKernel kernel, int tile) {
  const LinearTile t = linear_tile(kernel, tile);
  const bool gemv = kernel == LinearKernel::Gemv;
  const std::vector<Layout> layouts = gemv                           ? std::vector<Layout>{Rows}
                                      : kernel == LinearKernel::Simt ? std::vector<Layout>{Rows, Columns, Scattered}
                                                                     : std::vector<Layout>{Rows, Columns};
  const bool thin = kernel == LinearKernel::Thin;
  const int64_t most_m = gemv ? t.m : t.m + 1;
  for (const Layout a : thin ? std::vector<Layout>{Rows} : layouts)
    for (const Layout b : layouts) {
      // Whole tiles and the sizes around them, each with each alignment of rows.
      for (const int gap : {0, 1, 2, 4, 8})
        for (const int shift : {0, 1}) check<T>({kernel, tile, 1, most_m, t.n + 1, 2 * t.k + 5, a, b, gap, shift});
      check<T>({kernel, tile, 1, gemv ? t.m : 2 * t.m, t.n, 4 * t.k, a, b});
      for (const int splits : {2, 3})
        check<T>({kernel, tile, splits, gemv ? 5 : t.m / 2 + 3, t.n + 9, 5 * t.k + 3, a, b});
      check<T>({kernel, tile, 1, 3, 5, 0, a, b});
    }
  for (int64_t m = 1; m <= most_m; m += m < 20 || m > most_m - 4 ? 1 : 7) check<T>({kernel, tile, 1, m, 8, t.k});
  for (int64_t n = 1; n <= t.n + 1; n += n < 20 || n > t.n - 4 ? 1 : 7) check<T>({kernel, tile, 1, 7, n, t.k});
  for (int64_t k = 1; k <= 3 * t.k + 1; k += k < 40 || k > 3 * t.k - 4 ? 1 : 13) check<T>({kernel, tile, 1, 6, 17, k});
  for (const Activation activation : kAll) {
    check<T>({kernel, tile, 1, 8, 67, 53, Rows, Rows, 0, 0, activation, true, true});
    check<T>({kernel, tile, 2, 5, 24, 2 * t.k, Rows, Rows, 0, 0, activation, false, true});
  }
}

// float32 on tensor cores beside FMAs in order, on one block of rows: `x` and `w` are its values.
struct Floats {
  int64_t M, N, K;
  std::vector<float> x, w;
  std::vector<float> output, plain;      // the kernel's, and FMAs'
  std::vector<double> exact, magnitude;  // sums of products and of their magnitudes

  Floats(int64_t M, int64_t N, int64_t K, double (*draw)()) : M(M), N(N), K(K), x(M * K), w(N * K) {
    for (float& value : x) value = static_cast<float>(draw());
    for (float& value : w) value = static_cast<float>(draw());
  }
  bool run(LinearKernel kernel, int tile, int splits, bool x_along_k = true) {
    host::machine.order = static_cast<host::Machine::Order>(++cases % 3);
    std::vector<float> turned(x);
    for (int64_t i = 0; i < M * K; ++i) turned[i % K * M + i / K] = x[i];
    output.assign(M * N, NAN), plain.assign(M * N, 0), exact.assign(M * N, 0), magnitude = exact;
    LinearForward p = {};
    p.dtype = DType::Float32, p.M = M, p.N = N, p.K = K;
    p.input = x_along_k ? x.data() : turned.data(), p.input_row = x_along_k ? K : 1, p.input_col = x_along_k ? 1 : M;
    p.weight = w.data(), p.weight_row = K, p.weight_col = 1, p.output = output.data();
    const LinearPlan plan = linear_split(kernel, tile, K, splits);
    const bool done = linear_forward_planned(p, plan, Memory(), nullptr).ok();
    for (int64_t i = 0; i < M * N; ++i)
      for (int64_t k = 0; k < K; ++k) {
        const float a = x[i / N * K + k], b = w[i % N * K + k];
        plain[i] = std::fmaf(a, b, plain[i]);
        exact[i] += static_cast<double>(a) * b, magnitude[i] += std::fabs(static_cast<double>(a) * b);
      }
    return done;
  }
};

double uniform() { return std::uniform_real_distribution<double>()(generator); }

// The mean square error of three products is no more than that of FMAs in order; one product rounds to nearest.
void check_float_error() {
  for (const int tile : {0, 1})
    for (double (*const draw)() : {normal, uniform})
      for (const int64_t K : {64, 256, 1024}) {
        if (tile == 0 && K == 1024) continue;
        Floats f(40, 24, K, draw);
        bool right = f.run(LinearKernel::Tf32x3, tile, 1, K != 256);
        double own = 0, plain = 0, worst = 0;
        for (int64_t i = 0; i < f.M * f.N; ++i) {
          const double error = (f.output[i] - f.exact[i]) / f.magnitude[i];
          own += error * error, worst = std::fmax(worst, std::fabs(error));
          plain += std::pow((f.plain[i] - f.exact[i]) / f.magnitude[i], 2);
        }
        right &= own <= plain && worst <= 16 * 0x1p-24;
        if (!right)
          ++failures, std::printf("FAILED three products, K %ld: %g of FMAs' error, %g ulp at most\n", K,
                                  std::sqrt(own / plain), worst * 0x1p24);
        double bias = 0;
        right = f.run(LinearKernel::Tf32, tile, 1, K == 256);
        for (int64_t i = 0; i < f.M * f.N; ++i) bias += (f.output[i] - f.exact[i]) / f.magnitude[i] / (f.M * f.N);
        if (!right || std::fabs(bias) > 0x1p-14)
          ++failures, std::printf("FAILED one product, K %ld: off by %g of the terms' size\n", K, bias);
      }
}

// Infinities, NaN and magnitudes from end to end of float: what FMAs give, whichever block holds them.
void check_float_extremes() {
  const float signalling = bitcast<float>(0x7f800001u), last = bitcast<float>(0x7fffffffu);
  const float most = bitcast<float>(0x7f7fffffu), least = bitcast<float>(1u);
  const std::vector<float> values = {INFINITY, -INFINITY, NAN,    signalling, last,     -last, most,   -most,
                                     1e38f,    3e19f,     1e-38f, 0.0f,       1.5e-39f, least, 1e-30f, 1.0f};
  for (const LinearKernel kernel : {LinearKernel::Tf32x3, LinearKernel::Tf32})
    for (const int tile : {0, 1})
      for (const float left : values)
        for (const float right : values) {
          if ((cases += 1) % every) continue;
          Floats f(5, 70, 45, normal);
          f.x[2 * f.K + 33] = left, f.w[3 * f.K + 33] = right;
          f.x[2 * f.K + 40] = right == 0 ? left : -left, f.w[66 * f.K + 40] = right;
          bool good = f.run(kernel, tile, 1 + cases % 2, cases % 3 > 0);
          for (int64_t i = 0; i < f.M * f.N; ++i) {
            const double got = f.output[i], want = f.exact[i], unit = kernel == LinearKernel::Tf32 ? 0x1p-10 : 0x1p-21;
            const double cut = kernel == LinearKernel::Tf32 ? 0x1p-8 : 0;  // of products of tiny and huge ones
            good &= std::isnan(want)   ? std::isnan(got)
                    : std::isinf(want) ? got == want || std::isnan(f.plain[i])
                    : std::isfinite(got)
                        ? std::fabs(got - want) <= unit * f.magnitude[i] + cut + f.K * 0x1p-149
                        : f.magnitude[i] > 3e38;  // whether sums overflow on their way depends on their order
          }
          if (!good && ++failures <= 20)
            std::printf("FAILED extremes: kernel %d tile %d, %g and %g\n", static_cast<int>(kernel), tile, left, right);
        }
  // Whole operands of one size: full precision whatever the exponents are.
  for (const int tile : {0, 1})
    for (const auto& [left, right] : {std::pair<double, double>{1e-38, 1},
                                      {1e-38, 3e37},
                                      {3e37, 1e-39},
                                      {1e-41, 1e20},
                                      {1e-20, 1e-20},
                                      {1e-25, 1e-15},
                                      {1e-30, 1e-6},
                                      {1e18, 1e18},
                                      {3e37, 0.1},
                                      {1e-31, 1e-3}}) {
      Floats f(20, 9, 77, normal);
      for (float& value : f.x) value *= static_cast<float>(left);
      for (float& value : f.w) value *= static_cast<float>(right);
      bool good = f.run(LinearKernel::Tf32x3, tile, 1);
      for (int64_t i = 0; i < f.M * f.N; ++i)
        good &= std::fabs(f.output[i] - f.exact[i]) <= 0x1p-22 * f.magnitude[i] + f.K * 0x1p-149;
      if (!good) ++failures, std::printf("FAILED: operands of %g and %g\n", left, right);
    }
}

// What the dispatcher picks on its own, on several chips.
template <class T>
void check_dispatch(bool allow_tf32 = false) {
  for (const int capability : {75, 80, 86, 90, 103})
    for (const int multiprocessors : {4, 132}) {
      host::machine.capability = capability, host::machine.multiprocessors = multiprocessors;
      for (const auto& [M, N, K] : {std::array<int64_t, 3>{1, 40, 2000},
                                    {8, 65, 1100},
                                    {9, 129, 300},
                                    {24, 90, 1500},
                                    {70, 70, 70},
                                    {0, 5, 5},
                                    {5, 0, 5},
                                    {5, 5, 0},
                                    {33, 17, 1031}}) {
        const Matrix<T> x(M, K, Rows, 0, 0, small_integer), w(N, K, Rows, 0, 0, small_integer);
        Buffer<T> output(M * N);
        LinearForward p = {};
        p.dtype = dtype_of<T>, p.M = M, p.N = N, p.K = K;
        p.input = x.data, p.input_row = x.row, p.input_col = x.col;
        p.weight = w.data, p.weight_row = w.row, p.weight_col = w.col;
        p.output = output.data.get(), p.allow_tf32 = allow_tf32;
        if (++cases % every) continue;
        const Status status = linear_forward(p, Memory(), nullptr);
        bool right = status.ok();
        for (int64_t i = 0; i < M * N; ++i) {
          double sum = 0;
          for (int64_t k = 0; k < K; ++k) sum += x.values[i / N * K + k] * w.values[i % N * K + k];
          right &= to_double(output.data[i]) == to_double(from_double<T>(sum));
        }
        if (!right && ++failures <= 20)
          std::printf("FAILED dispatch: dtype %d %ldx%ldx%ld, sm_%d, %d multiprocessors %s\n",
                      static_cast<int>(p.dtype), M, N, K, capability, multiprocessors, status.message);
      }
    }
  host::machine = {};
}

// Rows more than 2^31 elements apart: offsets are 64 bits wide. Pages that are not touched take no memory.
template <class T>
void check_far_rows(LinearKernel kernel) {
  const int64_t M = 3, N = 3, K = 40, ld = (int64_t{1} << 31) + 24;
  const size_t bytes = static_cast<size_t>((M - 1) * ld + K) * sizeof(T);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;  // a machine that does not overcommit
  T* const data = static_cast<T*>(memory);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) data[m * ld + k] = from_double<T>(small_integer());
  Buffer<T> output(M * N);
  LinearForward p = {};
  p.dtype = dtype_of<T>, p.M = M, p.N = N, p.K = K;
  p.input = p.weight = data, p.input_row = p.weight_row = ld, p.input_col = p.weight_col = 1;
  p.output = output.data.get();
  ++cases;
  bool right = linear_forward_planned(p, linear_split(kernel, 1, K, 1), Memory(), nullptr).ok();
  for (int64_t i = 0; i < M * N; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += to_double(data[i / N * ld + k]) * to_double(data[i % N * ld + k]);
    right &= to_double(output.data[i]) == sum;
  }
  munmap(memory, bytes);
  if (!right) ++failures, std::printf("FAILED rows far apart: kernel %d\n", static_cast<int>(kernel));
}

void check_errors() {
  LinearForward p = {};
  p.dtype = DType::Float32, p.M = p.N = 5, p.K = 1000;
  const Status wrong = linear_forward_planned(p, linear_split(LinearKernel::Mma, 0, p.K, 1), Memory(), nullptr);
  if (std::string(wrong.message) != "linear_mma_kernel M=5 N=5 K=1000 bytes=4 tile=0: no such kernel in this dtype")
    ++failures, std::printf("FAILED: 16-bit tensor cores in float32 are reported as '%s'\n", wrong.message);
  p.dtype = DType::Float16;
  p.input_row = p.input_col = 2;
  if (linear_forward_planned(p, linear_split(LinearKernel::Thin, 0, p.K, 1), Memory(), nullptr).ok())
    ++failures, std::printf("FAILED: rows that are not dense in a thin product\n");
  if (linear_forward_planned(p, linear_split(LinearKernel::Tf32x3, 0, p.K, 1), Memory(), nullptr).ok())
    ++failures, std::printf("FAILED: TF32 in float16\n");
  cases += 3;
}

}  // namespace

// linear_test [every [part]]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string only = argc > 2 ? argv[2] : "";
  const auto part = [&](const char* name, const auto& run) {
    if (!only.empty() && only != name) return;
    const int before = cases;
    run();
    std::printf("linear %s: %d cases\n", name, cases - before);
    std::fflush(stdout);
  };
  part("mma", [] {
    for (const int tile : {0, 1})
      check_kernel<Float16>(LinearKernel::Mma, tile), check_kernel<BFloat16>(LinearKernel::Mma, tile);
  });
  part("thin", [] {
    for (const int tile : {0, 1, 2})
      check_kernel<Float16>(LinearKernel::Thin, tile), check_kernel<BFloat16>(LinearKernel::Thin, tile);
  });
  part("tf32", [] {
    for (const int tile : {0, 1})
      check_kernel<float>(LinearKernel::Tf32x3, tile), check_kernel<float>(LinearKernel::Tf32, tile);
    check_float_error(), check_float_extremes();
  });
  part("simt", [] {
    for (const int tile : {0, 1}) check_kernel<float>(LinearKernel::Simt, tile);
    check_kernel<double>(LinearKernel::Simt, 1);
    check_kernel<BFloat16>(LinearKernel::Simt, 1);
    check_kernel<Float16>(LinearKernel::Simt, 1);
  });
  part("gemv", [] {
    check_kernel<float>(LinearKernel::Gemv, 0);
    check_kernel<double>(LinearKernel::Gemv, 0);
    check_kernel<BFloat16>(LinearKernel::Gemv, 0);
    check_kernel<Float16>(LinearKernel::Gemv, 0);
  });
  part("dispatch", [] {
    check_dispatch<float>(), check_dispatch<float>(true);
    check_dispatch<double>();
    check_dispatch<BFloat16>();
    check_dispatch<Float16>();
    check_errors();
    check_far_rows<Float16>(LinearKernel::Mma), check_far_rows<Float16>(LinearKernel::Gemv);
    check_far_rows<Float16>(LinearKernel::Thin);
    check_far_rows<float>(LinearKernel::Tf32x3), check_far_rows<float>(LinearKernel::Simt),
        check_far_rows<float>(LinearKernel::Gemv);
  });
  std::printf("linear: %d cases, %d failed\n", cases, failures);
  std::fflush(stdout);
  return failures != 0;
}
