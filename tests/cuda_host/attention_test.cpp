// attention's CUDA kernels on the CPU, each of them against sums in double: every dtype, edge of a tile, layout, mask,
// window, group, split. Dropped keys are those of the CPU's kernels, by their own code.
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
  const Operand<T> output({c.batch, c.heads, c.L, c.V}, c.output, nullptr);
  const Operand<M> mask = mask_of<M>(c, draw_mask);
  Buffer<C> lse(heads * c.L), tops(heads * c.L), sums(heads * c.L);
  std::fill_n(lse.data.get(), lse.size, C(77));

  AttentionParams p = params_of(c, query, key, value, output, mask);
  p.lse = lse.data.get();
  if (c.sums) p.maximum = tops.data.get(), p.sum = sums.data.get();
  const auto complain = [&](const std::string& what) {
    if (++failures <= 20)
      std::printf("FAILED %s: dtype %d %s\n", what.c_str(), static_cast<int>(p.dtype), c.text().c_str());
  };

  const AttentionProblem problem = attention_problem(p);
  const int64_t together = c.packed ? c.group : 1;
  const AttentionPlan plan =
      attention_split({c.kernel, c.tile, static_cast<int>(together), 1, 1, 0}, problem, c.splits);
  const int64_t on_device = static_cast<int64_t>(p.philox_seed);
  AttentionParams given = p;
  if (c.seed_on_device) given.philox_seed = 1;
  const int64_t* const seed = c.seed_on_device ? &on_device : nullptr;
  const Status status = c.planned ? attention_forward(given, seed, Memory(), nullptr)
                                  : attention_forward_planned(given, plan, seed, Memory(), nullptr);
  if (!status.ok()) return complain(status.message);

  const double unit = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24, rounding = sizeof(T) == 2 ? epsilon<T> : 0;
  std::vector<double> s(c.S), weight(c.S);
  const double keep = c.dropout >= 1 ? 0 : 1 / (1 - c.dropout);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t l = 0; l < c.L; ++l) {
      const int64_t g = h / c.group;
      double top = -INFINITY, sum = 0, wrong = 0;
      for (int64_t k = 0; k < c.S; ++k) {
        double x = 0, size = 0;
        for (int64_t e = 0; e < c.D; ++e) {
          const double product = query.at(h, l, e) * key.at(g, k, e);
          x += product, size += std::fabs(product);
        }
        if (c.D > 0) x *= c.scale, size *= std::fabs(c.scale);
        if (c.softcap != 0) x = c.softcap * std::tanh(x / c.softcap);
        double added = 0;
        if (c.mask != AttentionMask::None) added = mask.at(h, l, k);
        x = masked_score<C>(x, added);
        if (k < l + c.first || k > l + c.last) x = -INFINITY;
        s[k] = x;
        if (x > -INFINITY && !swallows(added))
          wrong = std::max(
              wrong, unit * (size * (2 + std::sqrt(1.0 * c.D)) + 8 * std::fabs(x) + std::fabs(added) + 16 * c.softcap));
        top = std::max(top, x);
      }
      for (int64_t k = 0; k < c.S; ++k) sum += weight[k] = top > -INFINITY ? std::exp(s[k] - top) : 0;
      const int64_t at = h * c.L + l;
      const double unseen = c.nan_unseen && c.S > 0 ? NAN : 0;
      const double want_lse = sum > 0 ? top + std::log(sum) : c.nan_unseen && c.S > 0 ? NAN : -INFINITY;
      const double got_lse = lse.data[at];
      const bool same = got_lse == want_lse || (std::isnan(got_lse) && std::isnan(want_lse));
      if (!same &&
          !(std::fabs(got_lse - want_lse) <= 2 * wrong + 8 * unit * (2 + std::fabs(want_lse) + std::sqrt(1.0 * c.S))))
        return complain("lse " + std::to_string(got_lse) + " for " + std::to_string(want_lse));
      if (c.sums) {  // the largest score before the factor that is kept back, and its sum
        const bool bare = c.mask == AttentionMask::None && c.softcap == 0 && c.scale > 0;
        const double factor = bare ? c.scale : 1, again = tops.data[at] * factor + std::log(sums.data[at]);
        if (sum > 0 &&
            !(std::fabs(again - want_lse) <= 4 * wrong + 16 * unit * (2 + std::fabs(want_lse) + std::sqrt(1.0 * c.S))))
          return complain("maximum and sum");
        if (sum == 0 && !(sums.data[at] == 0 && std::isinf(tops.data[at]))) return complain("sums of an unseen row");
      }
      if (c.dropout > 0) {
        const cpu::baseline::Row row = {h, l};
        std::vector<double> kept_weight(c.S);
        cpu::baseline::drop<double>(p, row, 0, c.S, weight.data(), kept_weight.data());
        weight = kept_weight;
      }
      for (int64_t n = 0; n < c.V; ++n) {
        double want = sum > 0 ? 0 : unseen, size = 0, all = 0;
        for (int64_t k = 0; k < c.S && sum > 0; ++k) {
          const double v = value.at(g, k, n), product = weight[k] / sum * keep * v;
          want += product, size += std::fabs(product), all += std::fabs(v) / sum * keep;
        }
        const double got = output.at(h, l, n);
        const double allowed = size * (3 * wrong + rounding + 16 * unit + 2 * unit * std::sqrt(1.0 * c.S)) +
                               (sizeof(T) == 2 ? all * 0x1p-25 : 0) + rounding * std::fabs(want) +
                               (sizeof(T) == 2 ? 0x1p-25 : 0);
        const bool equal = got == want || (std::isnan(got) && std::isnan(want));
        if (!equal && !(std::fabs(got - want) <= allowed))
          return complain("output " + std::to_string(got) + " for " + std::to_string(want) + ", allowed " +
                          std::to_string(allowed) + " at " + std::to_string(h) + " " + std::to_string(l) + " " +
                          std::to_string(n));
      }
    }
}

template <class T>
void check(const Case& c) {
  with_mask_type<T>(c, [&](auto element, auto draw) { check_with_mask<T, decltype(element)>(c, draw); });
}

// ---- cases ----------------------------------------------------------------------------------------------------------

template <class T>
void check_mma(int tile, int count) {
  const AttentionTile& t = kAttentionTiles[tile];
  const int w = t.width, narrower = w == 32 ? 0 : w <= 128 && w != 64 && !t.general ? w - 32 : w / 2;
  Case c;
  c.tile = tile;
  // Edges: rows, keys and features around the tile, one at a time.
  for (const int L : {1, 15, 16, 17, t.rows - 1, t.rows, t.rows + 1})
    for (const int S : {0, 1, t.keys - 1, t.keys, t.keys + 1, 3 * t.keys - 5}) {
      if (L > 17 && S > t.keys + 1 && every > 1) continue;
      c.L = L, c.S = S, c.D = w, c.V = w, c.last = L % 2 ? kAttentionNoLimit : S - L;
      check<T>(c);
    }
  for (int D = narrower + 1; D <= w; D += w > 96 ? 13 : 5)
    c.L = 18, c.S = 2 * t.keys + 3, c.D = D, c.V = w - (D - narrower - 1), c.last = 0, check<T>(c);
  c.D = 0, c.V = 1, check<T>(c), c.D = 1, c.V = 0, check<T>(c);
  c.D = c.V = w, c.sums = true;
  for (const int splits : {1, 2})
    if (t.general) c.splits = splits, with_hidden_rows(c, check<T>);
  for (int i = 0; i < count; ++i) {
    Case r;
    r.tile = tile;
    r.batch = pick({1, 1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 2, 5, 7, 16, 31, 64, 67, 129}), r.S = pick({0, 1, 3, 17, 64, 65, 100, 131, 200});
    r.D = pick({1, 3, w / 2, w - 8, w - 1, w, w}), r.V = pick({1, 5, w / 2, w - 8, w - 1, w, w});
    if (t.rows == 16 || chance(30)) r.packed = true, r.L = pick({1, 1, 2, 3, 8, 19});
    r.splits = pick({1, 1, 2, 3});
    random_rest(r);
    if (t.general) random_general(r);
    check<T>(r);
  }
}

template <class T>
void check_simt(int tile, int count) {
  Case c;
  c.kernel = AttentionKernel::Simt, c.tile = tile;
  const int rows = kAttentionSimtRows[tile];
  for (const int L : {1, 3, rows - 1, rows, rows + 1})
    for (const int S : {0, 1, 63, 64, 65, 131}) c.L = L, c.S = S, c.D = 9, c.V = 7, check<T>(c);
  for (const int D : {0, 1, 7, 8, 9, 16, 17, 300}) c.L = 5, c.S = 70, c.D = D, c.V = 65, check<T>(c);
  for (const int V : {0, 1, 63, 64, 65, 127, 128, 129, 300}) c.D = 8, c.V = V, check<T>(c);
  c.L = 7, c.V = 8, c.sums = true;
  for (const int splits : {1, 2}) c.splits = splits, with_hidden_rows(c, check<T>);
  for (int i = 0; i < count; ++i) {
    Case r;
    r.kernel = AttentionKernel::Simt, r.tile = tile;
    r.batch = pick({1, 1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 2, 5, 16, 31, 64, 67}), r.S = pick({0, 1, 3, 17, 64, 65, 100, 131, 200});
    r.D = pick({1, 3, 8, 17, 32, 64}), r.V = pick({1, 5, 16, 64, 67});
    if (chance(30)) r.packed = true, r.L = pick({1, 1, 2, 3, 8, 19});
    r.splits = pick({1, 1, 2, 3});
    random_rest(r), random_general(r);
    check<T>(r);
  }
}

// An operand that TMA can describe: features next to each other, rows and heads on 16 bytes, whatever its width.
Placed tiled_placed(int64_t width) {
  const int gap = static_cast<int>((8 - width % 8) % 8);
  return {pick({HeadsFirst, PositionsFirst}), gap + pick({0, 0, 8, 24}), pick({0, 0, 8, 16})};
}
void random_tiled(Case& c) {
  random_rest(c);
  c.query = tiled_placed(c.D), c.key = tiled_placed(c.D), c.value = tiled_placed(c.V);
}

template <class T>
void check_wgmma_edges(int tile) {
  const AttentionWgmmaTile& t = kAttentionWgmmaTiles[tile];
  const int w = t.width, k = t.keys;
  const auto run = [](Case c) {
    c.kernel = AttentionKernel::Wgmma;
    c.query = tiled_placed(c.D), c.key = tiled_placed(c.D), c.value = tiled_placed(c.V);
    check<T>(c);
  };
  Case c;
  c.tile = tile, c.D = c.V = w, c.sums = true;
  // Edges: queries and keys around the tiles; as many steps as the ring has slots and more.
  for (const int L : {1, 63, 64, 65, 127, 128, 129})
    for (const int S : {1, k - 1, k, k + 1, 3 * k - 5}) {
      if (L != 65 && L != 129 && S != k + 1 && every > 1) continue;
      c.L = L, c.S = S, c.last = L % 4 == 1 ? S - L : kAttentionNoLimit, run(c);
    }
  c.L = 70, c.S = (t.slots + 1) * k - 3, c.last = kAttentionNoLimit, run(c);
  c.first = -3, c.last = 3, c.nan_unseen = true, run(c);  // most rows see nothing of most tiles
  c.first = -kAttentionNoLimit, c.L = 140, c.S = k + 3;
  for (const int last : {-1, -65, -129, -300}) c.last = last, run(c);  // rows that see no key, whole tiles of them
  // Features: every number of chunks, one past and one before, queries and values of different widths.
  c.L = 66, c.S = k + 9, c.last = 0;
  for (int D = 1; D <= w; D += D == 1 ? 6 : w / 8 + (D % 3 == 0)) c.D = D, c.V = w - D + 1, run(c);
  for (const int D : {w - 1, w - 8, w - 24}) c.D = D, c.V = D, run(c);
  c.D = w;
  for (const int V : {1, 8, w - 3, w}) c.V = V, run(c);
  // More tiles than blocks: every block takes several, there and back, in sections of heads.
  for (const int multiprocessors : {1, 3}) {
    host::machine.multiprocessors = multiprocessors;
    c.batch = 2, c.heads = 3, c.group = 3, c.L = 131, c.S = 131, c.D = c.V = w == 64 ? 40 : w, c.last = 0, run(c);
    c.last = kAttentionNoLimit, run(c);
  }
}

template <class T>
void check_wgmma(int tile, int count) {
  const AttentionWgmmaTile& t = kAttentionWgmmaTiles[tile];
  const int w = t.width, k = t.keys;
  for (int i = 0; i < count; ++i) {
    Case r;
    r.kernel = AttentionKernel::Wgmma, r.tile = tile;
    host::machine.multiprocessors = pick({1, 2, 5, 132});
    r.batch = pick({1, 1, 2}), r.group = pick({1, 2, 3}), r.heads = r.group * pick({1, 2});
    r.L = pick({1, 16, 64, 67, 129, 200}), r.S = pick({1, 3, 64, 65, 129, 200, 3 * k});
    r.D = pick({1, 8, w / 2, w - 8, w - 1, w, w}), r.V = pick({1, 5, w / 2, w - 8, w - 1, w, w});
    if (r.heads * r.batch > 3) r.L = std::min<int64_t>(r.L, 130), r.S = std::min<int64_t>(r.S, 130);
    r.splits = pick({1, 1, 2, 3});
    random_tiled(r);
    check<T>(r);
  }
}

// A way in which heads can lie that TMA takes or does not, and what the dispatcher makes of it.
void check_tiled() {
  const auto lies = [](const Case& c, bool tiled) {
    const auto of = [&](const Placed& placed, int64_t heads, int64_t L, int64_t D) {
      return Operand<Float16>({c.batch, heads, L, D}, placed, normal);
    };
    const auto query = of(c.query, c.heads, c.L, c.D), key = of(c.key, c.heads, c.S, c.D),
               value = of(c.value, c.heads, c.S, c.V), output = of(c.output, c.heads, c.L, c.V);
    const AttentionParams p = params_of(c, query, key, value, output, mask_of<Float16>(c, mask_draw));
    ++cases;
    const AttentionKernel kernel = attention_forward_plan(p).kernel;
    if ((kernel == AttentionKernel::Wgmma) != tiled)
      ++failures, std::printf("FAILED the kernel is %d: %s\n", static_cast<int>(kernel), c.text().c_str());
  };
  Case c;
  c.batch = 2, c.heads = 2, c.L = 64, c.S = 70, c.D = c.V = 64;
  lies(c, true);
  for (Placed Case::* operand : {&Case::query, &Case::key, &Case::value}) {
    for (const int order : {HeadsFirst, PositionsFirst, Apart, Transposed})
      for (const int gap : {0, 1, 4, 8})
        for (const int shift : {0, 4, 8}) {
          Case r = c;
          r.*operand = {order, gap, shift};
          lies(r, order <= PositionsFirst && gap % 8 == 0 && shift % 8 == 0);
        }
  }
  Case r = c;
  r.softcap = 3, lies(r, false);
  r = c, r.scale = -1, lies(r, false);
  r = c, r.L = 63, lies(r, false);
  r = c, r.D = r.V = 256, lies(r, true);
  r = c, r.V = 264, lies(r, false);
  r = c, r.D = 44, lies(r, false);
  r = c, r.S = 0, lies(r, false);
  host::machine.capability = 80, lies(c, false), host::machine.capability = 100, lies(c, false);
  host::machine.capability = 90;
}

// Heads of any leading dimensions: those that repeat cost no axis of the map, more than three others are too many.
void check_tiled_heads() {
  using Dims = std::vector<std::array<int64_t, 2>>;
  const std::pair<Dims, bool> lists[] = {{{{3, 8}}, true},
                                         {{{2, 0}, {3, 8}}, true},
                                         {{{2, 40}, {3, 0}, {2, 8}}, true},
                                         {{{2, 8}, {2, 16}, {3, 80}}, true},
                                         {{{2, 320}, {2, 0}, {3, 40}, {2, 0}, {2, 16}}, true},
                                         {{{2, 640}, {2, 72}, {2, 24}, {2, 8}}, false},
                                         {{{2, 40}, {3, 12}}, false}};
  for (const auto& [dims, tiled] : lists) {
    std::vector<int64_t> at = {0};
    for (const auto& [size, stride] : dims) {
      std::vector<int64_t> next;
      for (const int64_t base : at)
        for (int64_t i = 0; i < size; ++i) next.push_back(base + i * stride);
      at = next;
    }
    const int64_t heads = static_cast<int64_t>(at.size()), L = 64;
    alignas(16) BFloat16 data[1024];
    for (BFloat16& x : data) x = from_double<BFloat16>(small_integer());
    std::vector<BFloat16> output(heads * L * 8);
    std::vector<int64_t> out(heads), zero(heads);
    for (int64_t h = 0; h < heads; ++h) out[h] = h * L * 8;
    AttentionParams p = {};
    p.dtype = DType::BFloat16, p.heads = heads, p.group = 1, p.query_length = L, p.key_length = 1,
    p.head_dim = p.value_dim = 8;
    p.query = p.key = {data, zero.data(), 8, 1}, p.value = {data, at.data(), 8, 1};
    p.output = {output.data(), out.data(), 8};
    p.scale = 1, p.first_shift = -kAttentionNoLimit, p.last_shift = kAttentionNoLimit;
    ++cases;
    const Status status = attention_forward(p, nullptr, Memory(), nullptr);
    bool right = status.ok() && (attention_forward_plan(p).kernel == AttentionKernel::Wgmma) == tiled;
    for (int64_t i = 0; i < heads * L * 8; ++i)  // one key: its value
      right &= to_double(output[i]) == to_double(data[at[i / (L * 8)] + i % 8]);
    if (!right) ++failures, std::printf("FAILED heads that TMA describes: %s\n", status.message);
  }
}

// Without a driver that encodes tensor maps, or without sm_90a in the build: the kernel that needs neither.
void check_falls_back() {
  host::machine.multiprocessors = 20;
  for (const int missing : {0, 1, 2}) {
    host::machine.no_driver = missing == 1, host::machine.no_body = missing == 2;
    Case c;
    c.planned = true, c.L = 70, c.S = 1100, c.D = c.V = 64;  // in splits
    const int64_t before = host::launches;
    check<BFloat16>(c);
    if (every == 1 && host::launches - before != (missing ? 1 : 2))
      ++failures, std::printf("FAILED %d launches\n", static_cast<int>(host::launches - before));
  }
  host::machine.no_driver = host::machine.no_body = false;
}

// What the dispatcher itself chooses, on several chips.
template <class T>
void check_dispatch() {
  for (const int capability : {75, 80, 86, 90})
    for (int i = 0; i < 12; ++i) {
      host::machine.capability = capability, host::machine.multiprocessors = pick({1, 4, 20});
      host::machine.shared_bytes = capability == 75   ? 65536
                                   : capability == 80 ? 166912
                                   : capability == 90 ? 232448
                                                      : 101376;
      if (capability < 80 && std::is_same_v<T, Float16>)
        continue;  // the kernel text is that of sm_80: more shared memory
      Case r;
      r.planned = true;
      r.batch = pick({1, 2}), r.group = pick({1, 2, 8}), r.heads = r.group * pick({1, 2});
      r.L = pick({1, 1, 2, 8, 9, 40, 70}), r.S = pick({0, 5, 64, 300, 1100});
      r.D = pick({8, 40, 64, 80, 128, 200, 257}), r.V = chance(70) ? r.D : pick({16, 64, 129});
      if (r.L * r.S * r.D * r.heads > 200000) r.batch = 1, r.heads = r.group, r.S = std::min<int64_t>(r.S, 300);
      random_rest(r);
      if (chance(50)) random_general(r);
      check<T>(r);
    }
  host::machine = {};
}

void expect_message(const Status& status, const char* words) {
  ++cases;
  if (status.ok() || std::string(status.message).find(words) == std::string::npos)
    ++failures, std::printf("FAILED: '%s' is not said but '%s'\n", words, status.message);
}
void check_errors() {
  AttentionParams p = {};
  float memory[64] = {};
  std::vector<int64_t> at(100);
  p.dtype = DType::Float32, p.heads = 1, p.group = 1, p.query_length = 1, p.key_length = 1000,
  p.head_dim = p.value_dim = 1;
  p.query = p.key = p.value = {memory, at.data(), 0, 1}, p.output = {memory, at.data(), 1};
  p.scale = 1, p.first_shift = -kAttentionNoLimit, p.last_shift = kAttentionNoLimit;
  expect_message(attention_forward_planned(p, {AttentionKernel::Mma, 0, 1, 1, 1000, 0}, nullptr, Memory(), nullptr),
                 "attention_mma_kernel heads=1 group=1 queries=1 keys=1000 head_dim=1 value_dim=1 bytes=4 tile=0 "
                 "splits=1: a tile that does not fit");
  p.heads = 7, p.key_length = 3;
  const int64_t odd[] = {0, 1, 3, 4, 8, 9, 27};
  p.query.offset = odd;
  expect_message(attention_forward(p, nullptr, Memory(), nullptr), "leading dimensions that six strides cannot tell");
  p.query.offset = at.data(), p.key_length = int64_t{1} << 31;
  expect_message(attention_forward(p, nullptr, Memory(), nullptr), "a dimension above 2^30");
}

// Leading dimensions of any number and broadcast, told by the list alone.
void check_leading() {
  for (const std::vector<std::array<int64_t, 2>>& dims :
       std::vector<std::vector<std::array<int64_t, 2>>>{{{3, 4}},
                                                        {{2, 0}, {3, 4}},
                                                        {{2, 40}, {3, 0}, {2, 4}},
                                                        {{2, 8}, {2, 16}, {3, 4}},
                                                        {{5, 0}, {1, 7}, {2, 4}, {3, 8}},
                                                        {{2, 100}, {2, 4}, {2, 70}, {2, 8}, {2, 33}, {2, 1}}}) {
    std::vector<int64_t> at = {0};
    for (const auto& [size, stride] : dims) {
      std::vector<int64_t> next;
      for (const int64_t base : at)
        for (int64_t i = 0; i < size; ++i) next.push_back(base + i * stride);
      at = next;
    }
    const int64_t heads = static_cast<int64_t>(at.size());
    std::vector<float> values(400), output(heads, NAN);
    for (float& v : values) v = static_cast<float>(normal());
    std::vector<int64_t> out(heads), zero(heads);
    for (int64_t h = 0; h < heads; ++h) out[h] = h;
    AttentionParams p = {};
    p.dtype = DType::Float32, p.heads = heads, p.group = 1,
    p.query_length = p.key_length = p.head_dim = p.value_dim = 1;
    p.query = p.key = {values.data(), zero.data(), 1, 1}, p.value = {values.data(), at.data(), 1, 1};
    p.output = {output.data(), out.data(), 1};
    p.scale = 1, p.first_shift = -kAttentionNoLimit, p.last_shift = kAttentionNoLimit;
    ++cases;
    const Status status = attention_forward(p, nullptr, Memory(), nullptr);
    bool right = status.ok();
    for (int64_t h = 0; h < heads; ++h) right &= output[h] == values[at[h]];  // one key: its value
    if (!right) ++failures, std::printf("FAILED leading dimensions: %s\n", status.message);
  }
}

}  // namespace

// attention_test [every [part]]
int main(int argc, char** argv) {
  every = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string only = argc > 2 ? argv[2] : "";
  const auto part = [&](const char* name, const auto& run) {
    if (!only.empty() && only != name) return;
    const int before = cases;
    run();
    std::printf("attention %s: %d cases\n", name, cases - before);
    std::fflush(stdout);
  };
  part("leading", check_leading);
  part("errors", check_errors);
  part("simt", [] {
    for (const int tile : {0, 1})
      check_simt<float>(tile, 40), check_simt<double>(tile, 40), check_simt<Float16>(tile, 15),
          check_simt<BFloat16>(tile, 15);
  });
  part("mma", [] {
    for (int tile = 0; tile < kAttentionTileCount; ++tile) check_mma<Float16>(tile, 25), check_mma<BFloat16>(tile, 15);
  });
  part("orders", [] {
    for (const auto order : {host::Machine::Backward, host::Machine::Shuffled}) {
      host::machine.order = order;
      for (const int tile : {1, 6, 9}) check_mma<Float16>(tile, 2);
      check_simt<float>(0, 2);
    }
    host::machine = {};
  });
  part("wgmma", [] {
    host::machine.capability = 90, host::machine.shared_bytes = 232448;
    check_tiled(), check_tiled_heads(), check_falls_back();
    for (int tile = 0; tile < kAttentionWgmmaTileCount; ++tile)
      check_wgmma_edges<Float16>(tile), check_wgmma<Float16>(tile, 12), check_wgmma<BFloat16>(tile, 12);
    for (const auto order : {host::Machine::Backward, host::Machine::Shuffled}) {
      host::machine.order = order;
      for (int tile = 0; tile < kAttentionWgmmaTileCount; ++tile) check_wgmma<Float16>(tile, 4);
    }
    host::machine = {};
  });
  part("dispatch", [] {
    check_dispatch<float>(), check_dispatch<double>(), check_dispatch<Float16>(), check_dispatch<BFloat16>();
  });
  std::printf("attention: %d cases, %d failed\n", cases, failures);
  std::fflush(stdout);
  return failures != 0;
}
