// The table of recurrent kernels that each ISA's stub exports.
#pragma once

#include "fastnn/rnn.h"

namespace fastnn::cpu {

struct RnnKernels {
  void (*forward)(const RnnParams&);
  void (*backward)(const RnnBackwardParams&);
  int64_t (*packed_size)(const RnnPack&);
  void (*pack)(const RnnPack&);
};

// A weight is packed where enough rows of it repay that; a few steps at batch one, or a cell of few rows, run on dot
// products along the weight's own rows. A sequence packs all of it first, which costs more the less of it stays in cache.
// But a 16-bit weight would be widened again for each row.
inline bool rnn_packs(const RnnParams& p) {
  const int64_t weights = rnn_mode_row(p.mode).gates * p.hidden_size * (p.input_size + p.state_size);
  // One step packs a panel at a time and uses it at once. From 2^22 elements on they come from memory, where dot products
  // read faster.
  if (p.steps == 1 && p.dtype <= DType::Float64) return p.rows > (weights <= 1 << 16 ? 4 : weights <= 1 << 22 ? 9 : 22);
  return p.rows > (p.dtype <= DType::Float64 ? 8 + weights / 32768 : 2 + weights / 131072);
}

// Whether dot products take a frozen matrix as it lies, though it came packed. Weights that no cache holds come sooner
// from memory by several long rows at a time than by a panel, which is one stream (RNN 2048: 26 and 22 GB/s on Zen 3);
// with more than a row or two the arithmetic decides. Not float16, which takes longer to widen than to load.
inline bool rnn_streams(const RnnParams& p, int64_t rows, int64_t depth) {
  const int64_t weights = rnn_mode_row(p.mode).gates * p.hidden_size * (p.input_size + p.state_size);
  return rows <= 2 && depth >= 1024 * rows && weights >= 1 << 22 && p.dtype != DType::Float16;
}

}  // namespace fastnn::cpu
