// Scaled dot-product attention: output = dropout(softmax(cap(scale · query · keyᵀ) + mask)) · value, for each head.
//
// A "head" is one (query, key, value) problem: one index into the broadcast leading dimensions, numbered in row-major
// order. `group` consecutive heads share a key and a value (grouped-query attention). Where each head starts is listed,
// so any broadcast and any strides of the leading dimensions are served.
#pragma once

#include <cstdint>

#include "fastnn/cuda.h"
#include "fastnn/types.h"

namespace fastnn {

// Query l may see the keys l + first_shift … l + last_shift (both included, cut to 0 … key_length - 1).
inline constexpr int64_t kAttentionNoLimit = int64_t{1} << 40;

enum class AttentionMask : int32_t {
  None,
  Bool,     // bytes: nonzero where the query may see the key
  Query,    // added to the scores; of the dtype of query
  Float32,  // added to the scores
};

// One operand: head h starts `offset[h]` elements after `data`.
struct AttentionOperand {
  const void* data;
  const int64_t* offset;  // elements: [heads], for key and value [heads / group]
  int64_t row_stride;     // between positions, elements
  int64_t col_stride;     // between features (mask: between keys), elements; 0 where broadcast
};
struct AttentionResult {
  void* data;             // null: not wanted
  const int64_t* offset;  // elements, as above
  int64_t row_stride;     // features lie next to each other
};

struct AttentionParams {
  DType dtype;  // of query, key, value, output and their gradients
  int64_t heads, group;
  int64_t query_length, key_length, head_dim, value_dim;

  AttentionOperand query;  // [query_length, head_dim] each
  AttentionOperand key;    // [key_length, head_dim] each
  AttentionOperand value;  // [key_length, value_dim] each
  AttentionOperand mask;   // [query_length, key_length] each
  AttentionMask mask_type;

  double scale, softcap;  // softcap 0: none; else score = softcap · tanh(score / softcap), before the mask is added
  double dropout_p;
  uint64_t philox_seed;
  int64_t first_shift, last_shift;
  bool nan_unseen;  // a query that may see no key gets NaN, as softmax of -infinities is; else zeros, and lse -infinity

  AttentionResult output;  // [query_length, value_dim] each
  void* lse;               // [heads, query_length], float (double for Float64): log of the sum of the exponentials
  void *maximum, *sum;     // as lse: each query's largest score, and the sum of the exponentials below it; may be null
  int threads;
};

struct AttentionWeightsParams {
  AttentionParams forward;  // its maximum and sum are inputs here; value, output and lse are not used
  int64_t averaged;         // how many consecutive heads the mean is taken of; 1: each head's own weights
  void* weights;            // [heads / averaged, query_length, key_length], contiguous, of dtype
};

struct AttentionBackwardParams {
  AttentionParams forward;       // its output and lse are inputs here
  AttentionOperand grad_output;  // [query_length, value_dim] each
  const void* grad_lse;          // [heads, query_length], type of lse; may be null

  AttentionResult grad_query;  // [query_length, head_dim] each
  AttentionResult grad_key;    // [key_length, head_dim] each of heads / group
  AttentionResult grad_value;  // [key_length, value_dim] each of heads / group

  // Gradient of an additive mask, summed over what the mask was broadcast along. [mask_heads, mask_rows, mask_cols],
  // contiguous, in the type of lse; head h adds to mask_index[h]; rows or cols are 1 where broadcast. May be null.
  void* grad_mask;
  const int64_t* mask_index;  // [heads]
  int64_t mask_heads, mask_rows, mask_cols;
};

// Dropout, the same in every kernel and in fastnn/reference.py: the probability at (head, query l, key s) is kept
// when word >= dropout_p · 2³², where word is output (s % 32) / 8 of Philox4x32-10 with the seed as its key (low half
// first) and the counter (s / 32 · 8 + s % 8, l, head, 0).

namespace cpu {
void attention_forward(const AttentionParams& params);
void attention_weights(const AttentionWeightsParams& params);
void attention_backward(const AttentionBackwardParams& params);
}  // namespace cpu

namespace cuda {

// Pointers are the device's, but the lists of offsets stay in host memory: they are read before this returns, and reach
// the kernels by value, as up to six digits of the head's number (see HeadOffsets) times their strides. Every list that
// broadcast leading dimensions give can be told so, up to six of them that do not merge; for another the Status says
// so. `philox_seed` is on the device, read by the kernel, so that a captured graph draws anew; null:
// params.philox_seed. `threads` is the CPU's.
Status attention_forward(const AttentionParams& params, const int64_t* philox_seed, const Workspace& workspace,
                         Stream stream);

// No workspace is needed.
Status attention_weights(const AttentionWeightsParams& params, const int64_t* philox_seed, Stream stream);

// forward's maximum and sum are not used; mask_index is read as the lists of offsets are.
Status attention_backward(const AttentionBackwardParams& params, const int64_t* philox_seed, const Workspace& workspace,
                          Stream stream);

}  // namespace cuda

}  // namespace fastnn
