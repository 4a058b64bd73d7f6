// One recurrent layer over a whole sequence, in one or two directions: RNN (tanh, relu), LSTM (with projection), GRU.
//
//   tanh, relu  h' = f(W_ih x + b_ih + W_hh h + b_hh)
//   LSTM        i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c' = σ(f) c + σ(i) tanh(g);  h' = W_hr (σ(o) tanh(c'))
//   GRU         r, z = σ(W_ih x + b_ih + W_hh h + b_hh);  n = tanh(W_in x + b_in + r (W_hn h + b_hn));
//               h' = (1 - z) n + z h
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

struct RnnWeights {
  const void* weight_ih = nullptr;  // [G·H, I]
  const void* weight_hh = nullptr;  // [G·H, P]
  const void* bias_ih = nullptr;    // [G·H] or null
  const void* bias_hh = nullptr;    // [G·H] or null
  const void* weight_hr = nullptr;  // [P, H] or null
  const void* packed = nullptr;     // [rnn_packed_size] of compute type, all of these as rnn_pack left them; or null
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
  void* output;             // [R, D·P]
  void* h_n = nullptr;      // [D, B, P] or null
  void* c_n = nullptr;      // [D, B, H], LSTM only
  void* reserve = nullptr;  // [D, R, reserved·H] of compute type, or null: inference
};

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
