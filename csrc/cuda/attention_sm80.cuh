// output = softmax(cap(scale · Q Kᵀ) + mask) V in float16 and bfloat16 on mma.sync; the score matrix never exists.
//
// A block has 128 (or 64) queries of one head and walks along the keys, 64 (or 32) a step. A warp has 32 (16) of the
// queries: its scores, their running maximum and sum, and its rows of the output stay in registers; what the first
// product leaves as accumulators is, rounded, the left operand of the second. Tiles of keys and values come by cp.async
// through one ring, K₀ V₀ K₁ V₁ …, two or three tiles ahead, swizzled (tile.cuh), to be read by ldmatrix (values
// transposed). Keys that no query of the block may see are not loaded, a warp skips steps where its queries see none,
// and limits are looked at on the edge of what is seen alone.
//
// Few rows (decode): the queries of all heads that share key and value are the 16 rows of one tile, and the four warps
// take a quarter of each step's keys; their results are merged in their order at the end. With splits, blockIdx.y takes
// its share of the keys and leaves its results for attention_merge_kernel.
//
// Two kinds: one for scores that need a factor alone, one that knows masks, the soft cap and dropout: a thread has the
// keys s, s + 8, s + 16 and s + 24 of a row, whose words are one Philox.
// Bound by the tensor cores and, at head_dim 64, by exp2; decode by memory. No figure: not yet measured on a GPU.
// Source: Dao, "FlashAttention-2", arXiv 2307.08691; flash-decoding's split of the keys.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/attention_tile.cuh"

namespace fastnn::cuda {

template <class T, int TILE>
struct AttentionMmaKernel {
  static constexpr AttentionTile tile = kAttentionTiles[TILE];
  static constexpr int kThreads = kAttentionThreads, kWarpsK = tile.warps_of_keys, kWarpsM = 4 / kWarpsK;
  static constexpr int kWarpRows = tile.rows / kWarpsM, kWarpKeys = tile.keys / kWarpsK;
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsS = kWarpKeys / 8, kFragmentsO = tile.width / 8;
  static constexpr int kChunks = tile.width / 8, kSlots = attention_slots(tile, kArch);
  static constexpr int kQueryBytes = tile.rows * tile.width * 2, kSlotBytes = tile.keys * tile.width * 2;
  static constexpr bool kBuilt = attention_built(tile, kArch);
  static_assert(kFragmentsS % 2 == 0 && kFragmentsO % 2 == 0);

  template <int ROWS>
  static FASTNN_DEVICE int place(int r, int c, int more = 0) {
    return panel_place<tile.width, ROWS>(r, c, more);
  }

  struct State {
    float out[kFragmentsM][kFragmentsO][4] = {};
    float top[kFragmentsM][2], sum[kFragmentsM][2] = {};  // of rows g and g + 8; sums of this thread's columns
  };

  // The row of this lane's fragment. It is worked out wherever it is asked for: registers are what is short.
  static FASTNN_DEVICE AttentionRow row_of(const AttentionForward& p, uint32_t item, int first, int i, int half,
                                           int lane) {
    return attention_row(p, item, first + 16 * i + 8 * half + lane / 4);
  }

  // ---- to shared memory ---------------------------------------------------------------------------------------------

  static FASTNN_DEVICE void copy_queries(unsigned char* to, const AttentionForward& p, uint32_t item, int r0) {
    const uint16_t* const data = static_cast<const uint16_t*>(p.query.data);
    if (p.heads_of_item == 1 && p.query.col_stride == 1) {
      const RowMatrix matrix = {data + p.query.heads(item), p.query.row_stride, p.rows, p.head_dim, p.query.width};
      return copy_panels<tile.width, tile.rows, kThreads>(to, matrix, r0);
    }
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < tile.rows * kChunks; index += kThreads) {
      const int r = index / kChunks, c = index % kChunks;
      const int count = r0 + r < p.rows ? cut(p.head_dim - 8 * c, 0, 8) : 0;
      const AttentionRow row = attention_row(p, item, r0 + r);
      const uint16_t* const from = data + p.query.heads(row.head) + row.query * p.query.row_stride;
      copy_gathered(to + place<tile.rows>(r, c), from + 8 * c * p.query.col_stride, p.query.col_stride, count);
    }
  }

  // ---- products -----------------------------------------------------------------------------------------------------

  static FASTNN_DEVICE void multiply_values(State& state, const float (&s)[kFragmentsM][kFragmentsS][4],
                                            const unsigned char* values, int key, int lane) {
#pragma unroll
    for (int k = 0; k < kFragmentsS; k += 2) {
      uint32_t a[kFragmentsM][4];
      rounded<T>(a, s, k);
      multiply_columns<T, tile.width, tile.keys>(state.out, a, values, key + 8 * k, 0, lane);
    }
  }

  // ---- scores -------------------------------------------------------------------------------------------------------

  // Adds the mask of one row to its pairs of scores with the keys key, key + 1, key + 8 …; none at `limit` or behind.
  template <class M>
  static FASTNN_DEVICE void add_mask(const AttentionForward& p, const unsigned char* mask, int key, int limit,
                                     float (&s)[kFragmentsS][4], int half) {
#pragma unroll
    for (int j = 0; j < kFragmentsS; ++j, key += 8) {
      float &low = s[j][2 * half], &high = s[j][2 * half + 1];
      if (p.mask.width > 1 && key + 1 < limit) {
        const auto pair = *reinterpret_cast<const Vector<M, 2>*>(mask + key * sizeof(M));
        low = masked(low, pair.data[0]), high = masked(high, pair.data[1]);
      } else {
        const M* const at = reinterpret_cast<const M*>(mask) + key * p.mask.col_stride;
        if (key < limit) low = masked(low, *at);
        if (key + 1 < limit) high = masked(high, at[p.mask.col_stride]);
      }
    }
  }

  // Scale, soft cap and mask, for the warp's scores with the keys from k0.
  static FASTNN_DEVICE void finish_scores(const AttentionForward& p, float (&s)[kFragmentsM][kFragmentsS][4], int k0,
                                          const unsigned char* const (&mask)[kFragmentsM][2], int lane) {
    const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] *= scale;
    if (cap != 0.0f) {
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsS; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j][e] = cap * tanh_approximate(s[i][j][e]);
    }
    if (p.mask_type == AttentionMask::None) return;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = k0 + lane % 4 * 2;
        if (p.mask_type == AttentionMask::Bool)
          add_mask<uint8_t>(p, mask[i][half], key, p.key_length, s[i], half);
        else if (p.mask_type == AttentionMask::Query)
          add_mask<T>(p, mask[i][half], key, p.key_length, s[i], half);
        else
          add_mask<float>(p, mask[i][half], key, p.key_length, s[i], half);
      }
  }

  static FASTNN_DEVICE void limit_scores(const AttentionForward& p, float (&s)[kFragmentsM][kFragmentsS][4], int k0,
                                         uint32_t item, int first, int lane) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row_of(p, item, first, i, half, lane).query, begin = query + p.first_shift;
        const int last = query + p.last_shift, end = last < p.key_length ? last + 1 : p.key_length;
#pragma unroll
        for (int j = 0; j < kFragmentsS; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = k0 + 8 * j + lane % 4 * 2 + e;
            if (key < begin || key >= end) s[i][j][2 * half + e] = kMinusInfinity<float>;
          }
      }
  }

  // Scores become exponentials below the new maximum of their row; what older keys left shrinks.
  static FASTNN_DEVICE void softmax(State& state, float (&s)[kFragmentsM][kFragmentsS][4], float c) {
    float alpha[kFragmentsM][2];
    bool shrinks = false;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = state.top[i][half];
#pragma unroll
        for (int j = 0; j < kFragmentsS; ++j) top = larger(top, larger(s[i][j][2 * half], s[i][j][2 * half + 1]));
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float safe = safe_top(top), shift = -safe * c;
        alpha[i][half] = ptx::exp2_approximate((state.top[i][half] - safe) * c);
        shrinks |= alpha[i][half] != 1.0f;
        state.top[i][half] = top;
        float sum = state.sum[i][half] * alpha[i][half];
#pragma unroll
        for (int j = 0; j < kFragmentsS; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[i][j][2 * half + e];
            x = ptx::exp2_approximate(tile.general ? (x - safe) * c : ::fmaf(x, c, shift));
            sum += x;
          }
        state.sum[i][half] = sum;
      }
    if (!__any_sync(0xffffffffu, shrinks)) return;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int n = 0; n < kFragmentsO; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) state.out[i][n][e] *= alpha[i][e / 2];
  }

  static FASTNN_DEVICE void drop(const AttentionForward& p, uint64_t seed, float (&s)[kFragmentsM][kFragmentsS][4],
                                 int k0, uint32_t item, int first, int lane) {
    constexpr int kGroup = kFragmentsS < 4 ? kFragmentsS : 4;  // fragments that one Philox serves
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int j = 0; j < kFragmentsS; j += kGroup) {
            const int key = k0 + 8 * j + lane % 4 * 2 + e;
            const auto words = philox(seed, row_of(p, item, first, i, half, lane), key / 32 * 32 + key % 8);
            const bool upper = kGroup < 4 && key % 32 >= 16;
#pragma unroll
            for (int w = 0; w < kGroup; ++w) {
              const uint32_t word = upper ? words.data[(w + 2) % 4] : words.data[w];
              if (word < p.drop_below) s[i][j + w][2 * half + e] = 0.0f;
            }
          }
  }

  // ---- the end ------------------------------------------------------------------------------------------------------

  // The warp's rows of the output: through its own rows of the queries' tile, so that 16 bytes are stored at once.
  static FASTNN_DEVICE void store(const AttentionForward& p, State& state, uint32_t item, int r0, int warp_row,
                                  unsigned char* staging, int lane) {
    if (r0 + warp_row >= p.rows) return;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + 16 * i + 8 * half + lane / 4;
        const int64_t number = row_of(p, item, r0 + warp_row, i, half, lane).number(p);
        const bool inside = r0 + r < p.rows;
        const float top = state.top[i][half], sum = state.sum[i][half];
        if (p.partial) {
          if (!inside) continue;
          if (lane % 4 == 0) store_partial_sums(p, number, top, sum);
          float* const to = partial_values<float>(p, static_cast<int>(blockIdx.y), number);
#pragma unroll
          for (int n = 0; n < kFragmentsO; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int col = 8 * n + lane % 4 * 2 + e;
              if (col < p.value_dim) to[col] = state.out[i][n][2 * half + e];
            }
        } else {
          if (inside && lane % 4 == 0) store_sums(p, number, top, sum);
          const float inverse = inverse_of(p, sum);
#pragma unroll
          for (int n = 0; n < kFragmentsO; ++n)
            ptx::shared_store(
                staging + place<tile.rows>(r, n) + lane % 4 * 4,
                ptx::pack_pair(state.out[i][n][2 * half] * inverse, state.out[i][n][2 * half + 1] * inverse, T{}));
        }
      }
    if (p.partial) return;
    __syncwarp();
#pragma unroll 1
    for (int index = lane; index < kWarpRows * kChunks; index += 32) {
      const int r = warp_row + index / kChunks, c = index % kChunks, count = cut(p.value_dim - 8 * c, 0, 8);
      if (r0 + r >= p.rows || count == 0) continue;
      const auto values = ptx::shared_load<Vector<T, 8>>(staging + place<tile.rows>(r, c));
      T* const to = output_row<T>(p, attention_row(p, item, r0 + r)) + 8 * c;
      if (p.output.width == 16 && count == 8) {
        ptx::global_store_16(to, values);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < count) to[i] = values.data[i];
      }
    }
  }

  // Four warps that had a quarter of the keys each: [4][16] maxima and sums, [4][16][width] values in shared memory.
  static FASTNN_DEVICE void merge_warps(const AttentionForward& p, const State& state, uint32_t item, int r0,
                                        float* shared, int warp, int lane) {
    float* const values = shared + 2 * 4 * tile.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 8 * half + lane / 4;
      if (lane % 4 == 0)
        ptx::shared_store(shared + (warp * tile.rows + r) * 2,
                          Vector<float, 2>{{state.top[0][half], state.sum[0][half]}});
#pragma unroll
      for (int n = 0; n < kFragmentsO; ++n)
        ptx::shared_store(values + (warp * tile.rows + r) * tile.width + 8 * n + lane % 4 * 2,
                          Vector<float, 2>{{state.out[0][n][2 * half], state.out[0][n][2 * half + 1]}});
    }
    __syncthreads();
    const float c = static_cast<float>(p.factor);
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < tile.rows * tile.width / 2; index += kThreads) {
      const int r = index / (tile.width / 2), col = index % (tile.width / 2) * 2;
      if (r0 + r >= p.rows || (col >= p.value_dim && col > 0)) continue;
      Vector<float, 2> parts[4];
      float top = kMinusInfinity<float>, sum = 0.0f, value[2] = {};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        parts[w] = ptx::shared_load<Vector<float, 2>>(shared + (w * tile.rows + r) * 2);
        top = larger(top, parts[w].data[0]);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float weight = ptx::exp2_approximate((parts[w].data[0] - safe_top(top)) * c);
        const auto own = ptx::shared_load<Vector<float, 2>>(values + (w * tile.rows + r) * tile.width + col);
        sum += weight * parts[w].data[1];
        value[0] += weight * own.data[0], value[1] += weight * own.data[1];
      }
      const AttentionRow row = attention_row(p, item, r0 + r);
      const int64_t number = row.number(p);
      if (p.partial) {
        if (col == 0) store_partial_sums(p, number, top, sum);
      } else {
        if (col == 0) store_sums(p, number, top, sum);
      }
      const float inverse = inverse_of(p, sum);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (col + e >= p.value_dim) continue;
        if (p.partial)
          partial_values<float>(p, static_cast<int>(blockIdx.y), number)[col + e] = value[e];
        else
          output_row<T>(p, row)[col + e] = narrow<T>(value[e] * inverse);
      }
    }
  }

  static FASTNN_DEVICE void run(const AttentionForward& p) {
    unsigned char *const query = ptx::dynamic_shared(), *const ring = query + kQueryBytes;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int warp_row = warp / kWarpsK * kWarpRows, warp_key = warp % kWarpsK * kWarpKeys;
    // Later rows first: with a causal limit they take longest.
    const uint32_t item = blockIdx.x / static_cast<uint32_t>(p.row_tiles);
    const int r0 = (p.row_tiles - 1 - static_cast<int>(blockIdx.x % static_cast<uint32_t>(p.row_tiles))) * tile.rows;
    const uint32_t shared_head = item * static_cast<uint32_t>(p.heads_of_item) / static_cast<uint32_t>(p.group);
    const RowMatrix keys = {static_cast<const uint16_t*>(p.key.data) + p.key.heads(shared_head), p.key.row_stride,
                            p.key_length, p.head_dim, p.key.width};
    const RowMatrix values = {static_cast<const uint16_t*>(p.value.data) + p.value.heads(shared_head),
                              p.value.row_stride, p.key_length, p.value_dim, p.value.width};
    const TileRange tiles = visible_tiles(p, visible_keys(p, r0, r0 + tile.rows), tile.keys);
    const KeyRange seen = visible_keys(p, r0 + warp_row, r0 + warp_row + kWarpRows);

    const unsigned char* mask[kFragmentsM][2] = {};
    State state;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (tile.general) mask[i][half] = mask_row<T>(p, row_of(p, item, r0 + warp_row, i, half, lane));
        state.top[i][half] = kMinusInfinity<float>;
      }
    uint64_t seed = 0;
    if constexpr (tile.general) seed = philox_seed(p);
    const float c = static_cast<float>(p.factor);

    // Keys and values of each step in turn: piece 2 step, piece 2 step + 1.
    const auto load = [&](int piece) {
      if (piece < 2 * tiles.end) {
        unsigned char* const slot = ring + piece % kSlots * kSlotBytes;
        if (piece % 2 == 0)
          copy_positions<tile.width, tile.keys, kThreads>(slot, keys, p.key.col_stride, piece / 2 * tile.keys);
        else
          copy_positions<tile.width, tile.keys, kThreads>(slot, values, p.value.col_stride, piece / 2 * tile.keys);
      }
      ptx::cp_async_commit();  // an empty group at the end, so that the count of groups stays in step
    };
    const auto landed = [&](int piece) {
      ptx::cp_async_wait<kSlots - 2>();
      __syncthreads();  // the piece is there for all, and all have read the one that the next load replaces
      load(piece + kSlots - 1);
      return ring + piece % kSlots * kSlotBytes;
    };

    copy_queries(query, p, item, r0);
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load(2 * tiles.begin + i);
#pragma unroll 1
    for (int step = tiles.begin; step < tiles.end; ++step) {
      const int k0 = step * tile.keys + warp_key;
      const bool any = k0 < seen.end && k0 + kWarpKeys > seen.begin;
      float s[kFragmentsM][kFragmentsS][4] = {};
      const unsigned char* slot = landed(2 * step);
      if (any) {
        multiply_rows<T, tile.width, tile.rows, tile.keys>(s, query, warp_row, slot, warp_key, lane);
        if constexpr (tile.general) finish_scores(p, s, k0, mask, lane);
        if (k0 < seen.all_begin || k0 + kWarpKeys > seen.all_end) limit_scores(p, s, k0, item, r0 + warp_row, lane);
        softmax(state, s, c);
        if constexpr (tile.general)
          if (p.drop_below) drop(p, seed, s, k0, item, r0 + warp_row, lane);
      }
      slot = landed(2 * step + 1);
      if (any) multiply_values(state, s, slot, warp_key, lane);
    }
    ptx::cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = state.sum[i][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      }
    if constexpr (kWarpsK > 1) {
      __syncthreads();  // nobody reads the ring any more
      merge_warps(p, state, item, r0, reinterpret_cast<float*>(ring), warp, lane);
    } else {
      __syncthreads();  // queries were copied by other warps, if no step waited for them
      store(p, state, item, r0, warp_row, query, lane);
    }
  }
};

template <class T, int TILE>
__global__ void __launch_bounds__(kAttentionThreads) attention_mma_kernel(__grid_constant__ const AttentionForward p) {
  if constexpr (AttentionMmaKernel<T, TILE>::kBuilt) AttentionMmaKernel<T, TILE>::run(p);
}

}  // namespace fastnn::cuda
