// Gradients of attention in float16 and bfloat16 on mma.sync: formulas and names of attention_backward.cuh.
//
// Two kernels of one text. Keys: a block owns 128 (or 32) keys and walks along the queries that see them, 32 or 64 a
// step, over all heads that share the keys in their order, and makes dK and dV. Queries: it owns queries, walks along
// the keys and makes dQ. Own rows stand in shared memory to the end; what is walked comes by cp.async a step ahead.
//   scores = own₁ walk₁ᵀ      (K Qᵀ, or Q Kᵀ)          dP = own₂ walk₂ᵀ      (V dOᵀ, or dO Vᵀ)
//   first += dS walk₁          (dK, or dQ)               second += P walk₂     (dV)
// With own positions as rows, the accumulators of P and dS are, rounded to 16 bits, the left operands of the second
// line: no trip through shared memory. Where a warp's registers do not hold gradients of all columns, two warps share
// 32 (or 16) rows: each makes the scores with half of what is walked and half of the columns, and P and dS go
// through shared memory. Steps that no own position sees are not walked; limits are looked at on edges alone.
//
// No atomics, sums in one order: the same result every time.
// Floor: 7 products of 2·L·S·d FLOPs for each head (half of it where causal), 2·L·S exponentials; Q, K, V, dO are read
// from memory once for each kernel, and what is walked by each block from L2: 2·rows FLOPs of dK and dV for a byte,
// 1.5·rows of dQ. Operands come from shared memory, 128 bytes a clock: with 32 rows a warp 128 to 256 bytes for each mma
// of 4096 FLOPs, with 16 rows 256 to 512; the tensor cores of sm_80 take 2 clocks for one. So tiles of 32 rows a warp
// are bound by tensor cores there, those of 16 by shared memory. No figure: not yet measured on a GPU.
// Source: Dao, "FlashAttention-2", arXiv 2307.08691, section 3.2.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_tile.cuh"

namespace fastnn::cuda {

template <class T, int TILE, bool OF_KEYS>
struct AttentionGradMmaKernel {
  static constexpr AttentionGradTile tile = kAttentionGradTiles[TILE];
  static constexpr int kThreads = attention_grad_threads(tile), kWarpsM = tile.warps_of_rows;
  static constexpr int kWarpsN = tile.warps_of_columns, kWarpRows = tile.rows / kWarpsM;
  static constexpr int kWarpCols = tile.walked / kWarpsN;  // of the scores
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsS = kWarpCols / 8;
  static constexpr int kChunks = tile.width / 8, kFragmentsO = kChunks / kWarpsN, kSecondSlots = tile.second_slots;
  static constexpr int kOwnBytes = tile.rows * tile.width * 2, kSlotBytes = tile.walked * tile.width * 2;
  static constexpr int kWeightBytes = kWarpsN > 1 ? tile.rows * tile.walked * 2 : 0;
  // How many loads of operands run ahead of their products: what registers allow.
  static constexpr int kUnroll = !OF_KEYS ? 4 : kArch < 1000 || kFragmentsM == 1 ? 2 : 1;
  static constexpr int kUnrollWeights = kWarpsN == 1 ? tile.walked / 16 : OF_KEYS ? 1 : 2;
  static constexpr bool kBuilt = attention_grad_built(tile, kArch);
  static_assert(kFragmentsS % 2 == 0 && kFragmentsO % 2 == 0 && kFragmentsM <= 2);
  static_assert(kFragmentsM * kFragmentsS * 4 <= 32, "a thread's dropped scores are the bits of one word");
  static_assert(2 * tile.walked <= kThreads, "one copy a thread brings lse and delta");

  using Scores = float[kFragmentsM][kFragmentsS][4];
  using Columns = float[kFragmentsM][kFragmentsO][4];

  // f(i, j, e) for each of a thread's scores: of row 16 i + 8 (e / 2) + lane / 4, column 8 j + lane % 4 · 2 + e % 2.
  template <class F>
  static FASTNN_DEVICE void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(i, j, e);
  }

  // Where a warp's scores lie: of which head, from which own and which walked position.
  struct Place {
    uint32_t head;
    int row, col, lane;

    FASTNN_DEVICE int own(int i, int e) const { return row + 16 * i + e / 2 * 8 + lane / 4; }
    FASTNN_DEVICE int walked(int j, int e) const { return col + 8 * j + lane % 4 * 2 + e % 2; }
    FASTNN_DEVICE int query(int i, int j, int e) const { return OF_KEYS ? walked(j, e) : own(i, e); }
    FASTNN_DEVICE int key(int i, int j, int e) const { return OF_KEYS ? own(i, e) : walked(j, e); }
  };

  // lse and delta of the queries: of a thread's rows in registers, or of the step's columns in shared memory.
  struct Rows {
    float lse[kFragmentsM][2], delta[kFragmentsM][2];
  };

  // ---- what a score weighs ------------------------------------------------------------------------------------------

  // Bits of the scores that dropout takes, (4 (i · fragments + j) + e).
  static FASTNN_DEVICE uint32_t dropped_scores(const AttentionForward& p, const Place& at) {
    constexpr int kKeys = OF_KEYS ? kWarpRows : kWarpCols, kWords = kKeys < 32 ? kKeys / 8 : 4;
    uint32_t dropped = 0;
    const uint64_t seed = philox_seed(p);
    const auto draw = [&](int query, int key, const auto& bit) {
      const auto words = philox(seed, {at.head, query}, key / 32 * 32 + key % 8);
      const bool upper = kWords < 4 && key % 32 >= 16;
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if ((upper ? words.data[(w + 2) % 4] : words.data[w]) < p.drop_below) dropped |= 1u << bit(w);
    };
    // A word of bits needs no registers of fixed names: one Philox at a time is what registers allow.
    if constexpr (OF_KEYS) {
#pragma unroll 1
      for (int n = 0; n < 2 * kFragmentsS; ++n) {
        const int j = n / 2, e = n % 2;
        draw(at.walked(j, e), at.own(0, 0), [&](int w) { return 4 * (w / 2 * kFragmentsS + j) + w % 2 * 2 + e; });
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < kFragmentsM * 4; ++n) {
        const int i = n / 4, e = n % 4;
#pragma unroll
        for (int j = 0; j < kFragmentsS; j += kWords)
          draw(at.own(i, e), at.walked(j, e), [&](int w) { return 4 * (i * kFragmentsS + j + w) + e; });
      }
    }
    return dropped;
  }

  // Adds the mask to the scores, a column of fragments at a time: the others wait, and each turn moves them up, for
  // registers do not hold loads for all of them.
  template <class M>
  static FASTNN_DEVICE void add_mask(const AttentionForward& p, Scores& s, const Place& at) {
    const M* const mask = static_cast<const M*>(p.mask.data) + p.mask.heads(at.head);
    const bool pairs = !OF_KEYS && p.mask.width > 1;  // two neighbours at once
#pragma unroll 1
    for (int j = 0; j < kFragmentsS; ++j) {
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float added[2] = {s[i][0][2 * half], s[i][0][2 * half + 1]};
          const int query = at.query(i, j, 2 * half), key = at.key(i, j, 2 * half);
          const M* const place = mask + query * p.mask.row_stride + key * p.mask.col_stride;
          if (pairs && query < p.query_length && key + 1 < p.key_length) {
            const auto pair = *reinterpret_cast<const Vector<M, 2>*>(place);
            added[0] = masked(added[0], pair.data[0]), added[1] = masked(added[1], pair.data[1]);
          } else {
            if (query < p.query_length && key < p.key_length) added[0] = masked(added[0], *place);
            if (OF_KEYS ? query + 1 < p.query_length && key < p.key_length
                        : query < p.query_length && key + 1 < p.key_length)
              added[1] = masked(added[1], place[OF_KEYS ? p.mask.row_stride : p.mask.col_stride]);
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int n = 0; n + 1 < kFragmentsS; ++n) s[i][n][2 * half + e] = s[i][n + 1][2 * half + e];
            s[i][kFragmentsS - 1][2 * half + e] = added[e];
          }
        }
    }
  }

  // Products become weights: s becomes P (for dV) and dp becomes dS. `columns`: lse of the walked queries, then delta.
  static FASTNN_DEVICE void weigh(const AttentionForward& p, Scores& s, Scores& dp, const Place& at, const Rows& rows,
                                  const float* columns, uint32_t dropped, bool edge) {
    const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
    const float c = static_cast<float>(p.factor), keep = static_cast<float>(p.keep);
    const auto drop = [&](Scores& x) {
      const uint32_t bits = static_cast<uint32_t>(ptx::opaque(static_cast<int>(dropped)));  // not kept bit by bit
      each([&](int i, int j, int e) {
        x[i][j][e] = bits >> (4 * (i * kFragmentsS + j) + e) & 1 ? 0.0f : x[i][j][e] * keep;
      });
    };
    if (p.drop_below) drop(dp);
    const auto of_column = [&](int j, int which) {
      return ptx::shared_load<Vector<float, 2>>(columns + which * tile.walked + 8 * j + at.lane % 4 * 2);
    };
#pragma unroll
    for (int j = 0; j < kFragmentsS; ++j) {
      Vector<float, 2> delta{};
      if constexpr (OF_KEYS) delta = of_column(j, 1);
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[i][j][e] -= OF_KEYS ? delta.data[e % 2] : rows.delta[i][e / 2];
    }
    if (scale != 1.0f) each([&](int i, int j, int e) { s[i][j][e] *= scale; });
    if (cap != 0.0f)
      each([&](int i, int j, int e) {
        const float t = tanh_approximate(s[i][j][e]);
        s[i][j][e] = cap * t, dp[i][j][e] *= 1.0f - t * t;
      });
    if (p.mask_type == AttentionMask::Bool) add_mask<uint8_t>(p, s, at);
    if (p.mask_type == AttentionMask::Query) add_mask<T>(p, s, at);
    if (p.mask_type == AttentionMask::Float32) add_mask<float>(p, s, at);
    const auto each_lse = [&](const auto& f) {  // f(a score, its lse)
#pragma unroll
      for (int j = 0; j < kFragmentsS; ++j) {
        Vector<float, 2> lse{};
        if constexpr (OF_KEYS) lse = of_column(j, 0);
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) f(s[i][j][e], safe_lse(OF_KEYS ? lse.data[e % 2] : rows.lse[i][e / 2]));
      }
    };
    const bool masks = p.mask_type != AttentionMask::None;
    if (masks) each_lse([](float& x, float lse) { x -= lse; });  // before the factor: see safe_top
    each_lse(
        [&](float& x, float lse) { x = ptx::exp2_approximate(::fmaf(x, c, masks ? 0.0f : lse * -kLog2E<float>)); });
    if (edge)
      each([&](int i, int j, int e) {
        const int query = at.query(i, j, e), key = at.key(i, j, e);
        if (key < query + p.first_shift || key > query + p.last_shift || key >= p.key_length)
          s[i][j][e] = dp[i][j][e] = 0.0f;
      });
    each([&](int i, int j, int e) { dp[i][j][e] *= s[i][j][e]; });
    if (OF_KEYS && p.drop_below) drop(s);
  }

  // ---- second products ----------------------------------------------------------------------------------------------

  static FASTNN_DEVICE void store_weights(unsigned char* to, const Scores& s, int row, int col, int lane) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kFragmentsS; ++j)
          ptx::shared_store(
              to + panel_place<tile.walked, tile.rows>(row + 16 * i + 8 * half + lane / 4, col / 8 + j) + lane % 4 * 4,
              ptx::pack_pair(s[i][j][2 * half], s[i][j][2 * half + 1], T{}));
  }
  static FASTNN_DEVICE void multiply_weights(Columns& out, const Scores& s, const unsigned char* weights, int row,
                                             const unsigned char* walked, int chunk, int lane) {
#pragma unroll(kUnrollWeights)
    for (int k = 0; k < tile.walked / 8; k += 2) {
      uint32_t a[kFragmentsM][4];
      if constexpr (kWarpsN == 1) {
        rounded<T>(a, s, k);
      } else {
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i)
          ptx::ldmatrix_x4(a[i], weights + panel_place<tile.walked, tile.rows>(row + 16 * i + lane % 16, k, lane / 16));
      }
      multiply_columns<T, tile.width, tile.walked>(out, a, walked, 8 * k, chunk, lane);
    }
  }

  // ---- the end ------------------------------------------------------------------------------------------------------

  // The warp's part of a gradient, through its part of a tile of own rows, so that 16 bytes are stored at once.
  static FASTNN_DEVICE void store(const AttentionRows& grad, const Columns& out, float factor, unsigned char* staging,
                                  uint32_t item, int first, int limit, int dim, int row, int chunk, int lane) {
    if (!grad.data) return;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kFragmentsO; ++n)
          ptx::shared_store(staging +
                                panel_place<tile.width, tile.rows>(row + 16 * i + 8 * half + lane / 4, chunk + n) +
                                lane % 4 * 4,
                            ptx::pack_pair(out[i][n][2 * half] * factor, out[i][n][2 * half + 1] * factor, T{}));
    __syncwarp();
    T* const data = static_cast<T*>(const_cast<void*>(grad.data)) + grad.heads(item);
#pragma unroll 1
    for (int index = lane; index < kWarpRows * kFragmentsO; index += 32) {
      const int r = row + index / kFragmentsO, c = chunk + index % kFragmentsO, count = cut(dim - 8 * c, 0, 8);
      if (first + r >= limit || count == 0) continue;
      const auto values = ptx::shared_load<Vector<T, 8>>(staging + panel_place<tile.width, tile.rows>(r, c));
      T* const to = data + (first + r) * grad.row_stride + 8 * c;
      if (grad.width == 16 && count == 8) {
        ptx::global_store_16(to, values);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < count) to[i] = values.data[i];
      }
    }
  }

  // ---- one block ----------------------------------------------------------------------------------------------------

  static FASTNN_DEVICE const uint16_t* head_of(const AttentionRows& x, uint32_t head) {
    return static_cast<const uint16_t*>(x.data) + x.heads(head);
  }
  template <int ROWS>
  static FASTNN_DEVICE void copy(unsigned char* to, const uint16_t* data, const AttentionRows& x, int rows, int cols,
                                 int first) {
    const RowMatrix from = {data, x.row_stride, rows, cols, x.width};
    // Where a thread copies is worked out each time: registers are what is short.
    copy_positions<tile.width, ROWS, kThreads>(to, from, x.col_stride, first,
                                               ptx::opaque(static_cast<int>(threadIdx.x)));
  }

  static FASTNN_DEVICE void run(const AttentionBackward& b) {
    const AttentionForward& p = b.forward;
    const AttentionRows &own1 = OF_KEYS ? p.key : p.query, &own2 = OF_KEYS ? p.value : b.grad_output;
    const AttentionRows &walk1 = OF_KEYS ? p.query : p.key, &walk2 = OF_KEYS ? b.grad_output : p.value;
    const int owned = OF_KEYS ? p.key_length : p.query_length, length = OF_KEYS ? p.query_length : p.key_length;
    unsigned char *const first_own = ptx::dynamic_shared(), *const second_own = first_own + kOwnBytes;
    unsigned char *const first_ring = second_own + kOwnBytes, *const second_ring = first_ring + 2 * kSlotBytes;
    unsigned char* const weights = second_ring + kSecondSlots * kSlotBytes;
    float* const statistics = reinterpret_cast<float*>(weights + 2 * kWeightBytes);  // [2 steps][lse, delta][walked]
    const int thread = static_cast<int>(threadIdx.x);

    // With a causal limit the first keys, and the last queries, take longest: they begin.
    const uint32_t tiles = static_cast<uint32_t>((owned + tile.rows - 1) / tile.rows), item = blockIdx.x / tiles;
    const int place = static_cast<int>(blockIdx.x % tiles);
    const int r0 = (OF_KEYS ? place : static_cast<int>(tiles) - 1 - place) * tile.rows;
    const int r1 = r0 + tile.rows < owned ? r0 + tile.rows : owned;
    const uint32_t group = static_cast<uint32_t>(p.group), first_head = OF_KEYS ? item * group : item;
    const uint32_t end_head = OF_KEYS ? first_head + group : item + 1;
    const int begin = (OF_KEYS ? cut(r0 - p.last_shift, 0, length) : cut(r0 + p.first_shift, 0, length)) / tile.walked;
    const int seen = OF_KEYS ? cut(r1 - p.first_shift, 0, length) : cut(r1 + p.last_shift, 0, length);
    const int end = (seen + tile.walked - 1) / tile.walked;  // of the steps of a head

    // The step that is worked on; what is loaded is the next of the same head, or the first of the next head.
    uint32_t head = first_head;
    int step = begin - 1, slot = 0;
    const uint16_t *first_walk = nullptr, *second_walk = nullptr;
    // Whether there is a next step; it begins with position `next` of `next_head`.
    const auto next_step = [&](uint32_t& next_head, int& next) {
      const bool wraps = step + 1 >= end;
      next_head = wraps ? head + 1 : head, next = (wraps ? begin : step + 1) * tile.walked;
      return next_head < end_head && begin < end;
    };
    const auto load_first = [&](int into) {
      uint32_t next_head;
      int next;
      if (!next_step(next_head, next)) return;
      if (next_head != head || step < begin) {
        first_walk = head_of(walk1, OF_KEYS ? next_head : next_head / group);
        second_walk = head_of(walk2, OF_KEYS ? next_head : next_head / group);
      }
      copy<tile.walked>(first_ring + into * kSlotBytes, first_walk, walk1, length, p.head_dim, next);
      if constexpr (OF_KEYS) {
        if (thread < 2 * tile.walked) {
          const int query = next + thread % tile.walked;
          const bool inside = query < length;
          const float* const from = static_cast<const float*>(thread < tile.walked ? p.lse : b.delta);
          ptx::cp_async<4>(statistics + into * 2 * tile.walked + thread,
                           inside ? from + (int64_t{next_head} * length + query) : from, inside ? 4 : 0);
        }
      }
    };
    const auto load_second = [&](int into) {
      uint32_t next_head;
      int next;
      if (next_step(next_head, next))
        copy<tile.walked>(second_ring + (kSecondSlots > 1 ? into : 0) * kSlotBytes, second_walk, walk2, length,
                          p.value_dim, next);
    };

    copy<tile.rows>(first_own, head_of(own1, item), own1, owned, p.head_dim, r0);
    copy<tile.rows>(second_own, head_of(own2, item), own2, owned, p.value_dim, r0);

    const int warp = thread / 32, lane = thread % 32, row = warp / kWarpsN * kWarpRows;
    Rows rows = {};
    if constexpr (!OF_KEYS) {
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = r0 + row + 16 * i + 8 * half + lane / 4;
          if (query >= owned) continue;
          const int64_t number = int64_t{item} * owned + query;
          rows.lse[i][half] = static_cast<const float*>(p.lse)[number];
          rows.delta[i][half] = static_cast<const float*>(b.delta)[number];
        }
    }
    Columns first = {};
    Columns second = {};  // dV

    // The first turn brings own rows and the first step, and works on none.
#pragma unroll 1
    for (;; slot ^= 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the step is there for all, and all have read what the next loads replace
      load_first(slot);
      if (kSecondSlots > 1 || step < begin) load_second(slot);
      ptx::cp_async_commit();
      if (begin >= end) break;
      if (step < begin) {
        ++step;
        continue;
      }

      // As above, worked out again in each step: addresses that hang on it are not kept in registers.
      const int again = ptx::opaque(thread);
      const int warp = again / 32, lane = again % 32;
      const int row = warp / kWarpsN * kWarpRows, col = warp % kWarpsN * kWarpCols;
      const int chunk = warp % kWarpsN * kFragmentsO;
      // What of the step the warp's rows see; of queries behind the last, all operands are 0.
      const int own0 = r0 + row, own1 = own0 + kWarpRows, walk0 = step * tile.walked;
      const int key0 = OF_KEYS ? own0 : walk0, key1 = OF_KEYS ? own1 : walk0 + tile.walked;
      const int query0 = OF_KEYS ? walk0 : own0, query1 = OF_KEYS ? walk0 + tile.walked : own1;
      const bool any = own0 < owned && key1 > query0 + p.first_shift && key0 < query1 + p.last_shift;
      const bool edge = key0 < query1 - 1 + p.first_shift || key1 > query0 + p.last_shift + 1 || key1 > p.key_length;
      const unsigned char* const walked1 = first_ring + (slot ^ 1) * kSlotBytes;
      const unsigned char* const walked2 = second_ring + (kSecondSlots > 1 ? slot ^ 1 : 0) * kSlotBytes;
      Scores s = {}, dp = {};
      if (any) {
        const Place at = {head, own0, walk0 + col, lane};
        const uint32_t dropped = p.drop_below ? dropped_scores(p, at) : 0;
        multiply_rows<T, tile.width, tile.rows, tile.walked, kUnroll>(s, first_own, row, walked1, col, lane);
        multiply_rows<T, tile.width, tile.rows, tile.walked, kUnroll>(dp, second_own, row, walked2, col, lane);
        weigh(p, s, dp, at, rows, statistics + (slot ^ 1) * 2 * tile.walked + col, dropped, edge);
        if constexpr (kWarpsN > 1) {
          store_weights(weights, dp, row, col, lane);
          if constexpr (OF_KEYS) store_weights(weights + kWeightBytes, s, row, col, lane);
        }
      }
      if constexpr (kWarpsN > 1) __syncthreads();  // weights are there for the warp that shares the rows
      if constexpr (OF_KEYS)
        if (any) multiply_weights(second, s, weights + kWeightBytes, row, walked2, chunk, lane);
      if constexpr (kSecondSlots == 1) {
        if constexpr (OF_KEYS || kWarpsN == 1) __syncthreads();  // all have read the slot
        load_second(0);
        ptx::cp_async_commit();
      }
      if (any) multiply_weights(first, dp, weights, row, walked1, chunk, lane);
      if (++step < end) continue;
      step = begin;
      if (++head == end_head) break;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads own rows any more
    const int chunk = warp % kWarpsN * kFragmentsO;
    store(b.grad, first, static_cast<float>(b.grad_scale), first_own, item, r0, owned, p.head_dim, row, chunk, lane);
    if constexpr (OF_KEYS)
      store(b.grad_value, second, 1.0f, second_own, item, r0, owned, p.value_dim, row, chunk, lane);
  }
};

template <class T, int TILE, bool OF_KEYS>
__global__ void __launch_bounds__(attention_grad_threads(kAttentionGradTiles[TILE]), 1)
    attention_grad_mma_kernel(__grid_constant__ const AttentionBackward b) {
  if constexpr (AttentionGradMmaKernel<T, TILE, OF_KEYS>::kBuilt) AttentionGradMmaKernel<T, TILE, OF_KEYS>::run(b);
}

}  // namespace fastnn::cuda
