// output = softmax(scale · Q Kᵀ) V in float16 and bfloat16 on sm_90a: TMA copies, wgmma multiplies. Causal and sliding
// windows, grouped heads, any lengths; masks, soft cap and dropout stay with attention_sm80.cuh.
//
// A block takes 128 queries of one head. One thread copies: the queries once, then tiles of keys and values through one
// ring, in the order in which they are used, K₀ K₁ V₀ K₂ V₁ …, as far ahead as the ring has slots. Two groups of four
// warps have 64 queries each. A group asks for the scores of the next tile and for the product of the last tile's
// weights with its values at once; while the second still runs it works out the softmax of the first. The two groups
// take turns at the tensor cores, so that one's softmax passes while the other multiplies. Scores, weights and output
// stay in registers: the accumulators of one product, rounded, are the left operand of the next.
//
// Work of one tile of 128 queries and 128 keys at width d: 4 · 128 · 128 · d FLOPs, at 4096 a cycle 16 d cycles of the
// tensor cores; 16384 exponentials at 16 a cycle, 1024 cycles; some 4 floating-point operations beside each, 512 cycles.
// So at d = 64 exponentials and products take the same 1024 cycles and overlap is all; at d = 128 products take 2048
// and bound it. Bytes: keys and values of a tile, 512 d, from L2 in 16 d cycles: 32 bytes a cycle, half of what a
// multiprocessor's port takes, but 7 TB/s over 132 of them, about all that L2 gives; multicast to pairs of blocks would
// halve it. Width 256: 64 keys a step, since the output alone takes 128 registers; products bound it.
// No figure: not yet measured on a GPU.
// Source: Shah et al., "FlashAttention-3", arXiv 2407.08608.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/attention_scores.cuh"
#include "cuda/ptx_sm90.cuh"

namespace fastnn::cuda {

// Which coordinates of a tensor map name a head: its digits as HeadOffsets has them, those with a stride on an axis
// (2, 3 or 4; 0 and 1 are features and positions), those without on none.
struct HeadAxes {
  int digits;
  uint32_t size[kHeadDigits];
  int axis[kHeadDigits];
};

struct AttentionTiled {
  TensorMap query, key, value;
  HeadAxes query_heads, key_heads, value_heads;
  uint32_t tiles, section;  // tiles of all heads; heads of a section
  AttentionForward forward;
};

// Tile `index` of all: heads in sections whose keys and values stay in L2 together; within a section tiles of later rows
// first, since with a causal limit they take longest.
struct AttentionWork {
  uint32_t head, row_tile;
};
FASTNN_HOST_DEVICE constexpr AttentionWork attention_work(uint32_t index, uint32_t heads, uint32_t row_tiles,
                                                          uint32_t section) {
  const uint32_t first = index / (section * row_tiles) * section, within = index - first * row_tiles;
  const uint32_t own = heads - first < section ? heads - first : section;
  return {first + within % own, row_tiles - 1 - within / own};
}
// What block `block` of `blocks` takes as its `turn`-th tile: there and back, so that who had the longest of one turn
// has the shortest of the next.
FASTNN_HOST_DEVICE constexpr uint32_t attention_turn(uint32_t turn, uint32_t block, uint32_t blocks) {
  return turn * blocks + (turn % 2 ? blocks - 1 - block : block);
}

template <class T, int TILE>
struct AttentionWgmmaKernel {
  static constexpr AttentionWgmmaTile tile = kAttentionWgmmaTiles[TILE];
  static constexpr int kRows = tile.rows, kKeys = tile.keys, kSlots = tile.slots, kGroupRows = 64;
  static constexpr int kPanels = tile.width / 64;  // of 64 features, 128 bytes a row
  static constexpr int kQueryBytes = kRows * tile.width * 2, kSlotBytes = kKeys * tile.width * 2;
  static constexpr int kQueryPanel = kRows * 128, kKeyPanel = kKeys * 128;
  static constexpr int kSharedBytes = attention_wgmma_shared_bytes(tile);
  static constexpr int kScores = kKeys / 2, kSteps = kKeys / 16, kOut = tile.width / 2;
  static constexpr int kBothGroups = 256, kWarps = 8;
  static constexpr bool kTakeTurns = tile.width <= 128;  // wider, products leave no pauses to fill
  static_assert(kRows == 2 * kGroupRows && tile.width % 64 == 0 && kKeys % 16 == 0);

  struct Shared {
    unsigned char *query, *ring;
    uint64_t *full, *empty, *query_full, *query_empty;
  };
  static FASTNN_DEVICE Shared shared() {
    unsigned char* const memory = ptx::dynamic_shared();
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(memory + kQueryBytes + kSlots * kSlotBytes);
    return {
        memory, memory + kQueryBytes, barriers, barriers + kSlots, barriers + 2 * kSlots, barriers + 2 * kSlots + 1};
  }

  // A walk along the ring. A slot's barriers turn over with each round.
  struct Slot {
    int index = 0, parity = 0;
    FASTNN_DEVICE void next() {
      if (++index == kSlots) index = 0, parity ^= 1;
    }
  };

  // Tiles of keys for a tile of queries, and the loop over the block's tiles of queries, which every warp walks alike.
  template <class F>
  static FASTNN_DEVICE void each_work(const AttentionTiled& a, const F& f) {
    const AttentionForward& p = a.forward;
#pragma unroll 1
    for (uint32_t turn = 0;; ++turn) {
      const uint32_t index = attention_turn(turn, blockIdx.x, gridDim.x);
      if (index >= a.tiles) break;
      const AttentionWork work = attention_work(index, a.tiles / static_cast<uint32_t>(p.row_tiles),
                                                static_cast<uint32_t>(p.row_tiles), a.section);
      const int r0 = static_cast<int>(work.row_tile) * kRows;
      f(work.head, r0, visible_tiles(p, visible_keys(p, r0, r0 + kRows), kKeys));
    }
  }

  // ---- copies: one thread -------------------------------------------------------------------------------------------

  struct Place {
    int at[3];
  };
  static FASTNN_DEVICE Place place_of(const HeadAxes& heads, uint32_t head) {
    Place place = {};
#pragma unroll 1
    for (int i = 0; i < heads.digits; ++i) {
      const int digit = static_cast<int>(head % heads.size[i]);
      head /= heads.size[i];
#pragma unroll
      for (int axis = 0; axis < 3; ++axis)
        if (heads.axis[i] == axis + 2) place.at[axis] = digit;
    }
    return place;
  }
  template <int PANEL>
  static FASTNN_DEVICE void copy(unsigned char* to, const TensorMap& map, uint64_t* full, int position,
                                 const Place& place) {
    ptx::mbarrier_arrive_expect(full, kPanels * PANEL);
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
      ptx::tma_load<5>(to + i * PANEL, &map, full, {64 * i, position, place.at[0], place.at[1], place.at[2]});
  }

  static FASTNN_DEVICE void produce(const AttentionTiled& a) {
    const Shared memory = shared();
    Slot slot;
    int turn = 0;
    each_work(a, [&](uint32_t head, int r0, TileRange tiles) {
      if (tiles.begin >= tiles.end) return;
      const uint32_t shared_head = head / static_cast<uint32_t>(a.forward.group);
      const Place query = place_of(a.query_heads, head);
      const Place key = place_of(a.key_heads, shared_head), value = place_of(a.value_heads, shared_head);
      const auto load = [&](const TensorMap& map, int step, const Place& place) {
        ptx::mbarrier_wait(memory.empty + slot.index, slot.parity ^ 1);  // the first round finds all of them empty
        copy<kKeyPanel>(memory.ring + slot.index * kSlotBytes, map, memory.full + slot.index, step * kKeys, place);
        slot.next();
      };
      load(a.key, tiles.begin, key);
      ptx::mbarrier_wait(memory.query_empty, (turn & 1) ^ 1);
      copy<kQueryPanel>(memory.query, a.query, memory.query_full, r0, query);
#pragma unroll 1
      for (int step = tiles.begin; step < tiles.end; ++step) {
        if (step + 1 < tiles.end) load(a.key, step + 1, key);
        load(a.value, step, value);
      }
      ++turn;
    });
  }

  // ---- products: a group of four warps ------------------------------------------------------------------------------

  // A descriptor counts in 16 bytes.
  static FASTNN_DEVICE uint64_t moved(uint64_t descriptor, int bytes) {
    return descriptor + static_cast<uint64_t>(bytes / 16);
  }
  // Eight rows of 128 bytes stand in 1024; panels follow each other. Rows of values are what is summed over, so one
  // instruction reaches over all panels.
  static FASTNN_DEVICE uint64_t descriptor_of_rows(const unsigned char* at) {
    return ptx::wgmma_descriptor(at, 16, 1024);
  }
  static FASTNN_DEVICE uint64_t descriptor_of_values(const unsigned char* at) {
    return ptx::wgmma_descriptor(at, kKeyPanel, 1024);
  }

  // Whoever reads or writes accumulators and weights between two products names them.
  static FASTNN_DEVICE void fence(float (&out)[kOut], uint32_t (&weights)[kSteps][4]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) ptx::hold_registers(weights[k]);
    ptx::wgmma_fence(out);
  }
  static FASTNN_DEVICE void multiply_keys(float (&s)[kScores], uint64_t query, uint64_t keys) {
#pragma unroll
    for (int k = 0; k < tile.width / 16; ++k)
      ptx::wgmma<kKeys>(s, moved(query, k / 4 * kQueryPanel + k % 4 * 32), moved(keys, k / 4 * kKeyPanel + k % 4 * 32),
                        T{}, k > 0);
    ptx::wgmma_commit();
  }
  static FASTNN_DEVICE void multiply_values(float (&out)[kOut], const uint32_t (&weights)[kSteps][4], uint64_t values) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      ptx::wgmma<tile.width, false>(out, weights[k], moved(values, k * 16 * 128), T{}, true);
    ptx::wgmma_commit();
  }

  // ---- scores -------------------------------------------------------------------------------------------------------

  // A thread has rows g and g + 8 of its warp's 16 and of every 8 keys two: s[4 j + 2 half + e].
  struct State {
    float top[2], sum[2];  // sums of this thread's keys
  };

  static FASTNN_DEVICE void limit_scores(const AttentionForward& p, float (&s)[kScores], int first_query, int k0,
                                         int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + 8 * half, last = query + p.last_shift;
      const int end = last < p.key_length ? last + 1 : p.key_length;
      const int from = query + p.first_shift - k0 - lane % 4 * 2, to = end - k0 - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + e < from || 8 * j + e >= to) s[4 * j + 2 * half + e] = kMinusInfinity<float>;
    }
  }

  // Scores become exponentials below the new maximum of their row; alpha: what older sums shrink by. Four chains of
  // maxima and of sums, so that none waits for the one before it.
  static FASTNN_DEVICE void softmax(State& state, float (&s)[kScores], float (&alpha)[2], float c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top[2] = {state.top[half], state.top[half]};
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) top[e] = larger(top[e], s[4 * j + 2 * half + e]);
      float both = larger(top[0], top[1]);
      both = larger(both, __shfl_xor_sync(0xffffffffu, both, 1));
      both = larger(both, __shfl_xor_sync(0xffffffffu, both, 2));
      const float safe = safe_top(both), shift = -safe * c;
      alpha[half] = ptx::exp2_approximate((state.top[half] - safe) * c);
      state.top[half] = both;
      float sum[2] = {state.sum[half] * alpha[half], 0.0f};
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * half + e];
          x = ptx::exp2_approximate(::fmaf(x, c, shift));
          sum[e] += x;
        }
      state.sum[half] = sum[0] + sum[1];
    }
  }
  static FASTNN_DEVICE void round_weights(uint32_t (&weights)[kSteps][4], const float (&s)[kScores]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = ptx::pack_pair(s[8 * k + 2 * i], s[8 * k + 2 * i + 1], T{});
  }

  // ---- the end ------------------------------------------------------------------------------------------------------

  // Four fragments of eight columns: the four lanes of a row exchange them, so that each has one whole.
  static FASTNN_DEVICE void exchange(uint32_t (&w)[4], int t) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const bool high = t & bit;
        const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + bit], bit);
        if (high)
          w[i] = got;
        else
          w[i + bit] = got;
      }
  }

  static FASTNN_DEVICE void store(const AttentionForward& p, const State& state, const float (&out)[kOut],
                                  uint32_t head, int first_query, int lane) {
    const int t = lane % 4;
    T* const data = output_row<T>(p, {head, 0});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int query = first_query + 8 * half;
      const bool inside = query < p.query_length;
      const int64_t number = int64_t{head} * p.query_length + query;
      if (p.partial) {
        if (!inside) continue;
        if (t == 0) store_partial_sums(p, number, state.top[half], sum);
        float* const to = partial_values<float>(p, static_cast<int>(blockIdx.y), number);
#pragma unroll
        for (int n = 0; n < tile.width / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * n + 2 * t + e < p.value_dim) to[8 * n + 2 * t + e] = out[4 * n + 2 * half + e];
        continue;
      }
      if (inside && t == 0) store_sums(p, number, state.top[half], sum);
      const float inverse = inverse_of(p, sum);
      T* const to = data + query * p.output.row_stride;
#pragma unroll
      for (int n = 0; n < tile.width / 8; n += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[i] =
              ptx::pack_pair(out[4 * (n + i) + 2 * half] * inverse, out[4 * (n + i) + 2 * half + 1] * inverse, T{});
        exchange(words, t);
        const int col = 8 * (n + t), count = inside ? cut(p.value_dim - col, 0, 8) : 0;
        if (p.output.width == 16 && count == 8) {
          ptx::global_store_16(to + col, Vector<uint32_t, 4>{{words[0], words[1], words[2], words[3]}});
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (i < count) to[col + i] = T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)};
        }
      }
    }
  }

  // The turns at the tensor cores, which the first group has to begin with.
  static FASTNN_DEVICE void take_turn(int group) {
    if (kTakeTurns) ptx::named_barrier(1 + group, kBothGroups);
  }
  static FASTNN_DEVICE void give_turn(int group) {
    if (kTakeTurns) ptx::named_barrier_arrive(2 - group, kBothGroups);
  }

  static FASTNN_DEVICE void consume(const AttentionTiled& a, int group) {
    const AttentionForward& p = a.forward;
    const Shared memory = shared();
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
    const uint64_t query = descriptor_of_rows(memory.query + group * kGroupRows * 128);
    const uint64_t keys = descriptor_of_rows(memory.ring), values = descriptor_of_values(memory.ring);
    const float c = static_cast<float>(p.factor);
    const auto release = [&](uint64_t* empty) {  // each warp for itself: the others may still read
      if (lane == 0) ptx::mbarrier_arrive(empty);
    };
    if (group == 1) give_turn(group);

    Slot slot;
    int turn = 0;
    each_work(a, [&](uint32_t head, int r0, TileRange tiles) {
      const int mine = r0 + group * kGroupRows, first_query = mine + 16 * warp + lane / 4;
      if (mine >= p.rows) {  // no rows of its own: slots go back as they come, turns go by
        if (tiles.begin >= tiles.end) return;
        const auto pass = [&] {
          ptx::mbarrier_wait(memory.full + slot.index, slot.parity);
          release(memory.empty + slot.index);
          slot.next();
        };
        ptx::mbarrier_wait(memory.query_full, turn & 1);
        release(memory.query_empty);
        ++turn;
        pass();
#pragma unroll 1
        for (int step = tiles.begin + 1; step < tiles.end; ++step) take_turn(group), give_turn(group), pass(), pass();
        return pass();
      }
      State state = {{kMinusInfinity<float>, kMinusInfinity<float>}, {}};
      float out[kOut] = {};
      if (tiles.begin < tiles.end) {
        const KeyRange seen = visible_keys(p, mine, mine + kGroupRows);
        float s[kScores], alpha[2];
        uint32_t weights[kSteps][4];
        const auto release_keys = [&](int index, int step) {
          release(memory.empty + index);
          if (step + 1 == tiles.end) release(memory.query_empty);
        };
        const auto limit = [&](int step) {
          const int k0 = step * kKeys;
          if (k0 < seen.all_begin || k0 + kKeys > seen.all_end) limit_scores(p, s, first_query, k0, lane);
        };

        ptx::mbarrier_wait(memory.query_full, turn & 1);
        ptx::mbarrier_wait(memory.full + slot.index, slot.parity);
        ptx::wgmma_fence(s);
        multiply_keys(s, query, moved(keys, slot.index * kSlotBytes));
        ptx::wgmma_wait<0>(s);
        release_keys(slot.index, tiles.begin);
        slot.next();
        limit(tiles.begin);
        softmax(state, s, alpha, c);
        round_weights(weights, s);

#pragma unroll 1
        for (int step = tiles.begin + 1; step < tiles.end; ++step) {
          const Slot key = slot;
          slot.next();
          ptx::mbarrier_wait(memory.full + key.index, key.parity);
          take_turn(group);
          ptx::wgmma_fence(s);
          multiply_keys(s, query, moved(keys, key.index * kSlotBytes));
          ptx::mbarrier_wait(memory.full + slot.index, slot.parity);
          fence(out, weights);
          multiply_values(out, weights, moved(values, slot.index * kSlotBytes));
          give_turn(group);
          ptx::wgmma_wait<1>(s);
          release_keys(key.index, step);
          limit(step);
          softmax(state, s, alpha, c);
          // All of this beside the product that still runs: ptxas would move it behind the wait, but not across the
          // branch that waiting (for what is there already) is.
          ptx::hold_registers(s);
          ptx::mbarrier_wait(memory.full + slot.index, slot.parity);
          ptx::wgmma_wait<0>(out);
          release(memory.empty + slot.index);
          slot.next();
          round_weights(weights, s);
#pragma unroll
          for (int i = 0; i < kOut; ++i) out[i] *= alpha[i / 2 % 2];
        }

        ptx::mbarrier_wait(memory.full + slot.index, slot.parity);
        fence(out, weights);
        multiply_values(out, weights, moved(values, slot.index * kSlotBytes));
        ptx::wgmma_wait<0>(out);
        release(memory.empty + slot.index);
        slot.next();
        ++turn;
      }
      store(p, state, out, head, first_query, lane);
    });
    if (group == 0) take_turn(group);  // the last, which nobody took
  }

  static FASTNN_DEVICE void run(const AttentionTiled& a) {
    if (threadIdx.x == 0) {
      const Shared memory = shared();
#pragma unroll 1
      for (int i = 0; i < kSlots; ++i)
        ptx::mbarrier_init(memory.full + i, 1), ptx::mbarrier_init(memory.empty + i, kWarps);
      ptx::mbarrier_init(memory.query_full, 1), ptx::mbarrier_init(memory.query_empty, kWarps);
      ptx::mbarrier_init_fence();
      ptx::prefetch_tensor_map(&a.query), ptx::prefetch_tensor_map(&a.key), ptx::prefetch_tensor_map(&a.value);
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    if (group == 0) {
      ptx::registers_drop<24>();
      if (threadIdx.x == 0) produce(a);
    } else {
      ptx::registers_add<240>();
      consume(a, group - 1);
    }
  }
};

template <class T, int TILE>
__global__ void __launch_bounds__(kAttentionWgmmaThreads, 1)
    attention_wgmma_kernel(__grid_constant__ const AttentionTiled a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTNN_CUDA_SHIM)
  AttentionWgmmaKernel<T, TILE>::run(a);
#endif
}

}  // namespace fastnn::cuda
