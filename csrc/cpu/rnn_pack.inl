// The weights of one direction as the recurrent kernels read them: panels of each matrix, and the biases merged.
//
//   w_ih  [panels][I][NV][lanes]     w_hr  [ppanels][H][2][lanes], with a projection
//   w_hh  [panels][P][NV][lanes]     bias  [panels][slots][lanes]: b_ih + b_hh; GRU's last gate b_in, and b_hn apart
//
// A panel holds a vector of units of every gate (RNN: two vectors of units); missing units are zero. The parts follow
// one another in this order, each from a multiple of 64 bytes on. A call packs them into its own memory, each thread its
// share, or reads what rnn_pack made before of frozen weights. Bound by memory: each element is read and written once.
#pragma once

#include "cpu/rnn_tile.inl"

namespace fastnn::cpu::FASTNN_ISA {

template <class C, int G>
struct RnnPanels {
  static constexpr int L = kLanes<C>;
  static constexpr int NV = G == 1 ? 2 : G;         // vectors in a panel
  static constexpr int SLOTS = G == 1 ? 2 : 4;      // vectors of bias (and of z) for a panel
  static constexpr int UNITS = G == 1 ? 2 * L : L;  // units of a panel
  static constexpr int PNV = 2, PUNITS = 2 * L;     // of the projection

  const int64_t I, H, P;
  const bool matrices, project;  // without matrices: the biases alone
  const int64_t panels = (H + UNITS - 1) / UNITS, ppanels = (P + PUNITS - 1) / PUNITS;
  // Where the parts begin, in elements; w_ih is the first.
  const int64_t w_hh = line(matrices ? panels * NV * L * I : 0);
  const int64_t w_hr = w_hh + line(matrices ? panels * NV * L * P : 0);
  const int64_t bias = w_hr + line(matrices && project ? ppanels * PUNITS * H : 0);
  const int64_t size = bias + panels * SLOTS * L;

  // A number of elements rounded up to whole cache lines.
  static constexpr int64_t line(int64_t count) {
    constexpr int64_t each = 64 / sizeof(C);
    return (count + each - 1) / each * each;
  }
  static int64_t unit(int64_t panel, int v) { return panel * UNITS + (G == 1 ? v * L : 0); }
  static int gate(int v) { return G == 1 ? 0 : v; }

  // Packs panel n of a weight [G·H, depth] into [depth][NV][lanes].
  void pack_panel(DType dtype, const void* weight, int64_t depth, int64_t n, C* to) const {
    int64_t row[NV], lanes[NV];
    for (int v = 0; v < NV; ++v)
      row[v] = gate(v) * H + unit(n, v), lanes[v] = std::clamp<int64_t>(H - unit(n, v), 0, L);
    rnn_pack_panel(dtype, weight, depth, NV, row, lanes, depth, to);
  }

  // Packs the share of one of `ranks` threads.
  void pack(DType dtype, const RnnWeights& w, C* to, int rank, int ranks) const {
    const Range r = share(panels, 1, rank, ranks);
    for (int64_t n = r.begin; n < r.end; ++n) {
      if (matrices) {
        pack_panel(dtype, w.weight_ih, I, n, to + n * NV * L * I);
        pack_panel(dtype, w.weight_hh, P, n, to + w_hh + n * NV * L * P);
      }
      for (int v = 0; v < NV; ++v) {
        alignas(64) C ih[L] = {}, hh[L] = {};
        const int64_t row = gate(v) * H + unit(n, v), lanes = std::clamp<int64_t>(H - unit(n, v), 0, L);
        if (w.bias_ih) rnn_widen(dtype, rnn_at(w.bias_ih, dtype, row), lanes, ih);
        if (w.bias_hh) rnn_widen(dtype, rnn_at(w.bias_hh, dtype, row), lanes, hh);
        C* slots = to + bias + n * SLOTS * L;
        if (G == 3 && v == 2) {
          store(slots + 2 * L, load(ih));
          store(slots + 3 * L, load(hh));
        } else {
          store(slots + v * L, load(ih) + load(hh));
        }
      }
    }
    if (!matrices || !project) return;
    const Range q = share(ppanels, 1, rank, ranks);
    for (int64_t n = q.begin; n < q.end; ++n) {
      const int64_t row[PNV] = {n * PUNITS, n * PUNITS + L};
      const int64_t lanes[PNV] = {std::min<int64_t>(P - row[0], L), std::clamp<int64_t>(P - row[1], 0, L)};
      rnn_pack_panel(dtype, w.weight_hr, H, PNV, row, lanes, H, to + w_hr + n * PUNITS * H);
    }
  }

  // Defines what lies between the parts, in memory that others see.
  void clear_between(C* to) const {
    std::fill(to + panels * NV * L * I, to + w_hh, C(0));
    std::fill(to + w_hh + panels * NV * L * P, to + w_hr, C(0));
    std::fill(to + w_hr + (project ? ppanels * PUNITS * H : 0), to + bias, C(0));
  }
};

// Calls f(compute type, number of gates as std::integral_constant).
template <class F>
auto rnn_with_type(DType dtype, RnnMode mode, const F& f) {
  const auto with_gates = [&](auto c) {
    switch (rnn_mode_row(mode).gates) {
      case 1: return f(c, std::integral_constant<int, 1>{});
      case 3: return f(c, std::integral_constant<int, 3>{});
      default: return f(c, std::integral_constant<int, 4>{});
    }
  };
  return dtype == DType::Float64 ? with_gates(double{}) : with_gates(float{});
}

inline int64_t rnn_packed_size(const RnnPack& p) {
  return rnn_with_type(p.dtype, p.mode, [&](auto c, auto gates) {
    return RnnPanels<decltype(c), decltype(gates)::value>{p.input_size, p.hidden_size, p.state_size, true, p.project}
        .size;
  });
}

inline void rnn_pack(const RnnPack& p) {
  rnn_with_type(p.dtype, p.mode, [&](auto c, auto gates) {
    using C = decltype(c);
    const RnnPanels<C, decltype(gates)::value> layout{p.input_size, p.hidden_size, p.state_size, true, p.project};
    layout.pack(p.dtype, p.weights, static_cast<C*>(p.packed), 0, 1);
    layout.clear_between(static_cast<C*>(p.packed));
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA
