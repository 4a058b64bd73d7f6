// One recurrent layer over a whole sequence, in one or two directions: RNN (tanh, relu), LSTM (with projection), GRU.
//
//   tanh, relu  h' = f(W_ih x + b_ih + W_hh h + b_hh)
//   LSTM        i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c' = σ(f) c + σ(i) tanh(g);  h' = W_hr (σ(o) tanh(c'))
//   GRU         r, z = σ(W_ih x + b_ih + W_hh h + b_hh);  n = tanh(W_in x + b_in + r (W_hn h + b_hn));
//               h' = (1 - z) n + z h
//
// With layer norm W_ih x and W_hh h become γ_ih LN(W_ih x) and γ_hh LN(W_hh h), each normalised over all gates together, and
// LSTM's h' becomes W_hr (σ(o) tanh(γ_c LN(c') + β_c)); LN(v) = (v - mean(v)) / sqrt(variance(v) + 1e-5). With zoneout what
// the formulas above call h' is h̃, and h' = k h + (1 - k) h̃ for a k of each element.
//
// Sizes: S steps, B batch, I input_size, H hidden_size, P state_size (proj_size, or H without projection), D directions,
// G gates (1, 4, 3), R rows (S·B; of a packed sequence the sum of batch_sizes). A row is one (step, batch) pair, steps
// outermost. Everything is contiguous but the input.
#pragma once

#include "fastnn/types.h"

namespace fastnn {

enum class RnnMode : int32_t { Tanh, Relu, Lstm, Gru };

struct RnnModeRow {
  const char* name;
  RnnMode mode;
  int gates;     // blocks of hidden_size rows in weight_ih and weight_hh
  int reserved;  // values of compute type that training keeps for each row and unit: gates after activation, cells
};

inline constexpr RnnModeRow kRnnModes[] = {
    {"RNN_TANH", RnnMode::Tanh, 1, 0},
    {"RNN_RELU", RnnMode::Relu, 1, 0},
    {"LSTM", RnnMode::Lstm, 4, 5},  // i, f, g, o, c
    {"GRU", RnnMode::Gru, 3, 4},    // r, z, n, W_hn h + b_hn
};

inline constexpr const RnnModeRow& rnn_mode_row(RnnMode mode) { return kRnnModes[static_cast<int>(mode)]; }

inline constexpr double kRnnNormEps = 1e-5;  // added to the variance

struct RnnWeights {
  const void* weight_ih = nullptr;  // [G·H, I]
  const void* weight_hh = nullptr;  // [G·H, P]
  const void* bias_ih = nullptr;    // [G·H] or null
  const void* bias_hh = nullptr;    // [G·H] or null
  const void* weight_hr = nullptr;  // [P, H] or null
  // γ_ih, γ_hh [G·H], and for LSTM γ_c, β_c [H]; null: no layer norm
  const void *norm_ih = nullptr, *norm_hh = nullptr, *norm_c_weight = nullptr, *norm_c_bias = nullptr;
  const void* packed = nullptr;  // [rnn_packed_size] of compute type, all of these but norms as rnn_pack left them
};

struct RnnParams {
  DType dtype;
  RnnMode mode;
  int threads;
  int directions;              // 2: the second one runs backwards in time
  int64_t steps, batch, rows;  // S, B, R
  int64_t input_size, hidden_size, state_size;
  const int64_t* batch_sizes = nullptr;  // [S], not increasing: a packed sequence; null: B rows at each step
  const void* input;  // element (s, b, i) at s * stride_step + b * stride_batch + i; packed: row r at r * stride_batch
  int64_t stride_step, stride_batch;
  const void* hx;            // [D, B, P]
  const void* cx = nullptr;  // [D, B, H], LSTM only
  RnnWeights weights[2];
  const uint8_t* zoneout_mask = nullptr;  // [D, R, P], k of each element, 0 or not; null: k is `zoneout`
  double zoneout = 0;
  void* output;             // [R, D·P]
  void* h_n = nullptr;      // [D, B, P] or null
  void* c_n = nullptr;      // [D, B, H], LSTM only
  void* reserve = nullptr;  // [D, R, rnn_reserved] of compute type, or null: inference

  bool normed() const { return weights[0].norm_ih != nullptr; }
  bool zoned() const { return zoneout_mask != nullptr || zoneout > 0; }
};

// What training keeps of a row, in this order: gates and cells as kRnnModes says, for RNN with zoneout h̃ [H]; with layer
// norm LN(W_ih x) [G·H], LN(W_hh h) [G·H], 1/std of both, and for LSTM mean and 1/std of c'.
inline int64_t rnn_kept(const RnnParams& p) {
  const RnnModeRow& row = rnn_mode_row(p.mode);
  return (row.reserved + (row.gates == 1 && p.zoned())) * p.hidden_size;
}
inline int64_t rnn_reserved(const RnnParams& p) {
  const int gates = rnn_mode_row(p.mode).gates;
  return rnn_kept(p) + (p.normed() ? 2 * gates * p.hidden_size + (p.mode == RnnMode::Lstm ? 4 : 2) : 0);
}

struct RnnBackwardParams {
  RnnParams forward;                  // h_n, c_n unused; output and reserve as training left them
  const void* grad_output = nullptr;  // [R, D·P] or null: zero
  const void* grad_h_n = nullptr;     // [D, B, P] or null: zero
  const void* grad_c_n = nullptr;     // [D, B, H] or null: zero
  void* grad_input = nullptr;         // [R, I] or null: not wanted
  void* grad_hx = nullptr;            // [D, B, P] or null
  void* grad_cx = nullptr;            // [D, B, H] or null
  struct {
    void *weight_ih = nullptr, *weight_hh = nullptr, *bias_ih = nullptr, *bias_hh = nullptr, *weight_hr = nullptr;
    void *norm_ih = nullptr, *norm_hh = nullptr, *norm_c_weight = nullptr, *norm_c_bias = nullptr;
  } grad_weights[2];  // shapes of the weights, each null where not wanted
};

struct RnnPack {
  DType dtype;
  RnnMode mode;
  bool project;  // whether there is a weight_hr
  int64_t input_size, hidden_size, state_size;
  RnnWeights weights;      // of one direction
  void* packed = nullptr;  // [rnn_packed_size] of compute type: panels of the ISA's vector width
};

namespace cpu {
void rnn_forward(const RnnParams& params);
void rnn_backward(const RnnBackwardParams& params);
int64_t rnn_packed_size(const RnnPack& params);  // in elements of the compute type; reads the sizes alone
void rnn_pack(const RnnPack& params);
}  // namespace cpu

}  // namespace fastnn
