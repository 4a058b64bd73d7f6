// output = softmax(cap(scale · Q Kᵀ) + mask) V without tensor cores: float32 in full precision, float64, and the 16-bit
// types where no tile of attention_sm80.cuh serves (head_dim or value_dim above 256, bfloat16 before sm_80).
//
// A block of 16x16 threads has 64 rows (queries of one head, or of the few heads of a group) or 16, and 128 columns of
// value (64 in double); it walks along the keys, 64 a step. A thread has four rows (or one) by four keys of the scores,
// and those rows by eight (four) columns of the output, in registers. Slices of eight features of Q and K, then slices
// of eight keys of V, come element by element through one ring of three stages, by cp.async; the exponentials pass
// through shared memory. Any strides, any head_dim; blocks of further columns of value take the scores again.
//
// A thread's keys are s, s + 8, s + 16 and s + 24, so that one Philox serves all four; K's slices lie so that they
// follow each other. exp2, tanh and log are CUDA's own in full precision, products are plain multiply-adds. Bound by
// the FMA units: 16 multiply-adds for two loads of 16 bytes. No figure: not yet measured on a GPU.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/attention_scores.cuh"

namespace fastnn::cuda {

template <class T, int TILE>
struct AttentionSimtKernel {
  using C = Compute<T>;
  static constexpr int kThreads = kAttentionSimtThreads, kKeys = kAttentionSimtKeys, kDepth = 8, kStages = 3;
  static constexpr int kRows = kAttentionSimtRows[TILE], R = kRows / 16;
  static constexpr int kCols = sizeof(C) == 8 ? 64 : 128, kQuarters = kCols / 64;
  // Four elements more: the transposing stores of a warp spread over the banks, vectors stay aligned.
  static constexpr int kRowPitch = kRows + 4, kKeyPitch = kKeys + 4;
  static constexpr int kProductStage = kDepth * (kRowPitch + kKeyPitch), kValueStage = kDepth * kCols;
  static constexpr int kStage = kProductStage > kValueStage ? kProductStage : kValueStage;
  static constexpr int kSharedBytes = static_cast<int>(sizeof(C)) * (kStages * kStage + kKeys * kRowPitch);
  static constexpr int kValueSteps = kKeys / kDepth;
  static constexpr int kEachQuery = kRows * kDepth / kThreads > 0 ? kRows * kDepth / kThreads : 1;
  static constexpr int kEachKey = kKeys * kDepth / kThreads, kEachValue = kCols * kDepth / kThreads;

  // Where key s of a step lies in a slice of K: the keys of one thread follow each other.
  static FASTNN_HOST_DEVICE constexpr int place_of_key(int s) { return (s / 32 * 8 + s % 8) * 4 + s / 8 % 4; }
  static FASTNN_HOST_DEVICE constexpr int key_of(int tx, int j) { return tx / 8 * 32 + tx % 8 + 8 * j; }

  static FASTNN_DEVICE void copy(C* to, const T* from, const T* anywhere, bool inside) {
    if constexpr (sizeof(T) == sizeof(C))
      ptx::cp_async<sizeof(C)>(to, inside ? from : anywhere, inside ? static_cast<int>(sizeof(C)) : 0);
    else
      ptx::shared_store<C>(to, inside ? widen(*from) : C(0));
  }

  template <int N>
  static FASTNN_DEVICE void load(C (&values)[N], const C* from) {
    constexpr int L = N < kLanes<C> ? N : kLanes<C>;
#pragma unroll
    for (int i = 0; i < N; i += L) {
      const auto part = ptx::shared_load<Vector<C, L>>(from + i);
#pragma unroll
      for (int j = 0; j < L; ++j) values[i + j] = part.data[j];
    }
  }

  template <class M>
  static FASTNN_DEVICE void add_mask(const AttentionForward& p, C (&s)[R][4], const unsigned char* const (&mask)[R],
                                     int k0, int tx) {
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = k0 + key_of(tx, j);
        if (key < p.key_length) s[i][j] = masked(s[i][j], reinterpret_cast<const M*>(mask[i])[key * p.mask.col_stride]);
      }
  }

  static FASTNN_DEVICE void finish_scores(const AttentionForward& p, C (&s)[R][4], const AttentionRow (&rows)[R],
                                          const unsigned char* const (&mask)[R], int k0, int tx) {
    const C scale = static_cast<C>(p.scale), cap = static_cast<C>(p.softcap);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] *= scale;
        if (cap != C(0)) s[i][j] = cap * tanh_of(s[i][j]);
      }
    if (p.mask_type == AttentionMask::Bool) add_mask<uint8_t>(p, s, mask, k0, tx);
    if (p.mask_type == AttentionMask::Query) add_mask<T>(p, s, mask, k0, tx);
    if (p.mask_type == AttentionMask::Float32) add_mask<float>(p, s, mask, k0, tx);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = k0 + key_of(tx, j), query = rows[i].query;
        if (key < query + p.first_shift || key > query + p.last_shift || key >= p.key_length)
          s[i][j] = kMinusInfinity<C>;
      }
  }

  struct State {
    C out[R][kQuarters][4] = {};
    C top[R], sum[R] = {};  // sums of this thread's keys
  };

  // Scores become exponentials below the new maximum of their row; a row's threads are half a warp.
  static FASTNN_DEVICE void softmax(State& state, C (&s)[R][4], C c) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      C top = state.top[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) top = larger(top, s[i][j]);
#pragma unroll
      for (int apart = 8; apart > 0; apart /= 2) top = larger(top, __shfl_xor_sync(0xffffffffu, top, apart));
      const C safe = safe_top(top), alpha = exp2_of((state.top[i] - safe) * c);
      state.top[i] = top, state.sum[i] *= alpha;
#pragma unroll
      for (int j = 0; j < 4; ++j) state.sum[i] += s[i][j] = exp2_of((s[i][j] - safe) * c);
#pragma unroll
      for (int q = 0; q < kQuarters; ++q)
#pragma unroll
        for (int j = 0; j < 4; ++j) state.out[i][q][j] *= alpha;
    }
  }

  static FASTNN_DEVICE void drop(const AttentionForward& p, uint64_t seed, C (&s)[R][4], const AttentionRow (&rows)[R],
                                 int k0, int tx) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const auto words = philox(seed, rows[i], k0 + key_of(tx, 0));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (words.data[j] < p.drop_below) s[i][j] = C(0);
    }
  }

  static FASTNN_DEVICE void store(const AttentionForward& p, State& state, const AttentionRow (&rows)[R], int first,
                                  int col0, int tx) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int apart = 8; apart > 0; apart /= 2) state.sum[i] += __shfl_xor_sync(0xffffffffu, state.sum[i], apart);
      if (first + i >= p.rows) continue;
      const int64_t number = rows[i].number(p);
      if (col0 == 0 && tx == 0) {
        if (p.partial)
          store_partial_sums(p, number, state.top[i], state.sum[i]);
        else
          store_sums(p, number, state.top[i], state.sum[i]);
      }
      const C inverse = inverse_of(p, state.sum[i]);
      T* const out = output_row<T>(p, rows[i]);
#pragma unroll
      for (int q = 0; q < kQuarters; ++q)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int col = col0 + 64 * q + 4 * tx + j;
          if (col >= p.value_dim) continue;
          if (p.partial)
            partial_values<C>(p, static_cast<int>(blockIdx.y), number)[col] = state.out[i][q][j];
          else
            out[col] = narrow<T>(state.out[i][q][j] * inverse);
        }
    }
  }

  static FASTNN_DEVICE void run(const AttentionForward& p) {
    C *const ring = reinterpret_cast<C*>(ptx::dynamic_shared()), *const weights = ring + kStages * kStage;
    const int thread = static_cast<int>(threadIdx.x), ty = thread / 16, tx = thread % 16;
    const uint32_t item = blockIdx.x / static_cast<uint32_t>(p.row_tiles);
    const int r0 = (p.row_tiles - 1 - static_cast<int>(blockIdx.x % static_cast<uint32_t>(p.row_tiles))) * kRows;
    const int col0 = static_cast<int>(blockIdx.z) * kCols;
    const uint32_t shared_head = item * static_cast<uint32_t>(p.heads_of_item) / static_cast<uint32_t>(p.group);
    const T* const keys = static_cast<const T*>(p.key.data) + p.key.heads(shared_head);
    const T* const values = static_cast<const T*>(p.value.data) + p.value.heads(shared_head);
    const T* const queries = static_cast<const T*>(p.query.data);
    const TileRange tiles = visible_tiles(p, visible_keys(p, r0, r0 + kRows), kKeys);

    AttentionRow rows[R];
    const unsigned char* mask[R];
    State state;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      rows[i] = attention_row(p, item, r0 + R * ty + i);
      mask[i] = mask_row<T>(p, rows[i]);
      state.top[i] = kMinusInfinity<C>;
    }
    const T* query[kEachQuery];  // this thread's rows of every slice
#pragma unroll
    for (int i = 0; i < kEachQuery; ++i) {
      const int r = (thread + i * kThreads) / kDepth;
      const AttentionRow row = attention_row(p, item, r0 + r);
      query[i] =
          r < kRows && r0 + r < p.rows ? queries + p.query.heads(row.head) + row.query * p.query.row_stride : nullptr;
    }
    const uint64_t seed = philox_seed(p);
    const C c = static_cast<C>(p.factor);
    const int depth_steps = p.head_dim > 0 ? (p.head_dim + kDepth - 1) / kDepth : 1;

    int next_tile = tiles.begin, next_part = 0, into = 0;
    const auto load_next = [&] {
      if (next_tile < tiles.end) {
        C* const stage = ring + into * kStage;
        const int k0 = next_tile * kKeys;
        if (next_part < depth_steps) {
#pragma unroll
          for (int i = 0; i < kEachQuery; ++i) {
            const int index = thread + i * kThreads, r = index / kDepth, e = index % kDepth;
            const int col = next_part * kDepth + e;
            if (r < kRows)
              copy(stage + e * kRowPitch + r, query[i] + col * p.query.col_stride, queries,
                   query[i] && col < p.head_dim);
          }
#pragma unroll
          for (int i = 0; i < kEachKey; ++i) {
            const int index = thread + i * kThreads, s = index / kDepth, e = index % kDepth;
            const int col = next_part * kDepth + e;
            copy(stage + kDepth * kRowPitch + e * kKeyPitch + place_of_key(s),
                 keys + (k0 + s) * p.key.row_stride + col * p.key.col_stride, keys,
                 k0 + s < p.key_length && col < p.head_dim);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kEachValue; ++i) {
            const int index = thread + i * kThreads, n = index % kCols;
            const int key = k0 + (next_part - depth_steps) * kDepth + index / kCols;
            copy(stage + index, values + key * p.value.row_stride + (col0 + n) * p.value.col_stride, values,
                 key < p.key_length && col0 + n < p.value_dim);
          }
        }
        if (++next_part == depth_steps + kValueSteps) next_part = 0, ++next_tile;
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

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load_next();
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      C s[R][4] = {};
#pragma unroll 1
      for (int step = 0; step < depth_steps; ++step) {
        const C *const stage = landed(), *const a = stage + R * ty, *const b = stage + kDepth * kRowPitch + 4 * tx;
#pragma unroll
        for (int e = 0; e < kDepth; ++e) {
          C left[R], right[4];
          load(left, a + e * kRowPitch), load(right, b + e * kKeyPitch);
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) s[i][j] += left[i] * right[j];
        }
      }
      const int k0 = tile * kKeys;
      finish_scores(p, s, rows, mask, k0, tx);
      softmax(state, s, c);
      if (p.drop_below) drop(p, seed, s, rows, k0, tx);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        constexpr int L = R < kLanes<C> ? R : kLanes<C>;
#pragma unroll
        for (int i = 0; i < R; i += L) {
          Vector<C, L> part;
#pragma unroll
          for (int l = 0; l < L; ++l) part.data[l] = s[i + l][j];
          ptx::shared_store(weights + key_of(tx, j) * kRowPitch + R * ty + i, part);
        }
      }
#pragma unroll 1
      for (int step = 0; step < kValueSteps; ++step) {
        const C* const stage = landed();
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
          C weight[R], value[kQuarters][4];
          load(weight, weights + (step * kDepth + k) * kRowPitch + R * ty);
#pragma unroll
          for (int q = 0; q < kQuarters; ++q) load(value[q], stage + k * kCols + 64 * q + 4 * tx);
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int q = 0; q < kQuarters; ++q)
#pragma unroll
              for (int j = 0; j < 4; ++j) state.out[i][q][j] += weight[i] * value[q][j];
        }
      }
    }
    ptx::cp_async_wait<0>();
    store(p, state, rows, r0 + R * ty, col0, tx);
  }
};

template <class T, int TILE>
__global__ void __launch_bounds__(kAttentionSimtThreads, 1)
    attention_simt_kernel(__grid_constant__ const AttentionForward p) {
  AttentionSimtKernel<T, TILE>::run(p);
}

}  // namespace fastnn::cuda
