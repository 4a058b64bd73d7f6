// Gradients of attention in every dtype, from the saved log-sum-exp: P = exp(S - lse) is computed again tile by tile.
//   dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ⊙ (dP - delta),  dQ = scale dS K,  dK = scale dSᵀ Q,
//   delta = rowsum(dO ⊙ O) - dlse
// with dropout on P and dP, and dS times the slope of the soft cap.
//
// One kernel for each gradient, of one text: a block owns 64 positions (queries for dQ, else keys) and 128 columns of
// their gradient (64 in double), and walks along the other side, 64 positions a step; for dK and dV over all heads that
// share the keys, in their order. An added mask's gradient is dS itself: a block owns 64x64 of it, or all that a
// broadcast mask adds up, and walks over the heads (and tiles) that it was added to. A thread has 4x4 scores and their
// dP; slices of eight features, then slices of eight positions of what the weights are multiplied by, come through one
// ring of three stages, as in attention_simt.cuh. No atomics, no sums between blocks: the same result every time.
//
// They serve float and double, heads wider than 256, sm_75, and the mask's gradient; attention_backward_sm80.cuh serves
// the rest. Bound by the FMA units: eight products where five would do, for dK and dV are made apart. No figure: not yet
// measured on a GPU.
// Source: Dao et al., "FlashAttention", arXiv 2205.14135, section 2.3.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/attention_scores.cuh"

namespace fastnn::cuda {

struct AttentionBackward {
  AttentionForward forward;                     // lse is an input; mask, scale and dropout as there
  AttentionRows grad_output, grad, grad_value;  // grad: of query, key or, apart, value; grad_value: made with the key's
  const void* grad_lse;                         // or null
  void* delta;                                  // [heads, query_length] of the compute type
  double grad_scale;
  void* grad_mask;  // [.., mask_rows, mask_cols] of the compute type
  HeadOffsets mask_index;
  int mask_rows, mask_cols, mask_turns;  // turns: how many heads add to one place
};

// The head that is the `turn`-th to add to mask `index`: where the mask was broadcast, the turn tells the digit.
FASTNN_DEVICE uint32_t head_of_mask(const HeadOffsets& mask, uint32_t index, uint32_t turn) {
  uint32_t head = 0, unit = 1;
#pragma unroll 1
  for (int i = 0; i < mask.digits; ++i) {
    const uint32_t size = mask.size[i], stride = static_cast<uint32_t>(mask.stride[i]);
    head += (stride ? index / stride : turn) % size * unit;
    if (!stride) turn /= size;
    unit *= size;
  }
  return head;
}

// One warp, one row.
template <class T>
__global__ void __launch_bounds__(128) attention_delta_kernel(__grid_constant__ const AttentionBackward b) {
  using C = Compute<T>;
  const AttentionForward& p = b.forward;
  const int64_t number = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (number >= p.rows_of_all) return;
  const AttentionRow row = {static_cast<uint32_t>(number / p.query_length), static_cast<int>(number % p.query_length)};
  const T* const output = output_row<T>(p, row);
  const T* const grad =
      static_cast<const T*>(b.grad_output.data) + b.grad_output.heads(row.head) + row.query * b.grad_output.row_stride;
  C sum = C(0);
  for (int n = static_cast<int>(threadIdx.x) % 32; n < p.value_dim; n += 32)
    sum += widen(grad[n * b.grad_output.col_stride]) * widen(output[n]);
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  if (threadIdx.x % 32 == 0)
    static_cast<C*>(b.delta)[number] = sum - (b.grad_lse ? static_cast<const C*>(b.grad_lse)[number] : C(0));
}

// What is taken off scores: a row with no key to see has lse -infinity, and P = 0.
template <class C>
FASTNN_DEVICE C safe_lse(C lse) {
  return lse == kMinusInfinity<C> ? -lse : lse;
}

enum class AttentionGrad { Query, Key, Value, Mask };

template <class T, AttentionGrad OF>
struct AttentionGradKernel {
  using C = Compute<T>;
  static constexpr bool kOfMask = OF == AttentionGrad::Mask, kOfValue = OF == AttentionGrad::Value;
  static constexpr bool kOfQuery = OF == AttentionGrad::Query || kOfMask;  // the block owns queries, walks along keys
  static constexpr int kThreads = 256, kSide = 64, kDepth = 8, kStages = 3, kPitch = kSide + 4;
  static constexpr int kCols = sizeof(C) == 8 ? 64 : 128, kQuarters = kCols / 64, kSteps = kSide / kDepth;
  static constexpr int kStage = 2 * kDepth * kPitch > kDepth* kCols ? 2 * kDepth * kPitch : kDepth * kCols;
  static constexpr int kSharedBytes = static_cast<int>(sizeof(C)) * (kStages * kStage + kSide * kPitch);
  static constexpr int kEach = kSide * kDepth / kThreads, kEachColumn = kCols * kDepth / kThreads;

  // Positions of a thread: keys s, s + 8, s + 16, s + 24, which one Philox serves, and four queries in a row. `place`
  // is where a position lies in a slice, so that a thread's four follow each other.
  template <bool KEYS>
  static FASTNN_HOST_DEVICE constexpr int position(int t, int i) {
    return KEYS ? t / 8 * 32 + t % 8 + 8 * i : 4 * t + i;
  }
  template <bool KEYS>
  static FASTNN_HOST_DEVICE constexpr int place(int s) {
    return KEYS ? (s / 32 * 8 + s % 8) * 4 + s / 8 % 4 : s;
  }

  // An operand of one head.
  struct Matrix {
    const T* data;
    int64_t row, col;
    int rows, cols;
  };
  static FASTNN_DEVICE Matrix matrix(const AttentionRows& x, uint32_t head, int rows, int cols) {
    return {static_cast<const T*>(x.data) + x.heads(head), x.row_stride, x.col_stride, rows, cols};
  }
  static FASTNN_DEVICE void copy(C* to, const Matrix& x, int row, int col) {
    const bool inside = row < x.rows && col < x.cols;
    const T* const from = inside ? x.data + row * x.row + col * x.col : x.data;
    if constexpr (sizeof(T) == sizeof(C))
      ptx::cp_async<sizeof(C)>(to, from, inside ? static_cast<int>(sizeof(C)) : 0);
    else
      ptx::shared_store<C>(to, inside ? widen(*from) : C(0));
  }
  template <bool KEYS>
  static FASTNN_DEVICE void copy_slice(C* to, const Matrix& x, int first, int col) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads, s = index / kDepth, e = index % kDepth;
      copy(to + e * kPitch + place<KEYS>(s), x, first + s, col + e);
    }
  }

  static FASTNN_DEVICE void load_four(C (&values)[4], const C* from) {
    constexpr int L = kLanes<C>;
#pragma unroll
    for (int i = 0; i < 4; i += L) {
      const auto part = ptx::shared_load<Vector<C, L>>(from + i);
#pragma unroll
      for (int j = 0; j < L; ++j) values[i + j] = part.data[j];
    }
  }
  static FASTNN_DEVICE void multiply(C (&s)[4][4], const C* own, const C* walk) {
#pragma unroll
    for (int e = 0; e < kDepth; ++e) {
      C left[4], right[4];
      load_four(left, own + e * kPitch), load_four(right, walk + e * kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] += left[i] * right[j];
    }
  }

  // What the score of (query, key) weighs in this gradient; `kept`: dropout's word.
  static FASTNN_DEVICE C weigh(const AttentionBackward& b, const AttentionRow& row, int key, const unsigned char* mask,
                               C s, C dp, bool kept, C lse, C delta) {
    const AttentionForward& p = b.forward;
    const int first = row.query + p.first_shift, last = row.query + p.last_shift;
    if (row.query >= p.query_length || key >= p.key_length || key < first || key > last) return C(0);
    const C cap = static_cast<C>(p.softcap), keep = static_cast<C>(p.keep);
    C slope = C(1);
    s *= static_cast<C>(p.scale);
    if (cap != C(0)) {
      const C t = tanh_of(s);
      s = cap * t, slope = C(1) - t * t;
    }
    const int64_t at = key * p.mask.col_stride;
    if (p.mask_type == AttentionMask::Bool) s = masked(s, mask[at]);
    if (p.mask_type == AttentionMask::Query) s = masked(s, reinterpret_cast<const T*>(mask)[at]);
    if (p.mask_type == AttentionMask::Float32) s = masked(s, reinterpret_cast<const float*>(mask)[at]);
    const C factor = static_cast<C>(p.factor) / kLog2E<C>;
    const C weight = exp2_of((s * factor - safe_lse(lse)) * kLog2E<C>);
    if constexpr (kOfValue) return kept ? weight * keep : C(0);
    const C grad = weight * ((kept ? dp * keep : C(0)) - delta);
    return kOfMask ? grad : grad * slope;
  }

  // What a block has to do: turns, each a head and a tile of either side.
  struct Walk {
    uint32_t item, first_head;
    int first_own, own_tiles, first_walk, walk_tiles, turns;
  };
  struct Turn {
    uint32_t head;
    int own, walk;  // their first positions
  };
  static FASTNN_DEVICE Walk walk_of(const AttentionBackward& b) {
    const AttentionForward& p = b.forward;
    const int L = p.query_length, S = p.key_length, all = ((kOfQuery ? L : S) + kSide - 1) / kSide;
    if constexpr (kOfMask) {
      const int of_queries = (L + kSide - 1) / kSide, of_keys = (S + kSide - 1) / kSide;
      const uint32_t rows = b.mask_rows == 1 ? 1 : of_queries, cols = b.mask_cols == 1 ? 1 : of_keys;
      Walk w = {blockIdx.x / (rows * cols),
                0,
                static_cast<int>(blockIdx.x / cols % rows),
                1,
                static_cast<int>(blockIdx.x % cols),
                1,
                0};
      if (b.mask_rows == 1) w.own_tiles = of_queries;
      if (b.mask_cols == 1) w.walk_tiles = of_keys;
      w.turns = b.mask_turns * w.own_tiles * w.walk_tiles;
      return w;
    }
    Walk w = {blockIdx.x / static_cast<uint32_t>(all),
              0,
              static_cast<int>(blockIdx.x % static_cast<uint32_t>(all)),
              1,
              0,
              0,
              0};
    w.first_head = kOfQuery ? w.item : w.item * static_cast<uint32_t>(p.group);
    const int own0 = w.first_own * kSide, own1 = own0 + kSide < (kOfQuery ? L : S) ? own0 + kSide : (kOfQuery ? L : S);
    // What of the other side is seen by any of the block's positions.
    const int begin = kOfQuery ? cut(own0 + p.first_shift, 0, S) : cut(own0 - p.last_shift, 0, L);
    const int end = kOfQuery ? cut(own1 + p.last_shift, 0, S) : cut(own1 - p.first_shift, 0, L);
    w.first_walk = begin / kSide, w.walk_tiles = begin < end ? (end + kSide - 1) / kSide - w.first_walk : 0;
    w.turns = w.walk_tiles * (kOfQuery ? 1 : p.group);
    return w;
  }
  static FASTNN_DEVICE Turn turn_of(const AttentionBackward& b, const Walk& w, int turn) {
    const int tiles = w.own_tiles * w.walk_tiles, head = turn / tiles;
    return {kOfMask ? head_of_mask(b.mask_index, w.item, head) : w.first_head + head,
            (w.first_own + turn / w.walk_tiles % w.own_tiles) * kSide, (w.first_walk + turn % w.walk_tiles) * kSide};
  }

  // What each walked position weighs: a row of the thread's four owned ones.
  static FASTNN_DEVICE void store_weights(C* weights, const C (&s)[4][4], int ty, int tx) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; i += kLanes<C>) {
        Vector<C, kLanes<C>> part;
#pragma unroll
        for (int l = 0; l < kLanes<C>; ++l) part.data[l] = s[i + l][j];
        ptx::shared_store(weights + position<kOfQuery>(tx, j) * kPitch + 4 * ty + i, part);
      }
  }
  static FASTNN_DEVICE void multiply_columns(C (&out)[4][kQuarters][4], const C* weights, const C* columns) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      C weight[4], column[kQuarters][4];
      load_four(weight, weights + k * kPitch);
#pragma unroll
      for (int q = 0; q < kQuarters; ++q) load_four(column[q], columns + k * kCols + 64 * q);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int q = 0; q < kQuarters; ++q)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[i][q][j] += weight[i] * column[q][j];
    }
  }
  static FASTNN_DEVICE void store(const AttentionBackward& b, const Walk& w, const C (&out)[4][kQuarters][4], int ty,
                                  int tx) {
    const AttentionForward& p = b.forward;
    const C factor = kOfValue ? C(1) : static_cast<C>(b.grad_scale);
    const int col0 = static_cast<int>(blockIdx.z) * kCols, width = kOfValue ? p.value_dim : p.head_dim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = w.first_own * kSide + position<!kOfQuery>(ty, i);
      if (own >= (kOfQuery ? p.query_length : p.key_length)) continue;
      T* const to = static_cast<T*>(const_cast<void*>(b.grad.data)) + b.grad.heads(w.item) + own * b.grad.row_stride;
#pragma unroll
      for (int q = 0; q < kQuarters; ++q)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int col = col0 + 64 * q + 4 * tx + j;
          if (col < width) to[col] = narrow<T>(out[i][q][j] * factor);
        }
    }
  }

  // Sums over what the mask was broadcast along, in a fixed order, and the store.
  static FASTNN_DEVICE void store_mask(const AttentionBackward& b, const Walk& w, C (&sums)[4][4], C* shared, int ty,
                                       int tx) {
    if (b.mask_cols == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i][0] += sums[i][1] + sums[i][2] + sums[i][3];
#pragma unroll
        for (int apart = 8; apart > 0; apart /= 2) sums[i][0] += __shfl_xor_sync(0xffffffffu, sums[i][0], apart);
      }
    }
    if (b.mask_rows == 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        ptx::shared_store(shared + ty * kSide + 4 * tx + j, sums[0][j] + sums[1][j] + sums[2][j] + sums[3][j]);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[0][j] = C(0);
        for (int t = 0; t < 16; ++t) sums[0][j] += ptx::shared_load<C>(shared + t * kSide + 4 * tx + j);
      }
    }
    C* const to = static_cast<C*>(b.grad_mask) + int64_t{w.item} * b.mask_rows * b.mask_cols;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool one_row = b.mask_rows == 1, one_col = b.mask_cols == 1;
        if ((one_row && (ty > 0 || i > 0)) || (one_col && (tx > 0 || j > 0))) continue;
        const int row = one_row ? 0 : w.first_own * kSide + 4 * ty + i;
        const int col = one_col ? 0 : w.first_walk * kSide + position<true>(tx, j);
        if (row < b.mask_rows && col < b.mask_cols) to[int64_t{row} * b.mask_cols + col] = sums[i][j];
      }
  }

  static FASTNN_DEVICE void run(const AttentionBackward& b) {
    const AttentionForward& p = b.forward;
    C *const ring = reinterpret_cast<C*>(ptx::dynamic_shared()), *const weights = ring + kStages * kStage;
    const int thread = static_cast<int>(threadIdx.x), ty = thread / 16, tx = thread % 16;
    const int L = p.query_length, S = p.key_length, D = p.head_dim, V = p.value_dim;
    const Walk w = walk_of(b);
    const int col0 = static_cast<int>(blockIdx.z) * kCols;
    const int depth_steps = D > 0 ? (D + kDepth - 1) / kDepth : 1;
    const int value_steps = kOfValue ? 0 : (V + kDepth - 1) / kDepth;
    const int parts = depth_steps + value_steps + (kOfMask ? 0 : kSteps);

    Matrix query, key, value, grad;
    Turn loaded = {};
    int next = 0, next_part = 0, into = 0;
    const auto load_next = [&] {
      if (next < w.turns) {
        C *const own = ring + into * kStage, *const walk = own + kDepth * kPitch;
        if (next_part == 0) {
          loaded = turn_of(b, w, next);
          const uint32_t shared_head = loaded.head / static_cast<uint32_t>(p.group);
          query = matrix(p.query, loaded.head, L, D), grad = matrix(b.grad_output, loaded.head, L, V);
          key = matrix(p.key, shared_head, S, D), value = matrix(p.value, shared_head, S, V);
        }
        if (next_part < depth_steps) {
          const int col = next_part * kDepth;
          copy_slice<!kOfQuery>(own, kOfQuery ? query : key, loaded.own, col);
          copy_slice<kOfQuery>(walk, kOfQuery ? key : query, loaded.walk, col);
        } else if (next_part < depth_steps + value_steps) {
          const int col = (next_part - depth_steps) * kDepth;
          copy_slice<!kOfQuery>(own, kOfQuery ? grad : value, loaded.own, col);
          copy_slice<kOfQuery>(walk, kOfQuery ? value : grad, loaded.walk, col);
        } else {
          const int row = loaded.walk + (next_part - depth_steps - value_steps) * kDepth;
#pragma unroll
          for (int i = 0; i < kEachColumn; ++i) {
            const int index = thread + i * kThreads;
            copy(own + index, kOfQuery ? key : kOfValue ? grad : query, row + index / kCols, col0 + index % kCols);
          }
        }
        if (++next_part == parts) next_part = 0, ++next;
      }
      ptx::cp_async_commit();
      into = into + 1 == kStages ? 0 : into + 1;
    };
    int from = 0;
    const auto landed = [&] {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      load_next();
      const C* const stage = ring + from * kStage;
      from = from + 1 == kStages ? 0 : from + 1;
      return stage;
    };

    const uint64_t seed = philox_seed(p);
    C out[4][kQuarters][4] = {}, sums[4][4] = {};
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load_next();
#pragma unroll 1
    for (int turn = 0; turn < w.turns; ++turn) {
      const Turn now = turn_of(b, w, turn);
      C s[4][4] = {}, dp[4][4] = {};
#pragma unroll 1
      for (int step = 0; step < depth_steps; ++step) {
        const C* const stage = landed();
        multiply(s, stage + 4 * ty, stage + kDepth * kPitch + 4 * tx);
      }
#pragma unroll 1
      for (int step = 0; step < value_steps; ++step) {
        const C* const stage = landed();
        multiply(dp, stage + 4 * ty, stage + kDepth * kPitch + 4 * tx);
      }
      const int queries = kOfQuery ? now.own + 4 * ty : now.walk + 4 * tx;
      const int keys = (kOfQuery ? now.walk : now.own) + position<true>(kOfQuery ? tx : ty, 0);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const AttentionRow row = {now.head, queries + q};
        const bool there = row.query < L;
        const int64_t number = row.number(p);
        const C lse = there ? static_cast<const C*>(p.lse)[number] : C(0);
        const C delta = there && !kOfValue ? static_cast<const C*>(b.delta)[number] : C(0);
        const unsigned char* const mask = there ? mask_row<T>(p, row) : nullptr;
        Vector<uint32_t, 4> words{};
        if (p.drop_below) words = philox(seed, row, keys);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          C& score = kOfQuery ? s[q][k] : s[k][q];
          score = weigh(b, row, keys + 8 * k, mask, score, kOfQuery ? dp[q][k] : dp[k][q],
                        words.data[k] >= p.drop_below, lse, delta);
        }
      }
      if constexpr (kOfMask) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += s[i][j];
      } else {
        store_weights(weights, s, ty, tx);
#pragma unroll 1
        for (int step = 0; step < kSteps; ++step)
          multiply_columns(out, weights + step * kDepth * kPitch + 4 * ty, landed() + 4 * tx);
      }
    }
    ptx::cp_async_wait<0>();
    if constexpr (kOfMask)
      store_mask(b, w, sums, weights, ty, tx);
    else
      store(b, w, out, ty, tx);
  }
};

template <class T, AttentionGrad OF>
__global__ void __launch_bounds__(256, 1) attention_grad_kernel(__grid_constant__ const AttentionBackward b) {
  AttentionGradKernel<T, OF>::run(b);
}

}  // namespace fastnn::cuda
