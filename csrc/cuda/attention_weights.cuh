// weights = dropout(softmax(scores)), or their mean over the heads, from each row's maximum and sum as attention left
// them: a weight of 1 is 1.
//
// A block owns 64 queries x 64 keys of a result and walks over the heads that it is the mean of, in their order; the
// scores come by the slices of attention_backward.cuh, four stages ahead. No atomics, nothing is summed between blocks.
//
// Bound by the FMA units, 2 · head_dim flops a score, in 16 bits and with few features by the store. No tensor cores
// yet. No figure: not yet measured on a GPU.
#pragma once

#include "cuda/attention_backward.cuh"

namespace fastnn::cuda {

struct AttentionWeights {
  AttentionForward forward;  // maximum and sum are inputs
  void* weights;             // [heads / averaged, query_length, key_length]
  int averaged;
};

template <class T>
struct AttentionWeightsKernel {
  using C = Compute<T>;
  using Slices = AttentionGradKernel<T, AttentionGrad::Mask>;
  static constexpr int kThreads = Slices::kThreads, kSide = Slices::kSide, kDepth = Slices::kDepth;
  static constexpr int kStages = 4, kSlice = kDepth * Slices::kPitch;
  static constexpr int kSharedBytes = static_cast<int>(sizeof(C)) * kStages * 2 * kSlice;

  // Of one head: what a thread's four queries by four keys weigh is added to `sums`.
  static FASTNN_DEVICE void add(const AttentionForward& p, uint64_t seed, uint32_t head, int query0, int key0,
                                const C (&s)[4][4], C (&sums)[4][4]) {
    const C c = static_cast<C>(p.factor), cap = static_cast<C>(p.softcap);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const AttentionRow row = {head, query0 + i};
      if (row.query >= p.query_length) continue;
      const int first = row.query + p.first_shift, last = row.query + p.last_shift;
      const C top = static_cast<const C*>(p.maximum)[row.number(p)], sum = static_cast<const C*>(p.sum)[row.number(p)];
      const C safe = safe_top(top), inverse = sum == C(0) ? static_cast<C>(p.unseen) : C(1) / sum;
      const unsigned char* const mask = mask_row<T>(p, row);
      Vector<uint32_t, 4> words{};
      if (p.drop_below) words = philox(seed, row, key0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = key0 + 8 * j;
        if (key >= p.key_length) continue;
        const int64_t at = key * p.mask.col_stride;
        C score = s[i][j] * static_cast<C>(p.scale);
        if (cap != C(0)) score = cap * tanh_of(score);
        if (p.mask_type == AttentionMask::Bool) score = masked(score, mask[at]);
        if (p.mask_type == AttentionMask::Query) score = masked(score, reinterpret_cast<const T*>(mask)[at]);
        if (p.mask_type == AttentionMask::Float32) score = masked(score, reinterpret_cast<const float*>(mask)[at]);
        if (key < first || key > last) score = kMinusInfinity<C>;
        const C weight = exp2_of((score - safe) * c) * inverse;
        if (words.data[j] >= p.drop_below) sums[i][j] += weight;
      }
    }
  }

  static FASTNN_DEVICE void run(const AttentionWeights& w) {
    const AttentionForward& p = w.forward;
    C* const ring = reinterpret_cast<C*>(ptx::dynamic_shared());
    const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
    const int L = p.query_length, S = p.key_length, D = p.head_dim;
    const uint32_t rows = (L + kSide - 1) / kSide, cols = (S + kSide - 1) / kSide;
    const uint32_t result = blockIdx.x / (rows * cols);
    const int query0 = static_cast<int>(blockIdx.x / cols % rows) * kSide;
    const int key0 = static_cast<int>(blockIdx.x % cols) * kSide;
    const int slices = D > 0 ? (D + kDepth - 1) / kDepth : 1;

    int next_turn = 0, next_slice = 0, into = 0, from = 0;
    typename Slices::Matrix query, key;
    const auto load_next = [&] {
      if (next_turn < w.averaged) {
        if (next_slice == 0) {
          const uint32_t head = result * w.averaged + next_turn;
          query = Slices::matrix(p.query, head, L, D);
          key = Slices::matrix(p.key, head / static_cast<uint32_t>(p.group), S, D);
        }
        C* const stage = ring + into * 2 * kSlice;
        Slices::template copy_slice<false>(stage, query, query0, next_slice * kDepth);
        Slices::template copy_slice<true>(stage + kSlice, key, key0, next_slice * kDepth);
        if (++next_slice == slices) next_slice = 0, ++next_turn;
      }
      ptx::cp_async_commit();
      into = into + 1 == kStages ? 0 : into + 1;
    };

    const uint64_t seed = philox_seed(p);
    C sums[4][4] = {};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load_next();
#pragma unroll 1
    for (int turn = 0; turn < w.averaged; ++turn) {
      C s[4][4] = {};
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();
        load_next();
        const C* const stage = ring + from * 2 * kSlice;
        from = from + 1 == kStages ? 0 : from + 1;
        Slices::multiply(s, stage + 4 * ty, stage + kSlice + 4 * tx);
      }
      add(p, seed, result * w.averaged + turn, query0 + 4 * ty, key0 + Slices::template position<true>(tx, 0), s, sums);
    }
    ptx::cp_async_wait<0>();

    const C factor = static_cast<C>(p.keep / w.averaged);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = query0 + 4 * ty + i;
      T* const to = static_cast<T*>(w.weights) + (int64_t{result} * L + row) * S;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int col = key0 + Slices::template position<true>(tx, j);
        if (row < L && col < S) to[col] = narrow<T>(sums[i][j] * factor);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(256, 1) attention_weights_kernel(__grid_constant__ const AttentionWeights w) {
  AttentionWeightsKernel<T>::run(w);
}

}  // namespace fastnn::cuda
