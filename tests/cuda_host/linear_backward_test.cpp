// linear's gradients on the CPU, through the dispatcher, against sums in double: exact for small integers, where relu
// is the activation or none is.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "fastnn/linear.h"
#include "problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

int failures = 0, cases = 0, every = 1;
bool allow_tf32 = false;

struct Case {
  int64_t M, N, K;
  Activation activation = Activation::None;
  Layout grad = Rows, x = Rows, w = Rows;
  int gap = 0;
  std::array<bool, 3> wanted = {true, true, true};
};

template <class T>
void check(const Case& c) {
  if (++cases % every) return;
  host::machine.order = static_cast<host::Machine::Order>(cases / every % 3);
  const bool exact = c.activation == Activation::None || c.activation == Activation::Relu;
  double (*const draw)() = exact ? small_integer : normal;
  const Matrix<T> grad(c.M, c.N, c.grad, c.gap, 0, draw), saved(c.M, c.N, Rows, 0, 0, draw);
  const Matrix<T> x(c.M, c.K, c.x, c.gap, 0, draw), w(c.N, c.K, c.w, c.gap, 0, draw);
  Buffer<T> grad_input(c.M * c.K), grad_weight(c.N * c.K), grad_bias(c.N);
  for (Buffer<T>* buffer : {&grad_input, &grad_weight, &grad_bias})
    for (int64_t i = 0; i < buffer->size; ++i) buffer->data[i] = from_double<T>(NAN);
  LinearBackward p = {};
  p.dtype = dtype_of<T>, p.activation = c.activation;
  p.M = c.M, p.N = c.N, p.K = c.K;
  p.allow_tf32 = allow_tf32;
  p.grad_output = grad.data, p.grad_row = grad.row, p.grad_col = grad.col;
  p.saved = c.activation == Activation::None ? nullptr : saved.data;
  p.input = x.data, p.input_row = x.row, p.input_col = x.col;
  p.weight = w.data, p.weight_row = w.row, p.weight_col = w.col;
  p.grad_input = c.wanted[0] ? grad_input.data.get() : nullptr;
  p.grad_weight = c.wanted[1] ? grad_weight.data.get() : nullptr;
  p.grad_bias = c.wanted[2] ? grad_bias.data.get() : nullptr;
  const Status status = linear_backward(p, Memory(), nullptr);
  const auto complain = [&](const std::string& what) {
    if (++failures <= 20)
      std::printf("FAILED %s: dtype %d, %ldx%ldx%ld, layouts %d %d %d, activation %d\n", what.c_str(),
                  static_cast<int>(p.dtype), c.M, c.N, c.K, c.grad, c.x, c.w, static_cast<int>(c.activation));
  };
  if (!status.ok()) return complain(status.message);
  std::vector<double> g(c.M * c.N);
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    const double s = saved.values[i];
    double factor = 1;
    switch (c.activation) {  // from the output where f' can be had from it
      case Activation::None: break;
      case Activation::Relu: factor = s > 0; break;
      case Activation::Sigmoid: factor = s * (1 - s); break;
      case Activation::Tanh: factor = 1 - s * s; break;
      case Activation::LeakyRelu: factor = s > 0 ? 1 : 0.01; break;
      case Activation::Elu: factor = s > 0 ? 1 : s + 1; break;
      case Activation::Relu6: factor = s > 0 && s < 6; break;
      case Activation::Hardswish: factor = s <= -3 ? 0 : s < 3 ? s / 3 + 0.5 : 1; break;  // not smooth at 3
      default: factor = slope(c.activation, s);
    }
    g[i] = grad.values[i] * factor;
  }
  // g is rounded to the dtype before it is multiplied, and to TF32 where that is allowed; sums are kept in float.
  const double unit = std::is_same_v<T, double> ? 1e-9 : allow_tf32 ? 0x1p-11 : 0x1p-22;
  const auto compare = [&](const char* name, const T* got, int64_t rows, int64_t cols, int64_t depth, auto left,
                           auto right) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < depth; ++k)
          sum += left(i, k) * right(k, j), size += std::fabs(left(i, k) * right(k, j));
        const double value = to_double(got[i * cols + j]);
        const double rounding = sizeof(T) == 2 ? epsilon<T> : 0;
        const bool close = exact ? value == to_double(from_double<T>(sum))
                                 : std::fabs(value - sum) <= (unit * std::sqrt(depth + 8.0) + 1.1 * rounding) * size +
                                                                 rounding * std::fabs(sum) + 0x1p-24;
        if (!close) return complain(std::string(name) + " " + std::to_string(value) + " for " + std::to_string(sum));
      }
  };
  const auto at = [&](int64_t m, int64_t n) { return g[m * c.N + n]; };
  if (c.wanted[0])
    compare("grad_input", grad_input.data.get(), c.M, c.K, c.N, at,
            [&](int64_t n, int64_t k) { return w.values[n * c.K + k]; });
  if (c.wanted[1])
    compare(
        "grad_weight", grad_weight.data.get(), c.N, c.K, c.M, [&](int64_t n, int64_t m) { return at(m, n); },
        [&](int64_t m, int64_t k) { return x.values[m * c.K + k]; });
  if (c.wanted[2])
    compare(
        "grad_bias", grad_bias.data.get(), 1, c.N, c.M, [](int64_t, int64_t) { return 1.0; },
        [&](int64_t m, int64_t n) { return at(m, n); });
}

template <class T>
void check_dtype() {
  for (int activation = 0; activation <= static_cast<int>(Activation::Mish); ++activation)
    for (const auto& [M, N, K] : {std::array<int64_t, 3>{33, 24, 40}, {5, 71, 19}})
      check<T>({M, N, K, static_cast<Activation>(activation)});
  for (const Activation activation : {Activation::None, Activation::Relu}) {
    for (const Layout grad : {Rows, Columns, Scattered})
      for (const Layout x : {Rows, Columns, Scattered})
        for (const Layout w : {Rows, Columns, Scattered}) check<T>({66, 35, 17, activation, grad, x, w, 1});
    for (int wanted = 1; wanted < 8; ++wanted)
      check<T>({12, 16, 9, activation, Rows, Rows, Rows, 0, {wanted % 2 == 1, wanted / 2 % 2 == 1, wanted / 4 == 1}});
    for (const auto& [M, N, K] : {std::array<int64_t, 3>{0, 5, 7},
                                  {5, 0, 7},
                                  {5, 7, 0},
                                  {1, 1, 1},
                                  {1, 130, 66},
                                  {700, 3, 5},
                                  {1030, 9, 8},
                                  {64, 128, 128},
                                  {129, 65, 131},
                                  {3, 300, 2}})
      check<T>({M, N, K, activation});
  }
}

}  // namespace

// linear_backward_test [every]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  check_dtype<float>();
  check_dtype<double>();
  check_dtype<BFloat16>();
  check_dtype<Float16>();
  allow_tf32 = true;
  check_dtype<float>();
  allow_tf32 = false, host::machine.capability = 86;  // float32 without tensor cores
  check_dtype<float>();
  host::machine.capability = 75;
  check_dtype<Float16>();
  check_dtype<BFloat16>();
  std::printf("linear backward: %d cases, %d failed\n", cases, failures);
  return failures != 0;
}
