// Gradients of a recurrent layer: back through time in one call. Formulas: fastnn/rnn.h, inputs as training left them.
//
// From the last step to the first: dh = grad_output + (gradient of z at the step after) W_hh, one tile product, then the
// gradients of z from dh, the saved gates and the running dc. They are kept for all rows, [R][G·H] (GRU: dr dz, then dn
// as W_hh sees it, then as W_ih does), so that after the loop the weights' gradients and the input's are one matrix
// product each, over all rows, with a fixed order of summation.
//
// Threads as in rnn.inl: rows or units apart, one barrier a step where units are. With a projection (proj_size) the
// step has two products: dh of the state, then through W_hr to the units.
#pragma once

#include "cpu/rnn.inl"

namespace fastnn::cpu::FASTNN_ISA {

// B of a product from a table of its rows, which may lie anywhere.
template <class C, class T>
struct RnnRowsB {
  static constexpr bool kPrepacked = false;
  const T* const* rows;
  const C* panel(int64_t n0, int64_t cols, int64_t k0, int64_t depth, C* scratch) const {
    constexpr int L = kLanes<C>, NR = kNR<C>;
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = rows[k0 + k] + n0;
      C* dst = scratch + k * NR;
      if (cols == NR) {
        store(dst, load(row));
        store(dst + L, load(row + L));
      } else {
        for (int64_t j = 0; j < NR; ++j) dst[j] = j < cols ? load_one(row + j) : C(0);
      }
    }
    return scratch;
  }
};

// A of dX = sum over directions of dz W_ih: K runs over directions, gates and units.
template <class C>
struct RnnGradientsA {
  const C* data[2];
  int64_t width, K, skip_from, skip;  // of a direction: row width, depth; columns from skip_from on lie `skip` further
  const C* panel(int64_t m0, int64_t rows, int64_t k0, int64_t depth, C* scratch) const {
    constexpr int MR = kMR<C>;
    for (int64_t m = 0; m < rows; m += MR) {
      for (int64_t k = k0, end = k0 + depth, next; k < end; k = next) {
        const int64_t d = k / K, column = k % K;
        next = std::min(end, d * K + (column < skip_from ? skip_from : K));
        pack_panel<MR>(data[d] + (m0 + m) * width + column + (column < skip_from ? 0 : skip), width, 1,
                       std::min<int64_t>(MR, rows - m), next - k, scratch + m * depth + (k - k0) * MR);
      }
    }
    return scratch;
  }
};

template <class T, class C>
struct RnnStore {
  T* output;
  int64_t ld;
  C* in_place(int64_t m, int64_t n, int64_t& stride) const {
    stride = ld;
    if constexpr (std::is_same_v<T, C>) return output + m * ld + n;
    return nullptr;
  }
  template <int ROWS>
  FASTNN_INLINE bool direct(const TilePlace<C>& place, Tile<C, ROWS>& tile) const {
    for (int i = 0; i < ROWS && i < place.rows; ++i) {
      T* row = output + (place.m + i) * ld + place.n;
      store(row, tile.acc[i][0]);
      store(row + kLanes<C>, tile.acc[i][1]);
    }
    return true;
  }
  void finish(const TilePlace<C>& place, const C* tile) const {
    for (int64_t i = 0; i < place.rows; ++i)
      for (int64_t j = 0; j < place.cols; ++j)
        store_one(output + (place.m + i) * ld + place.n + j, tile[i * kNR<C> + j]);
  }
};

template <class T, int G>
struct RnnBackward {
  using C = Compute<T>;
  static constexpr int L = kLanes<C>, UNITS = 2 * L, KEPT = G == 4 ? 5 : G == 3 ? 4 : 0;

  const RnnBackwardParams& b;
  const RnnParams& p = b.forward;
  const int64_t H = p.hidden_size, P = p.state_size, I = p.input_size, B = p.batch, R = p.rows, S = p.steps;
  const bool project = p.weights[0].weight_hr != nullptr;
  const int64_t panels = (H + UNITS - 1) / UNITS, ppanels = (P + UNITS - 1) / UNITS;
  const int64_t Hs = panels * UNITS, Ps = ppanels * UNITS, W = (G == 3 ? 4 : G) * H;  // W: row of dz
  const RnnRows at{p};

  struct Direction {
    C *w_hh, *w_hr;       // packed: [ppanels][G·H][UNITS], [panels][P][UNITS]
    C *dh, *dm, *dc;      // [B][Ps], [B][Hs], [B][Hs]
    C *dz, *dhp, *m;      // [R][W], [R][P], [R][H]: gradients of z, of h before W_hr, and σ(o) tanh(c)
    const T** h_last;     // [R] rows of the state before
    Barrier barrier;
  };
  Direction sides[2] = {};

  void run() {
    const int64_t sizes[] = {ppanels * UNITS * G * H, project ? panels * UNITS * P : 0, B * Ps, project ? B * Hs : 0,
                             G == 4 ? B * Hs : 0, R * W, project ? R * P : 0, project ? R * H : 0};
    int64_t each = 0;
    for (int64_t size : sizes) each += (size + 15) / 16 * 16;
    Scratch<C> memory(each * p.directions);
    Scratch<const T*> tables(R * (p.directions + 1));
    for (int d = 0; d < p.directions; ++d) {
      Direction& s = sides[d];
      C* next = memory + d * each;
      C** const slots[] = {&s.w_hh, &s.w_hr, &s.dh, &s.dm, &s.dc, &s.dz, &s.dhp, &s.m};
      for (int i = 0; i < 8; ++i) *slots[i] = next, next += (sizes[i] + 15) / 16 * 16;
      s.h_last = tables + d * R;
    }
    const double flops = 2.0 * p.directions * R * H * (G * P + (project ? P : 0));
    rnn_parallel(worth_threads(p.threads, flops, 0), p.directions, [&](int d, int rank, int ranks) {
      prepare(d, rank, ranks);
      if (ranks > 1) sides[d].barrier.wait(ranks);
      const RnnShare mine = rnn_share(p, G, kRnnRows<2>, ppanels, rank, ranks);
      if (!mine.idle) sequence(d, mine);
    });
    finish(tables + p.directions * R);
  }

  void prepare(int d, int rank, int ranks) {
    Direction& s = sides[d];
    const T *w_hh = static_cast<const T*>(p.weights[d].weight_hh), *w_hr = static_cast<const T*>(p.weights[d].weight_hr);
    const Range q = share(ppanels, 1, rank, ranks), r = share(panels, 1, rank, ranks), rows = share(B, 1, rank, ranks);
    for (int64_t n = q.begin; n < q.end; ++n)
      pack_panel<UNITS>(w_hh + n * UNITS, 1, P, std::min<int64_t>(P - n * UNITS, UNITS), G * H,
                        s.w_hh + n * UNITS * G * H);
    for (int64_t n = r.begin; project && n < r.end; ++n)
      pack_panel<UNITS>(w_hr + n * UNITS, 1, H, std::min<int64_t>(H - n * UNITS, UNITS), P, s.w_hr + n * UNITS * P);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      widen(b.grad_h_n, (d * B + i) * P, P, s.dh + i * Ps, Ps);
      if (G == 4) widen(b.grad_c_n, (d * B + i) * H, H, s.dc + i * Hs, Hs);
    }
    const Range steps = share(S, 1, rank, ranks);
    for (int64_t t = steps.begin; t < steps.end; ++t)
      for (int64_t i = 0; i < at.count(t); ++i) {
        const int64_t row = row_before(d, t, i);
        s.h_last[at.first(t) + i] = row < 0 ? static_cast<const T*>(p.hx) + (d * B + i) * P
                                            : static_cast<const T*>(p.output) + (row * p.directions + d) * P;
      }
  }

  // The row of the step before (in the direction's time) of batch entry i, or -1: the initial state.
  int64_t row_before(int d, int64_t t, int64_t i) const {
    if (d == 0) return t > 0 ? at.first(t - 1) + i : -1;
    return t + 1 < S && i < at.count(t + 1) ? at.first(t + 1) + i : -1;
  }

  static void widen(const void* src, int64_t offset, int64_t count, C* dst, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) dst[i] = src && i < count ? load_one(static_cast<const T*>(src) + offset + i) : 0;
  }

  // dh of the step before, from dz of step t.
  void recur(const Direction& s, int64_t t, const RnnShare& mine, Range own, const C** a) const {
    const int64_t count = std::min(at.count(t), mine.row_end) - mine.row_begin;
    if (count <= 0) return;
    for (int64_t i = 0; i < count; ++i) a[i] = s.dz + (at.first(t) + mine.row_begin + i) * W;
    for (int64_t n = own.begin; n < own.end; ++n)
      rnn_product<C, 2, 1, true, G == 3 ? RnnSum::Add : RnnSum::Set>(count, G * H, a, s.w_hh + n * UNITS * G * H,
                                                                     s.dh + mine.row_begin * Ps + n * UNITS, Ps, nullptr);
  }

  void sequence(int d, const RnnShare& mine) {
    Direction& s = sides[d];
    const Range own = share(panels, 1, mine.part, mine.parts), pown = share(ppanels, 1, mine.part, mine.parts);
    Scratch<const C*> a(B);
    const int64_t ld = p.directions * P;
    for (int64_t step = S - 1; step >= 0; --step) {
      const int64_t t = d ? S - 1 - step : step;
      if (step < S - 1) recur(s, d ? t - 1 : t + 1, mine, pown, a);
      const int64_t begin = mine.row_begin, count = std::min(at.count(t), mine.row_end) - begin;
      if (project) {
        const int64_t from = pown.begin * UNITS, to = std::min(pown.end * UNITS, P);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = at.first(t) + begin + i;
          const T* grad = b.grad_output ? static_cast<const T*>(b.grad_output) + row * ld + d * P : nullptr;
          for (int64_t u = from; u < to; ++u)
            s.dhp[row * P + u] = s.dh[(begin + i) * Ps + u] + (grad ? load_one(grad + u) : C(0));
          a[i] = s.dhp + row * P;
        }
        if (mine.parts > 1) s.barrier.wait(mine.parts);
        for (int64_t n = own.begin; count > 0 && n < own.end; ++n)
          rnn_product<C, 2, 1, true, RnnSum::Set>(count, P, a, s.w_hr + n * UNITS * P, s.dm + begin * Hs + n * UNITS, Hs,
                                                  nullptr);
      }
      for (int64_t i = begin; i < begin + count; ++i)
        pointwise(s, d, t, i, own.begin * UNITS, std::min(own.end * UNITS, H));
      if (mine.parts > 1) s.barrier.wait(mine.parts);
    }
    if (b.grad_hx) recur(s, d ? S - 1 : 0, mine, pown, a);
    // With several parts each writes its own columns; a row that this thread does not own is another's.
    for (int64_t i = mine.row_begin; i < mine.row_end; ++i) {
      const int64_t u = pown.begin * UNITS, v = own.begin * UNITS;
      if (b.grad_hx)
        for (int64_t j = u; j < std::min(pown.end * UNITS, P); ++j)
          store_one(static_cast<T*>(b.grad_hx) + (d * B + i) * P + j, s.dh[i * Ps + j]);
      if (b.grad_cx && G == 4)
        for (int64_t j = v; j < std::min(own.end * UNITS, H); ++j)
          store_one(static_cast<T*>(b.grad_cx) + (d * B + i) * H + j, s.dc[i * Hs + j]);
    }
  }

  // Gradients of z for batch entry i at step t, units [begin, end).
  void pointwise(Direction& s, int d, int64_t t, int64_t i, int64_t begin, int64_t end) {
    const bool relu = p.mode == RnnMode::Relu;
    const int64_t row = at.first(t) + i, before = row_before(d, t, i), ld = p.directions * P;
    const T* grad = b.grad_output && !project ? static_cast<const T*>(b.grad_output) + row * ld + d * P : nullptr;
    const T* output = static_cast<const T*>(p.output) + row * ld + d * P;
    const C* reserve = static_cast<const C*>(p.reserve) + (d * R + row) * KEPT * H;
    const C* c_last = before < 0 ? nullptr : static_cast<const C*>(p.reserve) + (d * R + before) * KEPT * H + 4 * H;
    const T* cx = static_cast<const T*>(p.cx) + (d * B + i) * H;
    C *dz = s.dz + row * W, *dh = project ? s.dm + i * Hs : s.dh + i * Ps;
    for (int64_t u = begin; u < end; u += L) {
      const int64_t n = end - u;
      Vec<C> g = load(dh + u);
      if (grad) g += load_first(grad + u, n);
      const auto saved = [&](int slot) { return load_first(reserve + slot * H + u, n); };
      if constexpr (G == 1) {
        const Vec<C> y = load_first(output + u, n);
        g = relu ? activate_backward<Activation::Relu, C>(g, y) : activate_backward<Activation::Tanh, C>(g, y);
        store_first(dz + u, g, n);
      } else if constexpr (G == 3) {
        const Vec<C> r = saved(0), update = saved(1), fresh = saved(2), hn = saved(3);
        const Vec<C> da = g * (C(1) - update) * (C(1) - fresh * fresh);
        store_first(dz + u, da * hn * r * (C(1) - r), n);
        store_first(dz + H + u, g * (load_first(s.h_last[row] + u, n) - fresh) * update * (C(1) - update), n);
        store_first(dz + 2 * H + u, da * r, n);
        store_first(dz + 3 * H + u, da, n);
        store(dh + u, g * update);
      } else {
        const Vec<C> in = saved(0), f = saved(1), fresh = saved(2), o = saved(3), th = vtanh(saved(4));
        const Vec<C> last = c_last ? load_first(c_last + u, n) : load_first(cx + u, n);
        const Vec<C> dc = fma(g * o, C(1) - th * th, load(s.dc + i * Hs + u));
        store_first(dz + u, dc * fresh * in * (C(1) - in), n);
        store_first(dz + H + u, dc * last * f * (C(1) - f), n);
        store_first(dz + 2 * H + u, dc * in * (C(1) - fresh * fresh), n);
        store_first(dz + 3 * H + u, g * th * o * (C(1) - o), n);
        store(s.dc + i * Hs + u, dc * f);
        if (project) store_first(s.m + row * H + u, o * th, n);
      }
    }
  }

  // The gradients that are one product over all rows.
  void finish(const T** x_rows) {
    for (int64_t t = 0; t < S; ++t)
      for (int64_t i = 0; i < at.count(t); ++i)
        x_rows[at.first(t) + i] = at.template input<T>(p, t) + i * p.stride_batch;
    for (int d = 0; d < p.directions; ++d) {
      const Direction& s = sides[d];
      const auto& grads = b.grad_weights[d];
      const auto weight = [&](void* out, int64_t rows, int64_t cols, const C* a, int64_t a_ld, const T* const* of) {
        if (out)
          gemm<C>(rows, cols, R, StridedA<C, C>{a, 1, a_ld}, RnnRowsB<C, T>{of}, RnnStore<T, C>{static_cast<T*>(out), cols},
                  p.threads);
      };
      const int64_t shared = G == 3 ? 2 * H : G * H;  // gates whose dz is the same for W_ih and W_hh
      weight(grads.weight_ih, shared, I, s.dz, W, x_rows);
      weight(grads.weight_hh, G * H, P, s.dz, W, s.h_last);
      if (G == 3 && grads.weight_ih) weight(static_cast<T*>(grads.weight_ih) + shared * I, H, I, s.dz + 3 * H, W, x_rows);
      if (project && grads.weight_hr)
        gemm<C>(P, H, R, StridedA<C, C>{s.dhp, 1, P}, StridedB<C, C>{s.m, H, 1},
                RnnStore<T, C>{static_cast<T*>(grads.weight_hr), H}, p.threads);
      if (grads.bias_ih || grads.bias_hh) biases(s, grads.bias_ih, grads.bias_hh);
    }
    if (b.grad_input) {
      const int64_t K = G * H;
      Scratch<const T*> w_rows(K * p.directions);
      RnnGradientsA<C> a = {{sides[0].dz, sides[1].dz}, W, K, G == 3 ? 2 * H : K, G == 3 ? H : 0};
      for (int d = 0; d < p.directions; ++d)
        for (int64_t k = 0; k < K; ++k) w_rows[d * K + k] = static_cast<const T*>(p.weights[d].weight_ih) + k * I;
      gemm<C>(R, I, K * p.directions, a, RnnRowsB<C, T>{w_rows}, RnnStore<T, C>{static_cast<T*>(b.grad_input), I},
              p.threads);
    }
  }

  // Column sums of dz, rows in blocks of 64 so that rounding errors do not pile up.
  void biases(const Direction& s, void* ih, void* hh) {
    parallel(worth_threads(p.threads, 1.0 * R * W, 4.0 * R * W), [&](int thread, int threads) {
      const Range r = share(W, 64, thread, threads);
      for (int64_t j = r.begin; j < r.end; j += L) {
        const int64_t n = std::min<int64_t>(L, r.end - j);
        Vec<C> total = zero<C>();
        for (int64_t row = 0; row < R; row += 64) {
          Vec<C> sum = zero<C>();
          for (int64_t k = row; k < std::min(row + 64, R); ++k) sum += load_first(s.dz + k * W + j, n);
          total += sum;
        }
        for (int64_t lane = 0; lane < n; ++lane) {
          const int64_t column = j + lane;
          if (ih && (G != 3 || column < 2 * H || column >= 3 * H))
            store_one(static_cast<T*>(ih) + (G == 3 && column >= 3 * H ? column - H : column), C(total[lane]));
          if (hh && column < G * H) store_one(static_cast<T*>(hh) + column, C(total[lane]));
        }
      }
    });
  }
};

inline void rnn_backward(const RnnBackwardParams& params) {
  rnn_with_type(params.forward.dtype, params.forward.mode, [&](auto t, auto gates) {
    RnnBackward<decltype(t), decltype(gates)::value>{params}.run();
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA
