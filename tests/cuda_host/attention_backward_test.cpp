// attention's gradients on the CPU against their formulas in double: every dtype, edge of a tile, layout, mask, window,
// group; dropped keys are those of the CPU's kernels. Kernels for tensor cores are forced, each tile of them.
#include "attention_problem.h"

using namespace fastnn;
using namespace fastnn::cuda;

namespace {

int tile_of(const Case& c) { return c.kernel == AttentionKernel::Mma ? c.tile : kNoAttentionGradTile; }

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
  const Operand<M> mask = mask_of<M>(c, draw_mask);
  Buffer<C> lse(heads * c.L), grad_lse(heads * c.L);
  const std::array<int64_t, 4> n = mask.size;
  Buffer<C> grad_mask(n[0] * n[1] * n[2] * n[3]);
  std::fill_n(grad_mask.data.get(), grad_mask.size, C(NAN));
  std::vector<int64_t> mask_index;
  for (int64_t h = 0; h < heads; ++h)
    mask_index.push_back((n[0] == 1 ? 0 : h / c.heads * n[1]) + (n[1] == 1 ? 0 : h % c.heads));

  AttentionBackwardParams b = {};
  AttentionParams& p = b.forward = params_of(c, query, key, value, output, mask);
  p.lse = lse.data.get();
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
  // Tensor cores take P and dS in 16 bits; below its normal numbers float16 has steps of 2^-24.
  const bool rounds = sizeof(T) == 2 && c.kernel == AttentionKernel::Mma;
  const double rounding16 = rounds ? epsilon<T> : 0, step16 = rounds && std::is_same_v<T, Float16> ? 0x1p-25 : 0;
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
        x = masked_score<C>(x, added);
        if (k < l + c.first || k > l + c.last) x = -INFINITY;
        s[k] = x, top = std::max(top, x);
        const double rounded = swallows(added) || std::isinf(x) ? 0 : 8 * std::fabs(x) + std::fabs(added);
        wrong[k] = unit * (size * (2 + std::sqrt(1.0 * c.D)) + rounded + 16 * c.softcap + 16);
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
        const double P = std::exp(s[k] - lse.data[number]);  // its sum is lost where all scores are
        const double off = 3 * wrong[k] + (s[k] == lse.data[number] ? 0 : 8 * unit * std::fabs(lse.data[number]));
        double dP = 0, size = 0;
        for (int64_t n = 0; n < c.V; ++n) {
          const double product = grad.at(h, l, n) * value.at(g, k, n) * keeps[k] * keep;
          dP += product, size += std::fabs(product);
          const double x = P * keeps[k] * keep * grad.at(h, l, n);
          const double wrong_value = std::fabs(x) * (off + 4 * unit * std::sqrt(1.0 * c.L * c.group));
          want_value.add(
              (g * c.S + k) * c.V + n, x,
              wrong_value + (std::fabs(x) + wrong_value) * rounding16 + step16 * std::fabs(grad.at(h, l, n)));
        }
        const double dS = P * (dP - delta) * slope[k], added = P * (size + delta_size);
        const double far = P * (size + delta_size) *
                           (off + unit * (8 + 2 * std::sqrt(1.0 * c.V) + 2 * std::sqrt(1.0 * c.L * c.group + c.S)));
        const double far16 = far + (std::fabs(dS) + far) * rounding16 + step16;
        if (b.grad_mask)
          want_mask.add((mask_index[h] * n[2] + (n[2] == 1 ? 0 : l)) * n[3] + (n[3] == 1 ? 0 : k), P * (dP - delta),
                        far + added * unit * 4 * std::sqrt(1.0 * heads * c.L * c.S));
        for (int64_t e = 0; e < c.D; ++e) {
          const double q = query.at(h, l, e) * scale, x = key.at(g, k, e) * scale;
          want_query.add(number * c.D + e, dS * x, far16 * std::fabs(x));
          want_key.add((g * c.S + k) * c.D + e, dS * q, far16 * std::fabs(q));
        }
      }
    }

  const int64_t on_device = static_cast<int64_t>(p.philox_seed);
  if (c.seed_on_device) p.philox_seed = 1;
  const int64_t* const seed = c.seed_on_device ? &on_device : nullptr;
  const Status status = c.planned ? attention_backward(b, seed, Memory(), nullptr)
                                  : attention_backward_planned(b, tile_of(c), seed, Memory(), nullptr);
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
  with_mask_type<T>(c, [&](auto element, auto draw) { check_with_mask<T, decltype(element)>(c, draw); });
}

template <class T>
void check_simt(int count) {
  Case c;
  c.kernel = AttentionKernel::Simt;
  for (const int L : {0, 1, 63, 64, 65, 130})
    for (const int S : {0, 1, 63, 64, 65}) c.L = L, c.S = S, c.D = 9, c.V = 7, c.last = L % 2 ? 0 : S - L, check<T>(c);
  c.L = 5, c.S = 70, c.last = 40;
  for (const int D : {0, 1, 7, 8, 9, 16, 63, 64, 65, 129, 150}) c.D = D, c.V = 3, check<T>(c);
  for (const int V : {0, 1, 63, 64, 65, 128, 129, 150}) c.D = 8, c.V = V, check<T>(c);
  c.L = 7, with_hidden_rows(c, check<T>);
  for (int i = 0; i < count; ++i) {
    Case r;
    r.kernel = AttentionKernel::Simt;
    r.batch = pick({1, 1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 2, 5, 16, 31, 64, 67, 129}), r.S = pick({0, 1, 3, 17, 64, 65, 100, 131});
    r.D = pick({1, 3, 8, 17, 32, 64}), r.V = pick({1, 5, 16, 64, 67});
    random_rest(r), random_general(r);
    r.nan_unseen = false;
    check<T>(r);
  }
}

// Tensor cores: edges of the tile one at a time, for one type (the other differs in conversions alone), then everything
// at random.
template <class T>
void check_mma(int tile, int count) {
  const AttentionGradTile& t = kAttentionGradTiles[tile];
  const int w = t.width;
  Case c;
  c.tile = tile;
  for (const int L : {0, 1, 15, 17, t.walked - 1, t.walked, t.walked + 1, t.rows, t.rows + 1})
    for (const int S : {0, 1, 31, t.walked + 1, t.rows - 1, t.rows + 1}) {
      if (std::is_same_v<T, BFloat16>) continue;
      c.L = L, c.S = S, c.D = c.V = L + S > 64 ? 8 : w, c.last = L % 2 ? kAttentionNoLimit : S - L;
      check<T>(c);
    }
  for (const int D : {0, 1, 7, 8, 9, w / 2, w / 2 + 1, w - 8, w - 1, w})
    c.L = 37, c.S = 41, c.D = D, c.V = w - D, c.last = 2, check<T>(c);
  c.V = 8, with_hidden_rows(c, check<T>);
  for (int i = 0; i < count; ++i) {
    Case r;
    r.tile = tile;
    r.batch = pick({1, 1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 2, 5, 16, 31, 64, 67, 129, 150}), r.S = pick({0, 1, 3, 17, 64, 65, 100, 131, 150});
    r.D = pick({1, 3, 8, w / 2, w - 8, w - 1, w}), r.V = pick({1, 5, 16, w / 2, w - 8, w - 1, w});
    if (r.L * r.S * (r.D + r.V) * r.heads > 600000) r.batch = 1, r.heads = r.group;
    random_rest(r);
    if (chance(70)) random_general(r);
    r.nan_unseen = false;
    check<T>(r);
  }
}

// Queries have the first half of the features and keys the second, so that all scores are 0; lse is given as 0, so P is
// 1 where a key is seen and all sums are of small integers: equal to the last bit.
double unit_integer() { return static_cast<double>(static_cast<int>(generator() % 3) - 1); }
template <class T>
void check_exact(const Case& c) {
  if (turn++ % every) return;
  ++cases;
  const int64_t heads = c.batch * c.heads, kv = c.heads / c.group, half = c.D / 2;
  const auto draw = unit_integer;
  Operand<T> query({c.batch, c.heads, c.L, c.D}, c.query, draw), key({c.batch, kv, c.S, c.D}, c.key, draw);
  const Operand<T> value({c.batch, kv, c.S, c.V}, c.value, draw), output({c.batch, c.heads, c.L, c.V}, c.output, draw);
  const Operand<T> grad({c.batch, c.heads, c.L, c.V}, c.value, draw);
  const Operand<T> grad_query({c.batch, c.heads, c.L, c.D}, c.output, nullptr);
  const Operand<T> grad_key({c.batch, kv, c.S, c.D}, c.output, nullptr);
  const Operand<T> grad_value({c.batch, kv, c.S, c.V}, c.output, nullptr);
  const Operand<uint8_t> mask({c.batch, c.heads, c.L, c.S}, {c.mask_order, 0, c.mask_shift}, bool_draw);
  const auto clear = [](Operand<T>& x, int64_t positions, int64_t begin, int64_t end) {
    for (const int64_t at : x.offset)
      for (int64_t i = 0; i < positions; ++i)
        for (int64_t e = begin; e < end; ++e) x.data[at + i * x.stride[2] + e * x.stride[3]] = from_double<T>(0);
  };
  clear(query, c.L, half, c.D), clear(key, c.S, 0, half);
  Buffer<float> lse(heads * c.L), grad_lse(heads * c.L);
  for (int64_t i = 0; i < lse.size; ++i) lse.data[i] = 0, grad_lse.data[i] = static_cast<float>(unit_integer());

  AttentionBackwardParams b = {};
  AttentionParams& p = b.forward;
  p.dtype = dtype_of<T>, p.heads = heads, p.group = c.group;
  p.query_length = c.L, p.key_length = c.S, p.head_dim = c.D, p.value_dim = c.V;
  p.query = query.operand(), p.key = key.operand(), p.value = value.operand(), p.output = output.result();
  p.mask_type = c.mask;
  if (c.mask == AttentionMask::Bool) p.mask = mask.operand();
  p.scale = 1, p.dropout_p = c.dropout, p.philox_seed = 0x123456789abcdef0u + cases;
  p.first_shift = c.first, p.last_shift = c.last, p.lse = lse.data.get();
  b.grad_output = grad.operand(), b.grad_lse = grad_lse.data.get();
  b.grad_query = grad_query.result(), b.grad_key = grad_key.result(), b.grad_value = grad_value.result();

  std::vector<double> want_query(heads * c.L * c.D), want_key(c.batch * kv * c.S * c.D);
  std::vector<double> want_value(c.batch * kv * c.S * c.V);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t l = 0; l < c.L; ++l) {
      const int64_t g = h / c.group;
      std::vector<double> ones(c.S, 1), keeps(c.S, 1);
      if (c.dropout > 0) cpu::baseline::drop<double>(p, {h, l}, 0, c.S, ones.data(), keeps.data());
      double delta = -double{grad_lse.data[h * c.L + l]};
      for (int64_t n = 0; n < c.V; ++n) delta += grad.at(h, l, n) * output.at(h, l, n);
      for (int64_t k = 0; k < c.S; ++k) {
        if (k < l + c.first || k > l + c.last || (c.mask == AttentionMask::Bool && mask.at(h, l, k) < 0)) continue;
        double dP = 0;
        for (int64_t n = 0; n < c.V; ++n) {
          const double P = keeps[k] / (1 - c.dropout);
          dP += P * grad.at(h, l, n) * value.at(g, k, n);
          want_value[(g * c.S + k) * c.V + n] += P * grad.at(h, l, n);
        }
        for (int64_t e = 0; e < c.D; ++e) {
          want_query[(h * c.L + l) * c.D + e] += (dP - delta) * key.at(g, k, e);
          want_key[(g * c.S + k) * c.D + e] += (dP - delta) * query.at(h, l, e);
        }
      }
    }
  const Status status = attention_backward_planned(b, tile_of(c), nullptr, Memory(), nullptr);
  const auto compare = [&](const char* name, const Operand<T>& got, const std::vector<double>& want, int64_t rows,
                           int64_t cols) {
    for (int64_t i = 0; i < static_cast<int64_t>(want.size()); ++i) {
      const double x = got.at(i / (rows * cols), i / cols % rows, i % cols), y = to_double(from_double<T>(want[i]));
      if (x == y) continue;
      if (++failures <= 20)
        std::printf("FAILED exact %s %g for %g at %ld: dtype %d %s\n", name, x, y, i, static_cast<int>(p.dtype),
                    c.text().c_str());
      return;
    }
  };
  if (!status.ok()) ++failures, std::printf("FAILED: %s\n", status.message);
  compare("grad_query", grad_query, want_query, c.L, c.D);
  compare("grad_key", grad_key, want_key, c.S, c.D);
  compare("grad_value", grad_value, want_value, c.S, c.V);
}
template <class T>
void check_exact_at(int tile, int count) {
  const int w = kAttentionGradTiles[tile].width;
  for (int i = 0; i < count; ++i) {
    Case c;
    c.tile = tile, c.batch = pick({1, 2}), c.group = pick({1, 2, 3}), c.heads = c.group * pick({1, 2});
    c.L = pick({1, 20, 33, 64, 100, 131}), c.S = pick({1, 19, 32, 65, 128, 150});
    c.D = pick({2, 9, w - 8, w}), c.V = pick({1, 16, w - 1, w});
    if (c.L * c.S * (c.D + c.V) * c.heads > 600000) c.batch = 1, c.heads = c.group;
    random_rest(c);
    if (chance(50)) c.mask = AttentionMask::Bool, c.mask_order = pick({HeadsFirst, Apart, Transposed});
    if (chance(50)) c.dropout = 0.5;
    check_exact<T>(c);
  }
}

// What the dispatcher itself chooses.
template <class T>
void check_dispatch() {
  for (const int capability : {75, 80, 86, 90})
    for (int i = 0; i < 6; ++i) {
      host::machine.capability = capability;
      host::machine.shared_bytes = capability == 75   ? 65536
                                   : capability == 80 ? 166912
                                   : capability == 90 ? 232448
                                                      : 101376;
      Case r;
      r.planned = true, r.kernel = sizeof(T) > 2 ? AttentionKernel::Simt : AttentionKernel::Mma;
      r.group = pick({1, 2}), r.heads = r.group, r.L = pick({5, 40}), r.S = pick({9, 70});
      r.D = pick({8, 64, 80, 128, 200, 257}), r.V = chance(70) ? r.D : pick({16, 64, 129});
      random_rest(r), random_general(r);
      r.nan_unseen = false;
      check<T>(r);
    }
  host::machine = {};
}

void check_errors() {
  ++cases;
  AttentionBackwardParams b = {};
  b.forward.dtype = DType::Float32;
  const Status status = attention_backward_planned(b, 0, nullptr, {}, nullptr);
  if (status.ok() || !std::strstr(status.message, "a tile that does not fit"))
    ++failures, std::printf("FAILED: a tile that does not fit: '%s'\n", status.message);
}

}  // namespace

// attention_backward_test [every [part]]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string only = argc > 2 ? argv[2] : "";
  const auto part = [&](const std::string& name, const auto& run) {
    if (!only.empty() && only != name) return;
    const int before = cases;
    run();
    std::printf("attention backward %s: %d cases\n", name.c_str(), cases - before);
    std::fflush(stdout);
    host::machine = {};
  };
  part("errors", check_errors);
  part("simt",
       [] { check_simt<float>(60), check_simt<double>(60), check_simt<Float16>(15), check_simt<BFloat16>(15); });
  for (int tile = 0; tile < kAttentionGradTileCount; ++tile) {
    part("mma " + std::to_string(tile), [&] {
      host::machine.shared_bytes = 166912;
      check_mma<Float16>(tile, 35), check_mma<BFloat16>(tile, 20);
    });
    part("exact " + std::to_string(tile), [&] {
      host::machine.shared_bytes = 166912;
      check_exact_at<Float16>(tile, 15), check_exact_at<BFloat16>(tile, 15);
    });
  }
  part("dispatch", [] { check_dispatch<float>(), check_dispatch<Float16>(), check_dispatch<BFloat16>(); });
  part("orders", [] {
    for (const auto order : {host::Machine::Backward, host::Machine::Shuffled}) {
      host::machine.order = order, host::machine.shared_bytes = 166912;
      check_simt<float>(5);
      for (int tile = 0; tile < kAttentionGradTileCount; ++tile) check_exact_at<Float16>(tile, 3);
    }
  });
  std::printf("attention backward: %d cases, %d failed\n", cases, failures);
  std::fflush(stdout);
  return failures != 0;
}
