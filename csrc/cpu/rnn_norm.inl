// Layer norm inside a recurrent layer: of the gates' two products and of LSTM's cell. Formulas: fastnn/rnn.h.
//
// Forward, a row at a time while it is in L1: the mean, then the variance of what is left (two passes: a difference of
// large sums would lose the digits), then the scaled values. Rows of z are as rnn.inl has them; γ lies in the same order,
// [panels][NV][lanes], zero beyond the units there are. The bias is added with the input's part, as without layer norm.
//
// Backward: with y = γ ẑ, ẑ = LN(z), a row's gradient is 1/std (g - mean(g) - ẑ mean(g ẑ)), g = γ dy. Training keeps ẑ and
// 1/std; of the cell, which it keeps anyway, mean and 1/std.
//
// A row costs some three passes over its gates: little beside a product, whose row is read H times.
#pragma once

#include "cpu/activation.inl"
#include "cpu/rnn_pack.inl"

namespace fastnn::cpu::FASTNN_ISA {

// Sets lanes from `count` (any number) on to zero.
template <class C>
FASTNN_INLINE Vec<C> rnn_first_lanes(Vec<C> x, int64_t count) {
  const auto lanes = []<int... LANE>(std::integer_sequence<int, LANE...>) __attribute__((always_inline)) {
    return Vec<Bits<C>>{LANE...};
  }(std::make_integer_sequence<int, kLanes<C>>{});
  return select(lanes < static_cast<Bits<C>>(std::clamp<int64_t>(count, 0, kLanes<C>)), x, zero<C>());
}

// Calls f(i, lanes) for the vectors of `count` elements, all of whose lanes but the last one's are a constant.
template <class C, class F>
FASTNN_INLINE void rnn_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) f(i, int64_t{kLanes<C>});
  if (i < count) f(i, count - i);
}

// Mean and 1/std of the `values` of a row: `units`, UNITS to a panel, each panel STRIDE vectors of which NV count, the last
// of them at LAST.
template <class C>
struct RnnStatistics {
  C mean, inverse;
};
template <class C, int NV, int STRIDE, int LAST, int UNITS>
FASTNN_INLINE RnnStatistics<C> rnn_statistics(const C* row, int64_t units, int64_t values) {
  constexpr int L = kLanes<C>;
  const int64_t whole = units / UNITS, rest = units % UNITS;
  const auto total = [&](const auto& term) __attribute__((always_inline)) {
    Vec<C> sum[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] = zero<C>();
    const C* at = row;
    for (int64_t n = 0; n < whole; ++n, at += STRIDE * L)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[v] = term(load(at + (v < NV - 1 ? v : LAST) * L), sum[v], L);
    if (rest)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum[v] = term(load(at + (v < NV - 1 ? v : LAST) * L), sum[v], UNITS == NV * L ? rest - v * L : rest);
#pragma GCC unroll 4
    for (int v = 1; v < NV; ++v) sum[0] += sum[v];
    return reduce_add<C>(sum[0]);
  };
  const C mean = total([](Vec<C> x, Vec<C> sum, int64_t count) __attribute__((always_inline)) {
                   return sum + (count == L ? x : rnn_first_lanes<C>(x, count));
                 }) /
                 C(values);
  const C square = total([&](Vec<C> x, Vec<C> sum, int64_t count) __attribute__((always_inline)) {
    const Vec<C> away = count == L ? x - mean : rnn_first_lanes<C>(x - mean, count);
    return fma(away, away, sum);
  });
  return {mean, C(1) / std::sqrt(square / C(values) + C(kRnnNormEps))};
}

template <class C, int G>
struct RnnNorm {
  using Panels = RnnPanels<C, G>;
  static constexpr int L = Panels::L, NV = Panels::NV, SLOTS = Panels::SLOTS, UNITS = Panels::UNITS;

  const int64_t H;
  const int64_t panels = (H + UNITS - 1) / UNITS;

  // ---- forward -------------------------------------------------------------------------------------------------------

  // Of one direction: γ_ih and γ_hh [panels][NV][lanes]; LSTM γ_c and β_c [panels][lanes]; zeros [panels][SLOTS][lanes].
  int64_t hh() const { return panels * NV * L; }
  int64_t c() const { return panels * NV * L * 2; }
  int64_t zeros() const { return c() + (G == 4 ? panels * L * 2 : 0); }
  int64_t size() const { return Panels::line(zeros() + panels * SLOTS * L); }

  void lay_out(DType dtype, const RnnWeights& w, C* to) const {
    std::fill(to, to + size(), C(0));
    for (const void* gamma : {w.norm_ih, w.norm_hh})
      for (int64_t n = 0; n < panels; ++n)
        for (int v = 0; v < NV; ++v, to += L) {
          const int64_t u = Panels::unit(n, v);
          if (u < H) rnn_widen(dtype, rnn_at(gamma, dtype, Panels::gate(v) * H + u), std::min<int64_t>(H - u, L), to);
        }
    if (G == 4) {
      rnn_widen(dtype, w.norm_c_weight, H, to);
      rnn_widen(dtype, w.norm_c_bias, H, to + panels * L);
    }
  }

  // z = γ LN(z) + bias for the input's part of a row, [panels][SLOTS][lanes]; kept: LN(z) [G·H] and 1/std, or null.
  __attribute__((noinline)) void input(C* z, const C* gamma, const C* bias, C* kept, C* inverse) const {
    const RnnStatistics<C> s = rnn_statistics<C, NV, SLOTS, NV - 1, UNITS>(z, H, G * H);
    if (kept) *inverse = s.inverse;
    for (int64_t n = 0; n < panels; ++n, z += SLOTS * L, bias += SLOTS * L, gamma += NV * L) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec<C> hat = live((load(z + v * L) - s.mean) * s.inverse, n, v);
        if (kept) keep(kept, n, v, hat);
        store(z + v * L, fma(hat, load(gamma + v * L), load(bias + v * L)));
      }
      if (G == 3) store(z + 3 * L, load(bias + 3 * L));
    }
  }

  // z += γ LN(product) for the state's part of a row, [panels][SLOTS][lanes], and zeros to the product.
  __attribute__((noinline)) void state(C* product, const C* gamma, C* z, C* kept, C* inverse) const {
    const RnnStatistics<C> s = rnn_statistics<C, NV, SLOTS, G == 3 ? 3 : NV - 1, UNITS>(product, H, G * H);
    if (kept) *inverse = s.inverse;
    for (int64_t n = 0; n < panels; ++n, z += SLOTS * L, product += SLOTS * L, gamma += NV * L) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int slot = G == 3 && v == 2 ? 3 : v;
        const Vec<C> hat = live((load(product + slot * L) - s.mean) * s.inverse, n, v);
        if (kept) keep(kept, n, v, hat);
        store(product + slot * L, zero<C>());
        store(z + slot * L, fma(hat, load(gamma + v * L), load(z + slot * L)));
      }
    }
  }

  // Gates, cell and m = σ(o) tanh(γ_c LN(c) + β_c) of a row of LSTM; z's o becomes σ(o). kept: as rnn_kept, or null.
  __attribute__((noinline)) void cell(C* z, const C* gamma, C* c, C* m, C* kept, C* statistics) const {
    for (int64_t n = 0; n < panels; ++n) {
      C* g = z + n * SLOTS * L;
      const Vec<C> i = vsigmoid<C>(load(g)), f = vsigmoid<C>(load(g + L)), o = vsigmoid<C>(load(g + 3 * L));
      const Vec<C> fresh = vtanh(load(g + 2 * L)), next = fma(f, load(c + n * L), i * fresh);
      store(g + 3 * L, o);
      store(c + n * L, next);
      if (!kept) continue;
      const Vec<C> values[] = {i, f, fresh, o, next};
      for (int slot = 0; slot < 5; ++slot) store_first(kept + slot * H + n * L, values[slot], H - n * L);
    }
    const RnnStatistics<C> s = rnn_statistics<C, 1, 1, 0, L>(c, H, H);
    if (kept) statistics[0] = s.mean, statistics[1] = s.inverse;
    for (int64_t n = 0; n < panels; ++n) {
      const Vec<C> hat = (load(c + n * L) - s.mean) * s.inverse;
      store(m + n * L,
            load(z + (n * SLOTS + 3) * L) * vtanh(fma(hat, load(gamma + n * L), load(gamma + (panels + n) * L))));
    }
  }

  // Lanes of units that there are; the others hold anything.
  FASTNN_INLINE Vec<C> live(Vec<C> x, int64_t panel, int v) const {
    return panel + 1 < panels ? x : rnn_first_lanes<C>(x, H - Panels::unit(panel, v));
  }
  FASTNN_INLINE void keep(C* kept, int64_t panel, int v, Vec<C> hat) const {
    const int64_t u = Panels::unit(panel, v);
    if (u < H) store_first(kept + Panels::gate(v) * H + u, hat, H - u);
  }

  // ---- backward ------------------------------------------------------------------------------------------------------

  // The gradient of a product of a row from that of its normalised gates, dy, which it may overwrite. hat and γ are
  // [G·H], and so are dy and `to` but for the last gate, which is at last · H.
  __attribute__((noinline)) void gates_backward(const C* dy, const C* hat, const C* gamma, C inverse, int last,
                                                C* to) const {
    const auto scaled = [&](int g, int64_t u, int64_t n) __attribute__((always_inline)) {
      return load_first(dy + (g < G - 1 ? g : last) * H + u, n) * load_first(gamma + g * H + u, n);
    };
    Vec<C> sum[G], along[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sum[g] = along[g] = zero<C>();
    rnn_vectors<C>(H, [&](int64_t u, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const Vec<C> x = scaled(g, u, n);
        sum[g] += x;
        along[g] = fma(x, load_first(hat + g * H + u, n), along[g]);
      }
    });
#pragma GCC unroll 4
    for (int g = 1; g < G; ++g) sum[0] += sum[g], along[0] += along[g];
    const C mean = reduce_add<C>(sum[0]) / C(G * H), share = reduce_add<C>(along[0]) / C(G * H);
    rnn_vectors<C>(H, [&](int64_t u, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        store_first(to + (g < G - 1 ? g : last) * H + u,
                    (scaled(g, u, n) - mean - load_first(hat + g * H + u, n) * share) * inverse, n);
    });
  }

  // What a row of LSTM's cell and output gate get from dm, the gradient of m: adds to dc, sets the gate's gradient, that of
  // the normalised cell, du, and m where it is wanted. gamma, beta: [H].
  __attribute__((noinline)) void cell_backward(const C* kept, const C* statistics, const C* gamma, const C* beta,
                                               const C* dm, C* dc, C* d_o, C* du, C* m) const {
    const C center = statistics[0], inverse = statistics[1];
    const auto normal = [&](int64_t u, int64_t n) __attribute__((always_inline)) {
      return (load_first(kept + 4 * H + u, n) - center) * inverse;
    };
    Vec<C> sum = zero<C>(), along = zero<C>();
    rnn_vectors<C>(H, [&](int64_t u, int64_t n) __attribute__((always_inline)) {
      const Vec<C> o = load_first(kept + 3 * H + u, n), g = load_first(dm + u, n);
      const Vec<C> scale = load_first(gamma + u, n), hat = normal(u, n);
      const Vec<C> th = vtanh(fma(hat, scale, load_first(beta + u, n)));
      const Vec<C> grad = g * o * (C(1) - th * th);
      store_first(d_o + u, g * th * o * (C(1) - o), n);
      store_first(du + u, grad, n);
      if (m) store_first(m + u, o * th, n);
      sum += grad * scale;
      along = fma(grad * scale, hat, along);
    });
    const C mean = reduce_add<C>(sum) / C(H), share = reduce_add<C>(along) / C(H);
    rnn_vectors<C>(H, [&](int64_t u, int64_t n) __attribute__((always_inline)) {
      const Vec<C> x = load_first(du + u, n) * load_first(gamma + u, n);
      store_first(dc + u, fma(x - mean - normal(u, n) * share, splat(inverse), load_first(dc + u, n)), n);
    });
  }
};

}  // namespace fastnn::cpu::FASTNN_ISA
