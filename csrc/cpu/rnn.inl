// Recurrent layers on the CPU: a whole sequence of a layer in one call. Formulas: fastnn/rnn.h.
//
// For a block of steps at a time, so that it stays in L2: z = x W_ihᵀ + b of all rows, one matrix product. Then step by
// step z += h W_hhᵀ, and gates, cells and h from z while it is in L1. Weights are packed once for the sequence, gates of
// a vector of units next to each other (rnn_pack.inl), by one step a panel at a time; few rows do not repay that and use
// dot products (rnn_packs).
// Frozen weights come packed.
// z of a row: [panel][slots][lanes], slots: RNN two vectors of units; LSTM i f g o; GRU r z n and apart W_hn h + b_hn.
//
// With layer norm (rnn_norm.inl) z is x W_ihᵀ alone until its step comes, and h W_hhᵀ goes to memory of its own first, the
// same tiles adding to zeros. Zoneout mixes the new h with the last before it is written.
//
// Threads: a thread keeps to its rows or its units for the whole sequence, from x to h; where units are split, h is
// exchanged with one barrier a step. State is kept in compute type; two buffers, read one and write the other.
//
// Bound at batch 1 by loading W_hh from L1/L2 each step, from some MR rows on by the FMA units.
#pragma once

#include "cpu/activation.inl"
#include "cpu/barrier.h"
#include "cpu/rnn_kernels.h"
#include "cpu/rnn_norm.inl"
#include "cpu/rnn_pack.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class C, int G>
struct RnnForward {
  using Panels = RnnPanels<C, G>;
  static constexpr int L = Panels::L, NV = Panels::NV, SLOTS = Panels::SLOTS, UNITS = Panels::UNITS;
  static constexpr int PNV = Panels::PNV, PUNITS = Panels::PUNITS;

  const RnnParams& p;
  const int64_t H = p.hidden_size, P = p.state_size, I = p.input_size, B = p.batch;
  const bool given = p.weights[0].packed != nullptr;  // frozen
  const bool packs = given || rnn_packs(p), project = p.weights[0].weight_hr != nullptr;
  const bool panels_ih = packs && !(given && rnn_streams(p, p.rows, I));
  const bool panels_hh = packs && !(given && rnn_streams(p, B, P));
  // Of one step each panel is needed once: it is packed where it is used, and stays in the nearest caches.
  const bool passing = packs && !given && p.steps == 1 && !project;
  const Panels layout{I, H, P, packs && !passing, project};
  const int64_t panels = layout.panels, ppanels = layout.ppanels;
  const int64_t Hs = panels * UNITS, Ps = project ? ppanels * PUNITS : Hs;  // padded row of c, m and of h
  const bool normed = p.normed(), zoned = p.zoned();
  const RnnNorm<C, G> norm{H};
  const int64_t kept = rnn_kept(p), reserved = rnn_reserved(p);
  const RnnRows at{p};

  struct Direction {
    C* memory;                           // to be packed into, null where the weights came packed
    const C *w_ih, *w_hh, *w_hr, *bias;  // panels
    C* norms;                            // with layer norm, as RnnNorm lays them out
    const C* start;                      // what z begins with: bias, or with layer norm zeros
    C *h[2], *c, *m;                     // [B][Ps], [B][Hs], [B][Hs]: σ(o) tanh(c) before the projection
    Barrier barrier;
  };
  Direction sides[2] = {};

  static int64_t unit(int64_t panel, int v) { return Panels::unit(panel, v); }
  static int gate(int v) { return Panels::gate(v); }

  void run() {
    const int64_t weights = given ? 0 : Panels::line(layout.size);
    const int64_t norms = normed ? norm.size() : 0;
    const int64_t each = weights + norms + Panels::line(B * (2 * Ps + Hs * (G == 4) + Hs * project));
    Scratch<C> memory(each * p.directions);
    for (int d = 0; d < p.directions; ++d) {
      Direction& s = sides[d];
      C* next = memory + d * each;
      const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
      s.memory = given ? nullptr : take(weights);
      s.w_ih = given ? static_cast<const C*>(p.weights[d].packed) : s.memory;
      s.w_hh = s.w_ih + layout.w_hh, s.w_hr = s.w_ih + layout.w_hr, s.bias = s.w_ih + layout.bias;
      s.norms = take(norms);
      s.start = normed ? s.norms + norm.zeros() : s.bias;
      s.h[0] = take(B * Ps), s.h[1] = take(B * Ps);
      s.c = take(G == 4 ? B * Hs : 0);
      s.m = take(project ? B * Hs : 0);
    }
    const double flops = 2.0 * p.directions * p.rows * H * (G * (I + P) + (project ? P : 0));
    const auto share_of = [&](int rank, int ranks) {
      return rnn_share(p, G, project ? kRnnRows<PNV> : kRnnRows<NV>, panels, rank, ranks);
    };
    rnn_parallel(worth_threads(p.threads, flops, 0), p.directions, share_of(1, 2).idle,
                 [&](int d, int rank, int ranks) {
                   prepare(d, rank, ranks);
                   if (ranks > 1) sides[d].barrier.wait(ranks);
                   const RnnShare mine = share_of(rank, ranks);
                   if (!mine.idle) sequence(d, mine);
                 });
  }

  // Packs this thread's share of the weights and biases, and lays out the initial state.
  void prepare(int d, int rank, int ranks) {
    Direction& s = sides[d];
    if (s.memory) layout.pack(p.dtype, p.weights[d], s.memory, rank, ranks);
    if (normed && rank == 0) norm.lay_out(p.dtype, p.weights[d], s.norms);
    const Range b = share(B, 1, rank, ranks);
    for (int64_t i = b.begin; i < b.end; ++i) {
      for (C* h : s.h) rnn_widen(p.dtype, of(p.hx, (d * B + i) * P), P, h + i * Ps);
      if (G == 4) {
        std::memset(s.c + i * Hs + H, 0, (Hs - H) * sizeof(C));  // padding stays zero, not denormal
        rnn_widen(p.dtype, of(p.cx, (d * B + i) * H), H, s.c + i * Hs);
      }
    }
  }

  const void* of(const void* base, int64_t index) const { return rnn_at(base, p.dtype, index); }
  void* of(void* base, int64_t index) const { return rnn_at(base, p.dtype, index); }

  // z (+)= a W for panels [begin, end): a packed W, or its own rows by dot products.
  template <bool STEP>
  void product(const Direction& s, int d, int64_t rows, const C* const* a, int64_t begin, int64_t end, C* z,
               int64_t z_stride, C* passing_panel) const {
    const int64_t depth = STEP ? P : I;
    for (int64_t n = begin; n < end; ++n, z += SLOTS * L) {
      if (STEP ? panels_hh : panels_ih) {
        const C* panel = passing ? passing_panel : (STEP ? s.w_hh : s.w_ih) + n * NV * L * depth;
        if (passing)
          layout.pack_panel(p.dtype, STEP ? p.weights[d].weight_hh : p.weights[d].weight_ih, depth, n, passing_panel);
        constexpr int last = STEP && G == 3 ? 3 : NV - 1;
        // Of one step, the rows are in the blocks that the step's are in, so K may be split here too.
        constexpr RnnSum sum = STEP ? RnnSum::Add : RnnSum::Bias;
        const auto run =
            STEP || p.steps == 1 ? rnn_product<C, NV, last, true, sum> : rnn_product<C, NV, last, false, sum>;
        run(rows, depth, a, panel, z, z_stride, s.start + n * SLOTS * L);
        continue;
      }
      const void* w = STEP ? p.weights[d].weight_hh : p.weights[d].weight_ih;
      if (!STEP)
        for (int64_t i = 0; i < rows; ++i)
          std::memcpy(z + i * z_stride, s.start + n * SLOTS * L, SLOTS * L * sizeof(C));
      for (int v = 0; v < NV && unit(n, v) < H; ++v)
        rnn_dots<C>(p.dtype, of(w, (gate(v) * H + unit(n, v)) * depth), depth, std::min<int64_t>(H - unit(n, v), L),
                    depth, rows, a, z + (STEP && G == 3 && v == 2 ? 3 : v) * L, z_stride, true);
    }
  }

  // With layer norm: z of `count` rows of step t from x W_ihᵀ, which is in it, and h W_hhᵀ, for which zh holds zeros.
  void normed_step(const Direction& s, int d, int64_t t, int64_t row, int64_t count, const C* const* a, C* zh, C* z,
                   int64_t z_stride, C* passing_panel) const {
    product<true>(s, d, count, a, 0, panels, zh, z_stride, passing_panel);
    for (int64_t i = 0; i < count; ++i, z += z_stride, zh += z_stride) {
      C* const hats = kept_of(d, t, row + i, kept);
      C* const inverses = kept_of(d, t, row + i, kept + 2 * G * H);
      norm.input(z, s.norms, s.bias, hats, inverses);
      norm.state(zh, s.norms + norm.hh(), z, hats ? hats + G * H : nullptr, inverses ? inverses + 1 : nullptr);
    }
  }

  // Of what training keeps of batch entry i at step t, the numbers from `from` on; null: inference.
  C* kept_of(int d, int64_t t, int64_t i, int64_t from) const {
    return p.reserve ? static_cast<C*>(p.reserve) + (d * p.rows + at.first(t) + i) * reserved + from : nullptr;
  }

  void sequence(int d, const RnnShare& mine) {
    Direction& s = sides[d];
    const Range own = share(panels, 1, mine.part, mine.parts), pown = share(ppanels, 1, mine.part, mine.parts);
    const int64_t width = own.end - own.begin, most = std::max<int64_t>(mine.row_end - mine.row_begin, 1);
    // A row of z is never a multiple of 4 KiB, so that the rows of a panel do not meet in one set of L1.
    const int64_t z_stride = width * SLOTS * L + 64 / static_cast<int64_t>(sizeof(C));
    const int64_t row_bytes = (z_stride + I) * sizeof(C);
    const int64_t block = std::min(std::max<int64_t>({196608 / row_bytes, 48, most}), p.steps * most);
    const bool convert = rnn_bytes(p.dtype) != sizeof(C);
    Scratch<C> z(block * z_stride), x(convert ? block * I : 0), zh(normed ? most * z_stride : 0);
    if (normed) std::memset(zh, 0, most * z_stride * sizeof(C));
    Scratch<const C*> a(std::max(block, B));
    Scratch<C> panel(passing ? NV * L * std::max(I, P) : 0);
    const int64_t chunk = normed ? width : std::max<int64_t>(8192 / (most * SLOTS * L * sizeof(C)), 1);
    int now = 0;  // the buffer of h that holds the state

    for (int64_t begin = 0, end; begin < p.steps; begin = end) {
      int64_t rows = 0;
      for (end = begin; end < p.steps; ++end) {
        const int64_t t = d ? p.steps - 1 - end : end;
        const int64_t count = std::min(at.count(t), mine.row_end) - mine.row_begin;
        if (count <= 0) continue;
        if (rows + count > block) break;
        for (int64_t i = 0; i < count; ++i, ++rows) {
          const void* input = at.input(p, t, mine.row_begin + i);
          a[rows] = convert ? x + rows * I : static_cast<const C*>(input);
          if (convert) rnn_widen(p.dtype, input, I, x + rows * I);
        }
      }
      product<false>(s, d, rows, a, own.begin, own.end, z, z_stride, panel);

      C* zs = z;
      for (int64_t step = begin; step < end; ++step) {
        const int64_t t = d ? p.steps - 1 - step : step;
        const int64_t count = std::max<int64_t>(std::min(at.count(t), mine.row_end) - mine.row_begin, 0);
        // Rows from `leave` on end here: their state is final.
        const int64_t leave = step + 1 == p.steps ? 0 : d ? B : at.count(t + 1);
        for (int64_t i = 0; i < count; ++i) a[i] = s.h[now] + (mine.row_begin + i) * Ps;
        for (int64_t n = own.begin; n < own.end; n += chunk) {
          const int64_t to = std::min(n + chunk, own.end);
          C* zc = zs + (n - own.begin) * SLOTS * L;
          if (count > 0 && normed) normed_step(s, d, t, mine.row_begin, count, a, zh, zc, z_stride, panel);
          if (count > 0 && !normed) product<true>(s, d, count, a, n, to, zc, z_stride, panel);
          if (G == 4 && normed)
            normed_cells(s, d, t, mine.row_begin, count, zc, z_stride, s.h[1 - now]);
          else
            pointwise(d, t, mine.row_begin, mine.row_begin + count, n, to, zc, z_stride, s.h[1 - now]);
          if (!project && zoned)
            zone(d, t, mine.row_begin, count, n * UNITS, std::min(to * UNITS, H), s.h[now], s.h[1 - now]);
          if (!project) emit(d, t, mine.row_begin, count, leave, n * UNITS, std::min(to * UNITS, H), s.h[1 - now]);
          for (int64_t i = std::max(leave, mine.row_begin); G == 4 && i < mine.row_begin + count; ++i)
            rnn_narrow(p.dtype, s.c + i * Hs + n * UNITS, std::min(to * UNITS, H) - n * UNITS,
                       of(p.c_n, (d * B + i) * H + n * UNITS));
        }
        if (project) {
          if (mine.parts > 1) s.barrier.wait(mine.parts);
          projection(s, d, t, mine.row_begin, count, leave, pown, s.h[1 - now], a);
        }
        if (mine.parts > 1) s.barrier.wait(mine.parts);
        now = 1 - now;
        zs += count * z_stride;
      }
    }
  }

  // Gates, cells and h of rows [row, row_end) at step t for panels [begin, end).
  __attribute__((noinline)) void pointwise(int d, int64_t t, int64_t row, int64_t row_end, int64_t begin, int64_t end,
                                           const C* z, int64_t z_stride, C* h_next) {
    Direction& s = sides[d];
    const bool relu = p.mode == RnnMode::Relu;
    for (; row < row_end; ++row, z += z_stride) {
      C* reserve = G > 1 ? kept_of(d, t, row, 0) : nullptr;
      C *h = (project ? s.m : h_next) + row * (project ? Hs : Ps), *c = s.c + row * Hs;
      const C *h_last = (h_next == s.h[0] ? s.h[1] : s.h[0]) + row * Ps, *g = z;
      for (int64_t n = begin; n < end; ++n, g += SLOTS * L) {
#pragma GCC unroll 2
        for (int v = 0; v < (G == 1 ? 2 : 1); ++v) {
          const int64_t u = unit(n, v), count = H - u;
          if (count <= 0) break;
          Vec<C> y;
          if constexpr (G == 1) {
            y = load(g + v * L);
            y = relu ? activate<Activation::Relu, C>(y) : vtanh(y);
          } else if constexpr (G == 3) {
            const Vec<C> r = vsigmoid<C>(load(g)), update = vsigmoid<C>(load(g + L)), hn = load(g + 3 * L);
            const Vec<C> fresh = vtanh(fma(r, hn, load(g + 2 * L)));
            y = fma(update, load(h_last + u) - fresh, fresh);
            if (reserve) keep(reserve + u, count, r, update, fresh, hn);
          } else {
            const Vec<C> i = vsigmoid<C>(load(g)), f = vsigmoid<C>(load(g + L)), o = vsigmoid<C>(load(g + 3 * L));
            const Vec<C> fresh = vtanh(load(g + 2 * L));
            const Vec<C> cell = fma(f, load(c + u), i * fresh);
            store(c + u, cell);
            y = o * vtanh(cell);
            if (reserve) keep(reserve + u, count, i, f, fresh, o, cell);
          }
          store(h + u, y);
        }
      }
    }
  }

  // The same for LSTM with layer norm, whole rows.
  void normed_cells(const Direction& s, int d, int64_t t, int64_t row, int64_t count, C* z, int64_t z_stride,
                    C* h_next) const {
    if constexpr (G == 4)
      for (int64_t i = row; i < row + count; ++i, z += z_stride)
        norm.cell(z, s.norms + norm.c(), s.c + i * Hs, project ? s.m + i * Hs : h_next + i * Ps, kept_of(d, t, i, 0),
                  kept_of(d, t, i, kept + 2 * G * H + 2));
  }

  // Zoneout of units [begin, end): h = k h_last + (1 - k) h̃, h̃ being in h. RNN keeps h̃, from which its gradient comes.
  void zone(int d, int64_t t, int64_t row, int64_t count, int64_t begin, int64_t end, const C* h_last, C* h) const {
    const Vec<C> k = splat<C>(static_cast<C>(p.zoneout));
    for (int64_t i = row; i < row + count; ++i) {
      const uint8_t* mask = p.zoneout_mask ? p.zoneout_mask + (d * p.rows + at.first(t) + i) * P : nullptr;
      C* reserve = G == 1 ? kept_of(d, t, i, 0) : nullptr;
      for (int64_t u = begin; u < end; u += L) {
        const Vec<C> fresh = load(h + i * Ps + u), last = load(h_last + i * Ps + u);
        if (reserve) store_first(reserve + u, fresh, end - u);
        store(h + i * Ps + u, mask ? select(rnn_mask<C>(mask + u, end - u), last, fresh) : fma(k, last - fresh, fresh));
      }
    }
  }

  template <class... V>
  FASTNN_INLINE void keep(C* reserve, int64_t count, V... values) const {
    int64_t slot = 0;
    (store_first(reserve + slot++ * H, values, count), ...);
  }

  // Writes units [begin, end) of the new h of `count` rows to output, and to h_n those from `leave` on.
  void emit(int d, int64_t t, int64_t row, int64_t count, int64_t leave, int64_t begin, int64_t end, const C* h) {
    for (int64_t i = row; i < row + count; ++i) {
      const C* from = h + i * Ps + begin;
      rnn_narrow(p.dtype, from, end - begin, of(p.output, ((at.first(t) + i) * p.directions + d) * P + begin));
      if (p.h_n && i >= leave) rnn_narrow(p.dtype, from, end - begin, of(p.h_n, (d * B + i) * P + begin));
    }
  }

  // h = m W_hrᵀ for the rows of a step.
  void projection(Direction& s, int d, int64_t t, int64_t row, int64_t count, int64_t leave, Range own, C* h_next,
                  const C** a) {
    for (int64_t i = 0; i < count; ++i) a[i] = s.m + (row + i) * Hs;
    for (int64_t n = own.begin; n < own.end; ++n) {
      C* h = h_next + row * Ps + n * PUNITS;
      if (packs) {
        if (count > 0) rnn_product<C, PNV, 1, true, RnnSum::Set>(count, H, a, s.w_hr + n * PUNITS * H, h, Ps, nullptr);
      } else {
        for (int64_t u = n * PUNITS, v = 0; v < PNV && u < P; ++v, u += L)
          rnn_dots<C>(p.dtype, of(p.weights[d].weight_hr, u * H), H, std::min<int64_t>(P - u, L), H, count, a,
                      h + v * L, Ps, false);
      }
    }
    const int64_t begin = own.begin * PUNITS, end = std::min(own.end * PUNITS, P);
    if (zoned) zone(d, t, row, count, begin, end, h_next == s.h[0] ? s.h[1] : s.h[0], h_next);
    emit(d, t, row, count, leave, begin, end, h_next);
  }
};

inline void rnn_forward(const RnnParams& params) {
  if (params.rows == 0) return;
  rnn_with_type(params.dtype, params.mode,
                [&](auto c, auto gates) { RnnForward<decltype(c), decltype(gates)::value>{params}.run(); });
}

}  // namespace fastnn::cpu::FASTNN_ISA
