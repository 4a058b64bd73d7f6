// Gradients of a recurrent layer: back through time in one call. Formulas: fastnn/rnn.h, inputs as training left them.
//
// From the last step to the first: dh = grad_output + (gradient of z at the step after) W_hh, one tile product, then the
// gradients of z from dh, the saved gates and the running dc. They are kept for all rows, [R][G·H] (GRU: dr dz, then dn
// as W_hh sees it, then as W_ih does), so that after the loop the weights' gradients and the input's are one matrix
// product each, over all rows, with a fixed order of summation.
//
// With layer norm (rnn_norm.inl) z sums normalised products. The gradient of h W_hhᵀ itself, [R][G·H], follows at each
// step, since the step before needs it; that of x W_ihᵀ takes the place of z's after the loop. With zoneout a part of dh
// goes straight to the step before, and only the rest meets the formulas.
//
// Few rows in all (a cell's step): the products of thin.inl, with nothing packed.
//
// Threads as in rnn.inl: rows or units apart, one barrier a step where units are. With a projection (proj_size) the
// step has two products: dh of the state, then through W_hr to the units.
#pragma once

#include "cpu/rnn.inl"
#include "cpu/thin.inl"

namespace fastnn::cpu::FASTNN_ISA {

// B of a product from a table of its rows, which may lie anywhere.
template <class C>
struct RnnRowsB {
  static constexpr bool kPrepacked = false;
  const C* const* rows;
  int group() const { return 4; }  // panels at a time: one panel's run of a row is a single cache line
  void pack(int64_t n0, int64_t cols, int64_t k0, int64_t depth, C* to) const {
    constexpr int L = kLanes<C>, NR = kNR<C>;
    for (int64_t k = 0; k < depth; ++k) {
      const C* const row = rows[k0 + k] + n0;
      C* dst = to + k * NR;
      int64_t n = 0;
      for (; n + NR <= cols; n += NR, dst += depth * NR) {
        store(dst, load(row + n));
        store(dst + L, load(row + n + L));
      }
      for (int64_t j = 0; n < cols && j < NR; ++j) dst[j] = n + j < cols ? row[n + j] : C(0);
    }
  }
};

// A of dX = sum over directions of dz W_ih: K runs over directions, gates and units.
template <class C>
struct RnnGradientsA {
  const C* data[2];
  int64_t width, K, skip_from, skip;  // of a direction: row width, depth; columns from skip_from on lie `skip` further
  const C* panel(int64_t m0, int64_t rows, int64_t k0, int64_t depth, C* scratch) const {
    constexpr int MR = kMR<C>;
    const RowTiles<C> tiles(rows);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t m = tiles.begin(t), height = tiles.begin(t + 1) - m;
      for (int64_t k = k0, end = k0 + depth, next; k < end; k = next) {
        const int64_t d = k / K, column = k % K;
        next = std::min(end, d * K + (column < skip_from ? skip_from : K));
        pack_panel<MR>(data[d] + (m0 + m) * width + column + (column < skip_from ? 0 : skip), width, 1, height,
                       next - k, scratch + (t * depth + k - k0) * MR);
      }
    }
    return scratch;
  }
};

template <class C>
struct RnnStore {
  C* output;
  int64_t ld;
  C* in_place(int64_t m, int64_t n, int64_t& stride) const {
    stride = ld;
    return output + m * ld + n;
  }
  template <int ROWS>
  FASTNN_INLINE bool direct(const TilePlace<C>& place, Tile<C, ROWS>& tile) const {
    for (int i = 0; i < ROWS && i < place.rows; ++i) {
      C* row = output + (place.m + i) * ld + place.n;
      store(row, tile.acc[i][0]);
      store(row + kLanes<C>, tile.acc[i][1]);
    }
    return true;
  }
  void finish(const TilePlace<C>& place, const C* tile) const {
    for (int64_t i = 0; i < place.rows; ++i)
      for (int64_t j = 0; j < place.cols; ++j) output[(place.m + i) * ld + place.n + j] = tile[i * kNR<C> + j];
  }
};

template <class C, int G>
struct RnnBackward {
  static constexpr int L = kLanes<C>, UNITS = 2 * L;

  const RnnBackwardParams& b;
  const RnnParams& p = b.forward;
  const int64_t H = p.hidden_size, P = p.state_size, I = p.input_size, B = p.batch, R = p.rows, S = p.steps;
  const int64_t D = p.directions, ld = D * P;
  const bool project = p.weights[0].weight_hr != nullptr, convert = rnn_bytes(p.dtype) != sizeof(C);
  const int64_t panels = (H + UNITS - 1) / UNITS, ppanels = (P + UNITS - 1) / UNITS;
  const int64_t Hs = panels * UNITS, Ps = ppanels * UNITS, W = (G == 3 ? 4 : G) * H;  // W: row of dz
  const bool thin = R <= kThinRows;
  // The steps' products too: a thread's columns are whole panels, the last of them a vector or more.
  const bool thin_steps = thin && !project && !convert && P >= L && (P % UNITS == 0 || P % UNITS >= L);
  const bool normed = p.normed(), zoned = p.zoned();
  const RnnNorm<C, G> norm{H};
  const int64_t kept = rnn_kept(p), reserved = rnn_reserved(p);
  const RnnRows at{p};
  // A half dtype is widened once: what is read row by row, and what the last products read and write.
  Scratch<C> wide_grad{convert && b.grad_output ? R * ld : 0}, wide_output{convert ? R * ld : 0},
      wide_hx{convert ? D * B * P : 0}, wide_cx{convert && p.cx ? D * B * H : 0},
      wide_norms{convert && normed ? D * (2 * G + 2) * H : 0};
  const C *grad_output = nullptr, *output = nullptr, *hx = nullptr, *cx = nullptr;

  struct Direction {
    C *w_hh, *w_hr;   // packed: [ppanels][G·H][UNITS], [panels][P][UNITS]
    C *dh, *dm, *dc;  // [B][Ps], [B][Hs], [B][Hs]
    C *dz, *dhp, *m;  // [R][W], [R][P], [R][H]: gradients of z, of h before W_hr, and σ(o) tanh(c)
    C *dzh, *du;      // with layer norm: [R][G·H], [R][H]: gradients of h W_hhᵀ and of LSTM's normalised cell
    const C *norm_ih, *norm_hh, *norm_c, *norm_c_bias;
    const C** h_last;  // [R] rows of the state before
    Barrier barrier;
  };
  Direction sides[2] = {};

  const void* of(const void* base, int64_t index) const { return rnn_at(base, p.dtype, index); }
  void* of(void* base, int64_t index) const { return rnn_at(base, p.dtype, index); }

  // The array in compute type: itself, or widened into memory.
  const C* wide(const void* from, int64_t count, C* memory) const {
    if (!convert || !from) return static_cast<const C*>(from);
    parallel(worth_threads(p.threads, 0, 2.0 * count), [&](int thread, int threads) {
      const Range r = share(count, 1024, thread, threads);
      rnn_widen(p.dtype, of(from, r.begin), r.end - r.begin, memory + r.begin);
    });
    return memory;
  }

  void run() {
    grad_output = wide(b.grad_output, R * ld, wide_grad), output = wide(p.output, R * ld, wide_output);
    hx = wide(p.hx, D * B * P, wide_hx), cx = wide(p.cx, D * B * H, wide_cx);
    const int64_t sizes[] = {thin_steps ? 0 : ppanels * UNITS * G * H,
                             project ? panels * UNITS * P : 0,
                             B * Ps,
                             project || zoned ? B * Hs : 0,
                             G == 4 ? B * Hs : 0,
                             R * W,
                             project ? R * P : 0,
                             project ? R * H : 0,
                             normed ? R * G * H : 0,
                             normed && G == 4 ? R * H : 0};
    int64_t each = 0;
    for (int64_t size : sizes) each += (size + 15) / 16 * 16;
    Scratch<C> memory(each * p.directions);
    Scratch<const C*> tables(R * (D + 2));
    for (int d = 0; d < p.directions; ++d) {
      Direction& s = sides[d];
      C* next = memory + d * each;
      C** const slots[] = {&s.w_hh, &s.w_hr, &s.dh, &s.dm, &s.dc, &s.dz, &s.dhp, &s.m, &s.dzh, &s.du};
      for (int i = 0; i < 10; ++i) *slots[i] = next, next += (sizes[i] + 15) / 16 * 16;
      s.h_last = tables + d * R;
      const RnnWeights& w = p.weights[d];
      C* const memory_of_norms = wide_norms + d * (2 * G + 2) * H;
      s.norm_ih = wide(w.norm_ih, G * H, memory_of_norms), s.norm_hh = wide(w.norm_hh, G * H, memory_of_norms + G * H);
      s.norm_c = wide(w.norm_c_weight, H, memory_of_norms + 2 * G * H);
      s.norm_c_bias = wide(w.norm_c_bias, H, memory_of_norms + (2 * G + 1) * H);
    }
    const double flops = 2.0 * p.directions * R * H * (G * P + (project ? P : 0));
    const auto share_of = [&](int rank, int ranks) { return rnn_share(p, G, kRnnRows<2>, ppanels, rank, ranks); };
    rnn_parallel(worth_threads(p.threads, flops, 0), p.directions, share_of(1, 2).idle,
                 [&](int d, int rank, int ranks) {
                   prepare(d, rank, ranks);
                   if (ranks > 1) sides[d].barrier.wait(ranks);
                   const RnnShare mine = share_of(rank, ranks);
                   if (!mine.idle) sequence(d, mine);
                 });
    finish(tables + D * R, tables + (D + 1) * R);
  }

  void prepare(int d, int rank, int ranks) {
    Direction& s = sides[d];
    const RnnWeights& w = p.weights[d];
    const Range q = share(ppanels, 1, rank, ranks), r = share(panels, 1, rank, ranks), rows = share(B, 1, rank, ranks);
    const auto pack = [&](const void* weight, int64_t cols, int64_t depth, Range own, C* to) {
      if (own.begin < own.end)
        rnn_pack_columns(p.dtype, of(weight, own.begin * UNITS), cols,
                         std::min(own.end * UNITS, cols) - own.begin * UNITS, depth, to + own.begin * UNITS * depth);
    };
    if (!thin_steps) pack(w.weight_hh, P, G * H, q, s.w_hh);
    if (project) pack(w.weight_hr, H, P, r, s.w_hr);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      std::memset(s.dh + i * Ps, 0, Ps * sizeof(C));
      if (b.grad_h_n) rnn_widen(p.dtype, of(b.grad_h_n, (d * B + i) * P), P, s.dh + i * Ps);
      if (G == 4) std::memset(s.dc + i * Hs, 0, Hs * sizeof(C));
      if (G == 4 && b.grad_c_n) rnn_widen(p.dtype, of(b.grad_c_n, (d * B + i) * H), H, s.dc + i * Hs);
    }
    const Range steps = share(S, 1, rank, ranks);
    for (int64_t t = steps.begin; t < steps.end; ++t)
      for (int64_t i = 0; i < at.count(t); ++i) {
        const int64_t row = row_before(d, t, i);
        s.h_last[at.first(t) + i] = row < 0 ? hx + (d * B + i) * P : output + row * ld + d * P;
      }
  }

  // The row of the step before (in the direction's time) of batch entry i, or -1: the initial state.
  int64_t row_before(int d, int64_t t, int64_t i) const {
    if (d == 0) return t > 0 ? at.first(t - 1) + i : -1;
    return t + 1 < S && i < at.count(t + 1) ? at.first(t + 1) + i : -1;
  }

  // dh of the step before, from dz of step t.
  void recur(const Direction& s, int d, int64_t t, const RnnShare& mine, Range own, const C** a) const {
    const int64_t count = std::min(at.count(t), mine.row_end) - mine.row_begin;
    if (count <= 0) return;
    for (int64_t i = 0; i < count; ++i) a[i] = dzh_of(s, at.first(t) + mine.row_begin + i);
    const bool add = G == 3 || zoned;
    if (thin_steps) {
      if (own.begin < own.end)
        with_thin_rows(count, [&](auto rows) {
          thin_grad_input<decltype(rows)::value>(G * H, own.begin * UNITS, std::min(own.end * UNITS, P), a[0],
                                                 normed ? G * H : W, static_cast<const C*>(p.weights[d].weight_hh), P,
                                                 s.dh + mine.row_begin * Ps, Ps, add);
        });
      return;
    }
    const auto run = add ? rnn_product<C, 2, 1, true, RnnSum::Add> : rnn_product<C, 2, 1, true, RnnSum::Set>;
    for (int64_t n = own.begin; n < own.end; ++n)
      run(count, G * H, a, s.w_hh + n * UNITS * G * H, s.dh + mine.row_begin * Ps + n * UNITS, Ps, nullptr);
  }

  // Gradient of a row of h W_hhᵀ.
  const C* dzh_of(const Direction& s, int64_t row) const { return normed ? s.dzh + row * G * H : s.dz + row * W; }
  // What training kept of a row.
  const C* kept_of(int64_t d, int64_t row) const { return static_cast<const C*>(p.reserve) + (d * R + row) * reserved; }

  void sequence(int d, const RnnShare& mine) {
    Direction& s = sides[d];
    const Range own = share(panels, 1, mine.part, mine.parts), pown = share(ppanels, 1, mine.part, mine.parts);
    Scratch<const C*> a(B);
    for (int64_t step = S - 1; step >= 0; --step) {
      const int64_t t = d ? S - 1 - step : step;
      if (step < S - 1) recur(s, d, d ? t - 1 : t + 1, mine, pown, a);
      const int64_t begin = mine.row_begin, count = std::min(at.count(t), mine.row_end) - begin;
      if (project || zoned) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = at.first(t) + begin + i;
          C* const to = project ? s.dhp + row * P : s.dm + (begin + i) * Hs;
          arrive(s, d, row, begin + i, pown.begin * UNITS, std::min(pown.end * UNITS, P), to);
          a[i] = to;
        }
      }
      if (project) {
        if (mine.parts > 1) s.barrier.wait(mine.parts);
        for (int64_t n = own.begin; count > 0 && n < own.end; ++n)
          rnn_product<C, 2, 1, true, RnnSum::Set>(count, P, a, s.w_hr + n * UNITS * P, s.dm + begin * Hs + n * UNITS,
                                                  Hs, nullptr);
      }
      for (int64_t i = begin; i < begin + count; ++i) {
        if (!normed) {
          pointwise<false>(s, d, t, i, own.begin * UNITS, std::min(own.end * UNITS, H));
          continue;
        }
        pointwise<G == 4>(s, d, t, i, 0, H);
        const int64_t row = at.first(t) + i;
        const C* hats = kept_of(d, row) + kept;
        norm.gates_backward(s.dz + row * W, hats + G * H, s.norm_hh, hats[2 * G * H + 1], G - 1, s.dzh + row * G * H);
      }
      if (mine.parts > 1) s.barrier.wait(mine.parts);
    }
    if (b.grad_hx) recur(s, d, d ? S - 1 : 0, mine, pown, a);
    // Each part writes its own columns.
    const int64_t u = pown.begin * UNITS, v = own.begin * UNITS;
    for (int64_t i = mine.row_begin; i < mine.row_end; ++i) {
      if (b.grad_hx)
        rnn_narrow(p.dtype, s.dh + i * Ps + u, std::min(pown.end * UNITS, P) - u, of(b.grad_hx, (d * B + i) * P + u));
      if (b.grad_cx && G == 4)
        rnn_narrow(p.dtype, s.dc + i * Hs + v, std::min(own.end * UNITS, H) - v, of(b.grad_cx, (d * B + i) * H + v));
    }
  }

  // Gradient of h̃ at units [begin, end) of a row, batch entry i: dh and what came to the output, and with zoneout of that
  // what does not stay in dh for the step before.
  __attribute__((noinline)) void arrive(Direction& s, int d, int64_t row, int64_t i, int64_t begin, int64_t end,
                                        C* to) const {
    const C* grad = grad_output ? grad_output + row * ld + d * P : nullptr;
    const uint8_t* mask = p.zoneout_mask ? p.zoneout_mask + (d * R + row) * P : nullptr;
    C* const dh = s.dh + i * Ps;
    for (int64_t u = begin; u < end; ++u) to[u] = dh[u] + (grad ? grad[u] : C(0));
    if (!zoned) return;
    const C part = static_cast<C>(p.zoneout);
    for (int64_t u = begin; u < end; ++u) {
      const C k = mask ? C(mask[u] != 0) : part;
      dh[u] = k * to[u];
      to[u] = mask && mask[u] ? C(0) : to[u] - dh[u];
    }
  }

  // Gradients of z for batch entry i at step t, units [begin, end). NORMED: of LSTM with layer norm, where
  // end is H.
  template <bool NORMED>
  __attribute__((noinline)) void pointwise(Direction& s, int d, int64_t t, int64_t i, int64_t begin, int64_t end) {
    const bool relu = p.mode == RnnMode::Relu;
    const int64_t row = at.first(t) + i, before = row_before(d, t, i);
    const bool apart = project || zoned;
    const C* grad = grad_output && !apart ? grad_output + row * ld + d * P : nullptr;
    const C* reserve = kept_of(d, row);
    const C* y_row = zoned ? reserve : output + row * ld + d * P;
    const C* c_last = before < 0 ? nullptr : kept_of(d, before) + 4 * H;
    const C* c_first = cx + (d * B + i) * H;
    C *dz = s.dz + row * W, *dh = apart ? s.dm + i * Hs : s.dh + i * Ps, *carried = s.dh + i * Ps;
    if constexpr (NORMED) {
      if (grad)
        for (int64_t u = 0; u < H; ++u) dh[u] += grad[u];
      norm.cell_backward(reserve, reserve + kept + 2 * G * H + 2, s.norm_c, s.norm_c_bias, dh, s.dc + i * Hs,
                         dz + 3 * H, s.du + row * H, project ? s.m + row * H : nullptr);
    }
    for (int64_t u = begin; u < end; u += L) {
      const int64_t n = end - u;
      Vec<C> g = load(dh + u);
      if (grad) g += load_first(grad + u, n);
      const auto saved = [&](int slot) { return load_first(reserve + slot * H + u, n); };
      if constexpr (G == 1) {
        const Vec<C> y = load_first(y_row + u, n);
        g = relu ? activate_backward<Activation::Relu, C>(g, y) : activate_backward<Activation::Tanh, C>(g, y);
        store_first(dz + u, g, n);
      } else if constexpr (G == 3) {
        const Vec<C> r = saved(0), update = saved(1), fresh = saved(2), hn = saved(3);
        const Vec<C> da = g * (C(1) - update) * (C(1) - fresh * fresh);
        store_first(dz + u, da * hn * r * (C(1) - r), n);
        store_first(dz + H + u, g * (load_first(s.h_last[row] + u, n) - fresh) * update * (C(1) - update), n);
        store_first(dz + 2 * H + u, da * r, n);
        store_first(dz + 3 * H + u, da, n);
        store(carried + u, zoned ? fma(g, update, load(carried + u)) : g * update);
      } else {
        const Vec<C> in = saved(0), f = saved(1), fresh = saved(2);
        const Vec<C> last = c_last ? load_first(c_last + u, n) : load_first(c_first + u, n);
        Vec<C> dc = load(s.dc + i * Hs + u);
        if constexpr (!NORMED) {
          const Vec<C> o = saved(3), th = vtanh(saved(4));
          dc = fma(g * o, C(1) - th * th, dc);
          store_first(dz + 3 * H + u, g * th * o * (C(1) - o), n);
          if (project) store_first(s.m + row * H + u, o * th, n);
        }
        store_first(dz + u, dc * fresh * in * (C(1) - in), n);
        store_first(dz + H + u, dc * last * f * (C(1) - f), n);
        store_first(dz + 2 * H + u, dc * in * (C(1) - fresh * fresh), n);
        store(s.dc + i * Hs + u, dc * f);
      }
    }
  }

  // Calls f(C* target) and puts what it wrote where it belongs.
  template <class F>
  void result(void* out, int64_t count, const F& f) const {
    if (!out) return;
    Scratch<C> memory(convert ? count : 0);
    f(convert ? memory.data() : static_cast<C*>(out));
    if (convert)
      parallel(worth_threads(p.threads, 0, 2.0 * count), [&](int thread, int threads) {
        const Range r = share(count, 1024, thread, threads);
        rnn_narrow(p.dtype, memory + r.begin, r.end - r.begin, of(out, r.begin));
      });
  }

  // The gradients that are one product over all rows.
  void finish(const C** x_rows, const C** m_rows) {
    Scratch<C> wide_input(convert ? R * I : 0);
    for (int64_t t = 0; t < S; ++t)
      for (int64_t i = 0; i < at.count(t); ++i) {
        const int64_t row = at.first(t) + i;
        if (convert) rnn_widen(p.dtype, at.input(p, t, i), I, wide_input + row * I);
        x_rows[row] = convert ? wide_input + row * I : static_cast<const C*>(at.input(p, t, i));
      }
    const auto weight = [&](C* out, int64_t rows, int64_t cols, const C* a, int64_t a_ld, const C* const* of) {
      if (thin && R > 0 && cols >= L) {
        parallel(worth_threads(p.threads, 2.0 * R * rows * cols, 1.0 * sizeof(C) * rows * cols),
                 [&](int rank, int ranks) {
                   const Range r = share(rows, 1, rank, ranks);
                   with_thin_rows(R, [&](auto count) {
                     thin_grad_weight<decltype(count)::value>(rows, cols, r.begin, r.end, a, a_ld, of, out);
                   });
                 });
        return;
      }
      gemm<C>(rows, cols, R, StridedA<C, C>{a, 1, a_ld}, RnnRowsB<C>{of}, RnnStore<C>{out, cols}, p.threads);
    };
    for (int d = 0; d < D; ++d) {
      const Direction& s = sides[d];
      const auto& grads = b.grad_weights[d];
      const int64_t shared = G == 3 ? 2 * H : G * H;  // gates whose dz is the same for W_ih and W_hh
      if (grads.bias_ih || grads.bias_hh || normed) over_rows(d);
      result(grads.weight_ih, G * H * I, [&](C* out) {
        weight(out, shared, I, s.dz, W, x_rows);
        if (G == 3) weight(out + shared * I, H, I, s.dz + 3 * H, W, x_rows);
      });
      result(grads.weight_hh, G * H * P,
             [&](C* out) { weight(out, G * H, P, dzh_of(s, 0), normed ? G * H : W, s.h_last); });
      for (int64_t row = 0; project && row < R; ++row) m_rows[row] = s.m + row * H;
      result(grads.weight_hr, P * H, [&](C* out) { weight(out, P, H, s.dhp, P, m_rows); });
    }
    const int64_t K = G * H;
    Scratch<C> wide_weight(convert && b.grad_input ? D * K * I : 0);
    Scratch<const C*> w_rows(K * D);
    result(b.grad_input, R * I, [&](C* out) {
      const RnnGradientsA<C> a = {{sides[0].dz, sides[1].dz}, W, K, G == 3 ? 2 * H : K, G == 3 ? H : 0};
      for (int64_t d = 0; d < D; ++d) {
        const C* w = wide(p.weights[d].weight_ih, K * I, wide_weight + d * K * I);
        for (int64_t k = 0; k < K; ++k) w_rows[d * K + k] = w + k * I;
      }
      if (thin && R > 0 && I >= L) return thin_input(out, w_rows);
      gemm<C>(R, I, K * D, a, RnnRowsB<C>{w_rows}, RnnStore<C>{out, I}, p.threads);
    });
  }

  // dX of few rows: for each direction the gates that W_ih and W_hh share, and GRU's last gate.
  void thin_input(C* out, const C* const* w_rows) const {
    const int64_t K = G * H, shared = G == 3 ? 2 * H : K;
    parallel(worth_threads(p.threads, 2.0 * D * R * K * I, 1.0 * sizeof(C) * D * K * I), [&](int rank, int ranks) {
      Range own = share(I / 64 * 64, 64, rank, ranks);
      if (rank == ranks - 1) own.end = I;  // so that no range is shorter than a vector
      if (own.begin < own.end)
        with_thin_rows(R, [&](auto rows) {
          constexpr int ROWS = decltype(rows)::value;
          for (int64_t d = 0; d < D; ++d) {
            const C *dz = sides[d].dz, *w = w_rows[d * K];
            thin_grad_input<ROWS>(shared, own.begin, own.end, dz, W, w, I, out, I, d > 0);
            if (G == 3) thin_grad_input<ROWS>(H, own.begin, own.end, dz + 3 * H, W, w + shared * I, I, out, I, true);
          }
        });
    });
  }

  // One pass over the rows of dz: its sums, which are the gradients of biases, and with layer norm those of γ and β; then
  // the row becomes the gradient of x W_ihᵀ. Rows in blocks of 64, whose sums are added up in order: rounding errors do
  // not pile up, and it makes no difference which thread has which block.
  void over_rows(int d) const {
    const Direction& s = sides[d];
    const int64_t K = normed ? G * H : 0, cells = normed && G == 4 ? H : 0, columns = W + 2 * K + 2 * cells;
    const int64_t blocks = (R + 63) / 64;
    Scratch<C> memory(blocks * columns);
    parallel(worth_threads(p.threads, 1.0 * R * columns, 4.0 * R * columns), [&](int thread, int threads) {
      const Range r = share(blocks, 1, thread, threads);
      for (int64_t block = r.begin; block < r.end; ++block) {
        C* const sum = memory + block * columns;
        std::fill(sum, sum + columns, C(0));
        for (int64_t row = block * 64; row < std::min(block * 64 + 64, R); ++row) {
          add(W, s.dz + row * W, sum);
          if (normed) through_norms(s, row, kept_of(d, row), sum + W);
        }
      }
    });
    C* const total = memory;
    for (int64_t block = 1; block < blocks; ++block) add(columns, memory + block * columns, total);
    const auto put = [&](void* out, int64_t at, int64_t count, const C* from) {
      if (out) rnn_narrow(p.dtype, from, count, of(out, at));
    };
    const auto& grads = b.grad_weights[d];
    put(grads.bias_ih, 0, G == 3 ? 2 * H : G * H, total);
    if (G == 3) put(grads.bias_ih, 2 * H, H, total + 3 * H);
    put(grads.bias_hh, 0, G * H, total);
    put(grads.norm_ih, 0, K, total + W);
    put(grads.norm_hh, 0, K, total + W + K);
    put(grads.norm_c_weight, 0, cells, total + W + 2 * K);
    put(grads.norm_c_bias, 0, cells, total + W + 2 * K + cells);
  }

  // Adds a row's part to the gradients of γ_ih, γ_hh, γ_c, β_c, which follow one another in `sum`.
  __attribute__((noinline)) void through_norms(const Direction& s, int64_t row, const C* of_row, C* sum) const {
    constexpr int last = G == 3 ? 3 : G - 1;  // where dz has the last gate as W_ih sees it
    const C* const hats = of_row + kept;
    C* const dz = s.dz + row * W;
    add_products((G - 1) * H, dz, hats, sum);
    add_products(H, dz + last * H, hats + (G - 1) * H, sum + (G - 1) * H);
    add_products(G * H, dz, hats + G * H, sum + G * H);
    if (G == 4) {
      const C *cells = of_row + 4 * H, *statistics = hats + 2 * G * H + 2, *du = s.du + row * H;
      C* const to = sum + 2 * G * H;
      for (int64_t u = 0; u < H; ++u) to[u] += du[u] * ((cells[u] - statistics[0]) * statistics[1]);
      add(H, du, to + H);
    }
    norm.gates_backward(dz, hats, s.norm_ih, hats[2 * G * H], last, dz);
  }

  static void add(int64_t count, const C* __restrict from, C* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }
  static void add_products(int64_t count, const C* __restrict a, const C* __restrict b, C* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] += a[i] * b[i];
  }
};

inline void rnn_backward(const RnnBackwardParams& params) {
  rnn_with_type(params.forward.dtype, params.forward.mode,
                [&](auto c, auto gates) { RnnBackward<decltype(c), decltype(gates)::value>{params}.run(); });
}

}  // namespace fastnn::cpu::FASTNN_ISA
