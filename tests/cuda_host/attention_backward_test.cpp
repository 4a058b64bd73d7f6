// attention's gradients on the CPU against their formulas in double: every dtype, edge of a tile, layout, mask, window,
// group; dropped keys are those of the CPU's kernels.
#include "attention_problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

template <class T, class M>
void check_with_mask(const Case& c, double (*draw_mask)()) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  if (turn++ % every) return;
  ++cases;
  const int64_t heads = c.batch * c.heads, kv = c.heads / c.group;
  const Operand<T> query({c.batch, c.heads, c.L, c.D}, c.query, normal), key({c.batch, kv, c.S, c.D}, c.key, normal);
  const Operand<T> value({c.batch, kv, c.S, c.V}, c.value, normal);
  const Operand<T> output({c.batch, c.heads, c.L, c.V}, c.output, normal);
  const Operand<T> grad({c.batch, c.heads, c.L, c.V}, c.query, normal);
  const Operand<T> grad_query({c.batch, c.heads, c.L, c.D}, c.output, nullptr);
  const Operand<T> grad_key({c.batch, kv, c.S, c.D}, c.output, nullptr);
  const Operand<T> grad_value({c.batch, kv, c.S, c.V}, c.output, nullptr);
  const auto kept = [&](int bit, int64_t n) { return c.mask_broadcast >> bit & 1 ? std::min<int64_t>(n, 1) : n; };
  Operand<M> mask({kept(0, c.batch), kept(1, c.heads), kept(2, c.L), kept(3, c.S)}, {c.mask_order, 0, c.mask_shift},
                  c.mask == AttentionMask::None ? nullptr : draw_mask);
  std::vector<int64_t> mask_at;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t b = c.mask_broadcast & 1 ? 0 : h / c.heads, own = c.mask_broadcast & 2 ? 0 : h % c.heads;
    mask_at.push_back(b * mask.stride[0] + own * mask.stride[1]);
  }
  if (c.mask_broadcast & 4) mask.stride[2] = 0;
  if (c.mask_broadcast & 8) mask.stride[3] = 0;
  mask.offset = mask_at;
  Buffer<C> lse(heads * c.L), grad_lse(heads * c.L);
  const std::array<int64_t, 4> n = mask.size;
  Buffer<C> grad_mask(n[0] * n[1] * n[2] * n[3]);
  std::fill_n(grad_mask.data.get(), grad_mask.size, C(NAN));
  std::vector<int64_t> mask_index;
  for (int64_t h = 0; h < heads; ++h)
    mask_index.push_back((n[0] == 1 ? 0 : h / c.heads * n[1]) + (n[1] == 1 ? 0 : h % c.heads));

  AttentionBackwardParams b = {};
  AttentionParams& p = b.forward;
  p.dtype = dtype_of<T>, p.heads = heads, p.group = c.group;
  p.query_length = c.L, p.key_length = c.S, p.head_dim = c.D, p.value_dim = c.V;
  p.query = query.operand(), p.key = key.operand(), p.value = value.operand(), p.output = output.result();
  p.mask_type = c.mask;
  if (c.mask != AttentionMask::None) p.mask = mask.operand();
  p.scale = c.scale, p.softcap = c.softcap, p.dropout_p = c.dropout;
  p.philox_seed = 0x123456789abcdef0u + cases;
  p.first_shift = c.first, p.last_shift = c.last, p.lse = lse.data.get();
  b.grad_output = grad.operand();
  b.grad_lse = c.sums ? grad_lse.data.get() : nullptr;
  b.grad_query = grad_query.result(), b.grad_key = grad_key.result(), b.grad_value = grad_value.result();

  const bool of_mask = c.mask == AttentionMask::Query || c.mask == AttentionMask::Float32;
  if (of_mask && grad_mask.size > 0) {
    b.grad_mask = grad_mask.data.get(), b.mask_index = mask_index.data();
    b.mask_heads = n[0] * n[1], b.mask_rows = n[2], b.mask_cols = n[3];
  }

  // What each gradient is, and how far off it may be.
  struct Wanted {
    std::vector<double> value, allowed;
    explicit Wanted(int64_t size) : value(size), allowed(size) {}
    void add(int64_t at, double x, double error) { value[at] += x, allowed[at] += error; }
  };
  Wanted want_query(heads * c.L * c.D), want_key(c.batch * kv * c.S * c.D), want_value(c.batch * kv * c.S * c.V);
  Wanted want_mask(grad_mask.size);
  const double unit = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24, keep = c.dropout >= 1 ? 0 : 1 / (1 - c.dropout);
  const double scale = c.D == 0 ? 1 : c.scale;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t l = 0; l < c.L; ++l) {
      const int64_t g = h / c.group, number = h * c.L + l;
      std::vector<double> s(c.S), slope(c.S, 1), wrong(c.S), ones(c.S, 1), keeps(c.S, 1);
      double top = -INFINITY, sum = 0;
      for (int64_t k = 0; k < c.S; ++k) {
        double x = 0, size = 0;
        for (int64_t e = 0; e < c.D; ++e) {
          const double product = query.at(h, l, e) * key.at(g, k, e) * scale;
          x += product, size += std::fabs(product);
        }
        if (c.softcap != 0) {
          const double t = std::tanh(x / c.softcap);
          x = c.softcap * t, slope[k] = 1 - t * t;
        }
        const double added = c.mask != AttentionMask::None ? mask.at(h, l, k) : 0;
        x += added;
        if (k < l + c.first || k > l + c.last) x = -INFINITY;
        s[k] = x, top = std::max(top, x);
        wrong[k] = unit * (size * (2 + std::sqrt(1.0 * c.D)) +
                           (std::isinf(x) ? 0 : 8 * std::fabs(x) + std::fabs(added)) + 16 * c.softcap + 16);
      }
      for (int64_t k = 0; k < c.S; ++k) sum += top > -INFINITY ? std::exp(s[k] - top) : 0;
      lse.data[number] = static_cast<C>(sum > 0 ? top + std::log(sum) : -INFINITY);
      grad_lse.data[number] = static_cast<C>(normal());
      if (c.dropout > 0) cpu::baseline::drop<double>(p, {h, l}, 0, c.S, ones.data(), keeps.data());
      double delta = c.sums ? -double{grad_lse.data[number]} : 0, delta_size = std::fabs(delta);
      for (int64_t n = 0; n < c.V; ++n) {
        const double product = grad.at(h, l, n) * output.at(h, l, n);
        delta += product, delta_size += std::fabs(product);
      }
      for (int64_t k = 0; k < c.S && sum > 0; ++k) {
        const double P = std::exp(s[k] - lse.data[number]), off = 3 * wrong[k] + 8 * unit * std::fabs(lse.data[number]);
        double dP = 0, size = 0;
        for (int64_t n = 0; n < c.V; ++n) {
          const double product = grad.at(h, l, n) * value.at(g, k, n) * keeps[k] * keep;
          dP += product, size += std::fabs(product);
          const double x = P * keeps[k] * keep * grad.at(h, l, n);
          want_value.add((g * c.S + k) * c.V + n, x, std::fabs(x) * (off + 4 * unit * std::sqrt(1.0 * c.L * c.group)));
        }
        const double dS = P * (dP - delta) * slope[k], added = P * (size + delta_size);
        const double far = P * (size + delta_size) *
                           (off + unit * (8 + 2 * std::sqrt(1.0 * c.V) + 2 * std::sqrt(1.0 * c.L * c.group + c.S)));
        if (b.grad_mask)
          want_mask.add((mask_index[h] * n[2] + (n[2] == 1 ? 0 : l)) * n[3] + (n[3] == 1 ? 0 : k), P * (dP - delta),
                        far + added * unit * 4 * std::sqrt(1.0 * heads * c.L * c.S));
        for (int64_t e = 0; e < c.D; ++e) {
          const double q = query.at(h, l, e) * scale, x = key.at(g, k, e) * scale;
          want_query.add(number * c.D + e, dS * x, far * std::fabs(x));
          want_key.add((g * c.S + k) * c.D + e, dS * q, far * std::fabs(q));
        }
      }
    }

  Buffer<char> workspace(attention_backward_workspace(b));
  std::fill_n(workspace.data.get(), workspace.size, '\xff');
  const int64_t on_device = static_cast<int64_t>(p.philox_seed);
  if (c.seed_on_device) p.philox_seed = 1;
  const Status status =
      attention_backward(b, c.seed_on_device ? &on_device : nullptr, {workspace.data.get(), workspace.size}, nullptr);
  const auto complain = [&](const std::string& what) {
    if (++failures <= 20)
      std::printf("FAILED %s: dtype %d %s\n", what.c_str(), static_cast<int>(p.dtype), c.text().c_str());
  };
  if (!status.ok()) return complain(status.message);
  const auto compare = [&](const char* name, const Operand<T>& got, const Wanted& want, int64_t rows, int64_t cols) {
    const double rounding = sizeof(T) == 2 ? epsilon<T> : 0;
    for (size_t i = 0; i < want.value.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i);
      const double x = got.at(at / (rows * cols), at / cols % rows, at % cols), wanted = want.value[i];
      const double allowed =
          want.allowed[i] + rounding * (std::fabs(wanted) + want.allowed[i]) + (sizeof(T) == 2 ? 0x1p-25 : 0x1p-140);
      if (!(std::fabs(x - wanted) <= allowed))
        return complain(std::string(name) + " " + std::to_string(x) + " for " + std::to_string(wanted) + ", allowed " +
                        std::to_string(allowed) + " at " + std::to_string(i));
    }
  };
  for (int64_t i = 0; b.grad_mask && i < grad_mask.size; ++i)
    if (!(std::fabs(grad_mask.data[i] - want_mask.value[i]) <= want_mask.allowed[i] + 0x1p-140))
      return complain("grad_mask " + std::to_string(grad_mask.data[i]) + " for " + std::to_string(want_mask.value[i]));
  compare("grad_query", grad_query, want_query, c.L, c.D);
  compare("grad_key", grad_key, want_key, c.S, c.D);
  compare("grad_value", grad_value, want_value, c.S, c.V);
}

template <class T>
void check(const Case& c) {
  switch (c.mask) {
    case AttentionMask::Bool: return check_with_mask<T, uint8_t>(c, bool_draw);
    case AttentionMask::Float32: return check_with_mask<T, float>(c, mask_draw);
    default: return check_with_mask<T, T>(c, mask_draw);
  }
}

template <class T>
void check_all(int count) {
  Case c;
  for (const int L : {0, 1, 63, 64, 65, 130})
    for (const int S : {0, 1, 63, 64, 65}) c.L = L, c.S = S, c.D = 9, c.V = 7, c.last = L % 2 ? 0 : S - L, check<T>(c);
  c.L = 5, c.S = 70, c.last = 40;
  for (const int D : {0, 1, 7, 8, 9, 16, 63, 64, 65, 129, 150}) c.D = D, c.V = 3, check<T>(c);
  for (const int V : {0, 1, 63, 64, 65, 128, 129, 150}) c.D = 8, c.V = V, check<T>(c);
  for (int i = 0; i < count; ++i) {
    Case r;
    r.batch = pick({1, 1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 2, 5, 16, 31, 64, 67, 129}), r.S = pick({0, 1, 3, 17, 64, 65, 100, 131});
    r.D = pick({1, 3, 8, 17, 32, 64}), r.V = pick({1, 5, 16, 64, 67});
    random_rest(r), random_general(r);
    r.nan_unseen = false;
    check<T>(r);
  }
}

}  // namespace

// attention_backward_test [every]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  check_all<float>(60), check_all<double>(60), check_all<Float16>(30), check_all<BFloat16>(30);
  for (const auto order : {host::Machine::Backward, host::Machine::Shuffled}) {
    host::machine.order = order;
    check_all<float>(5);
  }
  std::printf("attention backward: %d cases, %d failed\n", cases, failures);
  std::fflush(stdout);
  return failures != 0;
}
