// What sm_90a adds to execute.cpp: mbarriers, named barriers, TMA and wgmma. All of it is as late as a GPU may be: a TMA
// load lands when a phase that it ends is waited for, a TMA store writes when it is waited for, and accumulators hold a
// NaN from wgmma until wgmma_wait. What a GPU leaves undefined ends the program with a word about it:
//   - an mbarrier that others use, or TMA, before its initialisation reached them; too many arrivals; a phase overrun
//   - data read before the mbarrier of its copy was waited for, memory copied to while others still read or write it
//   - TMA or wgmma behind ordinary stores with no fence_async and barrier between
//   - memory written while a wgmma or TMA store reads it, accumulators touched while they are in flight, no wgmma_fence
//   - misaligned boxes, descriptors of another swizzle, warps of a warpgroup with different descriptors
// A block in which all wait for each other is reported with who waits where.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "block.h"

namespace fastnn::cuda::host {
namespace {

constexpr int kChunks = kShared / 16;
constexpr uint32_t kInFlight = 0x7fbadbad;  // what accumulators hold meanwhile

struct Box {
  unsigned char* shared;
  TensorMap map;
  int at[5];
  int bytes;
};

struct Mbarrier {
  size_t offset;
  int arrivals, pending, maker;
  int64_t bytes;  // expected and not landed
  uint32_t phase, made;
  bool fenced;
  std::vector<Box> coming;
  Clock arrived, done;
};

struct Named {
  int threads = 0, arrived = 0;
  int of_warp[32] = {};
  std::vector<int> waiting;
  Clock clock;
};

using Chunks = std::shared_ptr<std::vector<int>>;

struct Accumulator {  // of one warp
  float* d[kLanes];
  int n, batches;           // in flight that write it
  std::vector<float> sums;  // [16, n]
};

struct Batch {
  std::vector<Chunks> reads;
  std::vector<float*> accumulators;
};

struct WarpState {
  bool fenced = false;
  std::vector<Batch> batches;
  Batch open;
  std::vector<Accumulator> accumulators;
};

struct ThreadState {
  int bar, parity, named;
  uint32_t phase;  // when it began to wait
  std::vector<uint32_t> fences;
  std::vector<std::vector<Box>> stores;
  std::vector<Box> open;
};

bool dirty = true;
std::vector<Mbarrier> bars;
int8_t bar_at[kShared / 8];
Named named[16];
int group_waiting[8], group_registers[8];
WarpState warp_states[32];
ThreadState thread_states[1024];
uint16_t in_flight[kChunks];        // reads of wgmma and TMA stores
uint32_t chunk_readers[kChunks];    // warps whose reads have landed
std::vector<uint32_t> chunk_times;  // [chunk, 32]: when

void need_sm90() {
  if (machine.capability != 90) fail("an instruction of sm_90a on another machine");
  dirty = true;
}

bool known_of_some_lane(const Thread& thread, int warp, uint32_t time) {
  for (int i = 0; i < kLanes; ++i)
    if (known(thread, warp * kLanes + i, time)) return true;
  return false;
}

// That an instruction of the async proxy, issued by the thread, may read these bytes or write over them.
void check_async(const Thread& thread, size_t offset, int bytes, bool reads) {
  int writer = -1;
  uint32_t time = 0;
  bool stored = false;
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    const Cell& cell = cells[i];
    if (cell.coming)
      fail(reads ? "shared memory read before the copy that fills it was waited for"
                 : "shared memory written while a copy to it is on its way");
    if (reads) {
      if (cell.barrier) fail("an mbarrier read as data");
      if (cell.writer < 0) fail("shared memory read before it was written");
    }
    if (cell.writer < 0 || (cell.writer == writer && cell.write_time == time && cell.stored == stored)) continue;
    writer = cell.writer, time = cell.write_time, stored = cell.stored;
    if (reads && !known(thread, writer, time)) fail("shared memory read with no barrier after another thread's write");
    if (!stored) continue;
    const auto& fences = thread_states[writer].fences;
    const auto fence = std::lower_bound(fences.begin(), fences.end(), time);
    if (fence == fences.end() || !known(thread, writer, *fence))
      fail("TMA or wgmma behind ordinary stores without fence_async");
  }
}

void begin_read(const std::vector<int>& chunks, int count) {
  for (const int chunk : chunks) in_flight[chunk] += count;
}

void end_read(const std::vector<int>& chunks, int warp) {
  for (const int chunk : chunks) {
    --in_flight[chunk];
    chunk_readers[chunk] |= 1u << warp;
    chunk_times[chunk * 32 + warp] = now;
  }
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

int find(const void* bar) {
  need_sm90();
  check_aligned(bar, 8, "a misaligned mbarrier");
  const int index = bar_at[offset_of(bar, 8) / 8];
  if (index < 0) fail("an mbarrier that was not initialised");
  if (!known(*current, bars[index].maker, bars[index].made))
    fail("an mbarrier used with no barrier after its initialisation");
  return index;
}

// ---- boxes ----------------------------------------------------------------------------------------------------------

size_t swizzle(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

Box make_box(const void* to, const TensorMap* map, const int* at, int rank) {
  need_sm90();
  check_aligned(map, 64, "a misaligned tensor map");
  check_aligned(to, 128, "a misaligned box in shared memory");
  if (map->rank != rank) fail("a box of another rank than its tensor map");
  Box box = {static_cast<unsigned char*>(const_cast<void*>(to)), *map, {}, map->element};
  for (int i = 0; i < rank; ++i) box.at[i] = at[i], box.bytes *= map->box[i];
  offset_of(to, box.bytes);
  return box;
}

// f(row in shared memory, address of the row's first element inside, first element inside, how many are) for each row.
template <class F>
void for_rows(const Box& box, const F& f) {
  const TensorMap& map = box.map;
  int64_t at[5] = {};
  for (int row = 0; row < box.bytes / 128; ++row) {
    bool inside = true;
    unsigned char* address = static_cast<unsigned char*>(map.data);
    int64_t rest = row;
    for (int i = 1; i < map.rank; ++i) {
      at[i] = box.at[i] + rest % map.box[i], rest /= map.box[i];
      inside &= at[i] >= 0 && at[i] < map.sizes[i];
      address += at[i] * map.strides[i];
    }
    const int64_t first = std::max<int64_t>(0, -box.at[0]);
    const int64_t last = std::min<int64_t>(map.box[0], map.sizes[0] - box.at[0]);
    const int count = inside && first < last ? static_cast<int>(last - first) : 0;
    f(box.shared + row * 128, address + (box.at[0] + first) * map.element, static_cast<int>(first), count);
  }
}

void land(Mbarrier& bar, int writer) {
  for (const Box& box : bar.coming) {
    for_rows(box, [&](unsigned char* row, const unsigned char* from, int first, int count) {
      unsigned char data[128] = {};
      if (count) std::memcpy(data + first * box.map.element, from, static_cast<size_t>(count) * box.map.element);
      for (int chunk = 0; chunk < 8; ++chunk)
        copy_bytes(shared + swizzle(row - shared + chunk * 16), data + chunk * 16, 16);
    });
    const size_t cell = offset_of(box.shared, box.bytes) / 2;
    for (int i = 0; i < box.bytes / 2; ++i) {
      Cell& c = cells[cell + i];
      c.coming = c.stored = false, c.writer = static_cast<int16_t>(writer), c.write_time = now;
    }
    bar.bytes -= box.bytes;
  }
  bar.coming.clear();
  bar.arrived[writer] = now++;
}

void end_phase(Mbarrier& bar) {
  if (bar.pending || bar.bytes) return;
  bar.done = bar.arrived, bar.pending = bar.arrivals, ++bar.phase;
}

}  // namespace

// ---- the block ------------------------------------------------------------------------------------------------------

void start_block_sm90() {
  if (!dirty) return;
  dirty = false;
  bars.clear();
  std::memset(bar_at, -1, sizeof bar_at);
  for (Named& barrier : named) barrier = Named();
  std::fill_n(group_waiting, 8, 0), std::fill_n(group_registers, 8, 0);
  for (WarpState& warp : warp_states) warp = WarpState();
  for (int i = 0; i < threads_in_block; ++i) thread_states[i] = ThreadState();
  std::fill_n(in_flight, kChunks, uint16_t{0}), std::fill_n(chunk_readers, kChunks, 0u);
  chunk_times.resize(kChunks * 32);
}

void end_block_sm90() {
  for (const Mbarrier& bar : bars)
    if (!bar.coming.empty()) fail("a block ends before its TMA copies landed");
}

void end_thread_sm90(Thread& thread) {
  const ThreadState& state = thread_states[thread.number];
  if (!state.open.empty()) fail("a thread ends before its TMA store was committed");
  if (!state.stores.empty()) fail("a thread ends before its TMA store was waited for");
  const WarpState& warp = warp_states[thread.warp];
  if (!warp.batches.empty() || !warp.accumulators.empty()) fail("a thread ends before its wgmma was waited for");
}

void describe_sm90(const Thread& thread, char* text, size_t size) {
  const ThreadState& state = thread_states[thread.number];
  if (thread.state == State::Named) {
    const Named& barrier = named[state.named];
    std::snprintf(text, size, "waits at named barrier %d, where %d of %d threads are", state.named, barrier.arrived,
                  barrier.threads);
  } else {
    const Mbarrier& bar = bars[state.bar];
    std::snprintf(
        text, size,
        "waits for parity %d of the mbarrier at byte %zu of shared memory, in its phase %u; %d of %d arrivals "
        "and %lld bytes are missing",
        state.parity, bar.offset, bar.phase, bar.pending, bar.arrivals, static_cast<long long>(bar.bytes));
  }
}

void check_written_async(const Thread& thread, size_t offset, int bytes) {
  for (size_t chunk = offset / 16; chunk * 16 < offset + bytes; ++chunk) {
    if (in_flight[chunk]) fail("shared memory written while a wgmma or a TMA store reads it");
    for (uint32_t mask = chunk_readers[chunk]; mask; mask &= mask - 1) {
      const int warp = __builtin_ctz(mask);
      if (!known_of_some_lane(thread, warp, chunk_times[chunk * 32 + warp]))
        fail("shared memory written with no barrier after a wgmma or a TMA store read it");
    }
    if (offset <= chunk * 16 && chunk * 16 + 16 <= offset + bytes) chunk_readers[chunk] = 0;
  }
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* bar, int arrivals) {
  need_sm90();
  check_aligned(bar, 8, "a misaligned mbarrier");
  check_write(*current, bar, 8, false);
  if (arrivals < 1 || arrivals >= 1 << 20) fail("an mbarrier for no arrivals");
  if (bars.size() == kMbarriers) fail("too many mbarriers");
  start_clocks();
  const size_t offset = offset_of(bar, 8);
  for (int i = 0; i < 4; ++i) cells[offset / 2 + i].barrier = true;
  bar_at[offset / 8] = static_cast<int8_t>(bars.size());
  const Clock none(threads_in_block + kMbarriers);
  bars.push_back({offset, arrivals, arrivals, current->number, 0, 0, now, false, {}, none, none});
}

void mbarrier_init_fence() {
  for (Mbarrier& bar : bars)
    if (bar.maker == current->number) bar.fenced = true;
}

void mbarrier_arrive(uint64_t* at, int bytes) {
  Mbarrier& bar = bars[find(at)];
  if (bar.pending == 0) fail("more arrivals at an mbarrier than its phase takes");
  release(*current, bar.arrived);
  ++now;
  --bar.pending, bar.bytes += bytes;
  end_phase(bar);
}

void mbarrier_wait(uint64_t* at, int parity) {
  if (parity != 0 && parity != 1) fail("a parity of an mbarrier that is neither 0 nor 1");
  ThreadState& state = thread_states[current->number];
  state.bar = find(at), state.parity = parity, state.phase = bars[state.bar].phase;
  if (!wake(*current)) wait(State::Mbarrier, "mbarrier_wait", 0);
}

bool wake(Thread& thread) {
  const ThreadState& state = thread_states[thread.number];
  Mbarrier& bar = bars[state.bar];
  const bool waited = static_cast<int>(state.phase & 1) == state.parity;
  if (waited && bar.phase == state.phase && bar.pending == 0 && !bar.coming.empty()) {
    land(bar, threads_in_block + state.bar);
    end_phase(bar);
  }
  if (waited && bar.phase == state.phase) return false;
  if (waited && bar.phase > state.phase + 1) fail("an mbarrier is two phases ahead of one that waits");
  acquire(thread, bar.done);
  return true;
}

// ---- barriers of some warps -----------------------------------------------------------------------------------------

void named_barrier(int id, int count, bool waits) {
  dirty = true;
  if (id < 1 || id > 15) fail("a named barrier that is not one of 1 to 15");
  if (count < kLanes || count % kLanes || count > threads_in_block)
    fail("a named barrier of a wrong number of threads");
  Named& barrier = named[id];
  if (barrier.arrived && barrier.threads != count) fail("a named barrier with different numbers of threads");
  barrier.threads = count;
  release(*current, barrier.clock);
  ++now, ++barrier.arrived, ++barrier.of_warp[current->warp];
  if (waits) barrier.waiting.push_back(current->number);
  if (barrier.arrived < count) {
    thread_states[current->number].named = id;
    if (waits) wait(State::Named, "named_barrier", id);
    return;
  }
  for (const int lanes : barrier.of_warp)
    if (lanes % kLanes) fail("a named barrier that not all lanes of a warp reach");
  for (const int i : barrier.waiting) {
    acquire(threads[i], barrier.clock);
    if (i != current->number) threads[i].state = State::Ready;
  }
  barrier = Named();
}

// ---- registers ------------------------------------------------------------------------------------------------------

static int& warpgroup_waiting() {
  if (current->warp / 4 * 4 + 4 > static_cast<int>(warps.size())) fail("a warpgroup of fewer than four warps");
  return group_waiting[current->warp / 4];
}

void registers(int count) {
  need_sm90();
  with_threads(128, warpgroup_waiting(), State::Warpgroup, count, "setmaxnreg", count, [&](int**, Thread*) {
    group_registers[current->warp / 4] = count;
    int sum = 0;
    for (const int each : group_registers) sum += 128 * each;
    if (sum > 65536) fail("more registers than a multiprocessor has");
  });
}

// ---- TMA ------------------------------------------------------------------------------------------------------------

void fence_async() {
  need_sm90();
  thread_states[current->number].fences.push_back(now++);
}

void tma_load(void* to, const TensorMap* map, uint64_t* at_bar, const int* at, int rank) {
  Mbarrier& bar = bars[find(at_bar)];
  if (!bar.fenced) fail("an mbarrier used by TMA without mbarrier_init_fence");
  Box box = make_box(to, map, at, rank);
  check_async(*current, offset_of(to, box.bytes), box.bytes, false);
  check_write(*current, to, box.bytes, true);
  bar.coming.push_back(box);
}

void tma_store(const TensorMap* map, const void* from, const int* at, int rank) {
  Box box = make_box(from, map, at, rank);
  const size_t offset = offset_of(from, box.bytes);
  check_async(*current, offset, box.bytes, true);
  for (int i = 0; i < box.bytes / 16; ++i) ++in_flight[offset / 16 + i];
  thread_states[current->number].open.push_back(box);
}

void tma_store_commit() {
  ThreadState& state = thread_states[current->number];
  state.stores.push_back(std::move(state.open));
  state.open.clear();
}

void tma_store_wait(int pending) {
  auto& stores = thread_states[current->number].stores;
  const int landed = std::max(0, static_cast<int>(stores.size()) - pending);
  for (int i = 0; i < landed; ++i)
    for (const Box& box : stores[i]) {
      for_rows(box, [&](unsigned char* row, unsigned char* to, int first, int count) {
        unsigned char data[128];
        for (int chunk = 0; chunk < 8; ++chunk)
          copy_bytes(data + chunk * 16, shared + swizzle(row - shared + chunk * 16), 16);
        if (count) std::memcpy(to, data + first * box.map.element, static_cast<size_t>(count) * box.map.element);
      });
      std::vector<int> chunks;
      for (int j = 0; j < box.bytes / 16; ++j) chunks.push_back(static_cast<int>((box.shared - shared) / 16) + j);
      end_read(chunks, current->warp);
    }
  stores.erase(stores.begin(), stores.begin() + landed);
  ++now;
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

uint32_t shared_offset(const void* pointer) {
  if (static_cast<const unsigned char*>(pointer) < shared ||
      static_cast<const unsigned char*>(pointer) >= shared + kShared)
    fail("an access outside of shared memory");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared);
}

static float value_of(uint16_t bits, bool half) {
  static const std::vector<float>& halves = *new std::vector<float>([] {
    std::vector<float> table(65536);
    for (int i = 0; i < 65536; ++i) table[i] = half_to_float(static_cast<uint16_t>(i));
    return table;
  }());
  if (half) return halves[bits];
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Reads [rows, 16] through a descriptor into matrix[k * rows + row], and notes the chunks.
static void read_operand(uint64_t descriptor, int rows, bool along_k, bool half, float* matrix,
                         std::vector<int>& chunks) {
  const auto field = [&](int first, int bits) { return static_cast<size_t>(descriptor >> first & ((1 << bits) - 1)); };
  const size_t start = field(0, 14) * 16, leading = field(16, 14) * 16, stride = field(32, 14) * 16;
  if (descriptor >> 62 != 1 || field(49, 3)) fail("a descriptor of another swizzle than that of 128 bytes");
  if (start % 1024 > (along_k ? 96 : 0)) fail("a descriptor that does not start at a swizzled tile");
  if (stride % 1024 || (!along_k && rows > 64 && leading % 1024)) fail("a descriptor whose tiles are misaligned");
  const int lines = along_k ? rows : 16, chunks_in_line = along_k ? 2 : rows / 8;
  for (int line = 0; line < lines; ++line)
    for (int chunk = 0; chunk < chunks_in_line; ++chunk) {
      const size_t place = swizzle(start + line / 8 * stride + line % 8 * 128 +
                                   (along_k ? chunk * 16 : chunk / 8 * leading + chunk % 8 * 16));
      uint16_t data[8];
      offset_of(shared + place, 16);
      copy_bytes(data, shared + place, 16);
      chunks.push_back(static_cast<int>(place / 16));
      for (int i = 0; i < 8; ++i)
        (along_k ? matrix[(chunk * 8 + i) * rows + line] : matrix[line * rows + chunk * 8 + i]) =
            value_of(data[i], half);
    }
}

namespace {

struct Wgmma {
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate;
};

// Where element (row, col) of a warp's 16 rows lies: in d of which lane, at which index.
struct Place {
  int lane, index;
};
Place place_of(int row, int col) { return {row % 8 * 4 + col % 8 / 2, col / 8 * 4 + row / 8 * 2 + col % 2}; }

void check_in_flight(const Accumulator& accumulator) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < accumulator.n / 2; ++i) {
      uint32_t bits;
      std::memcpy(&bits, accumulator.d[lane] + i, 4);
      if (bits != kInFlight) fail("accumulators touched while a wgmma is in flight");
    }
}

Accumulator& accumulator_of(WarpState& warp, Wgmma** lanes, int n) {
  for (Accumulator& has : warp.accumulators)
    if (has.d[0] == lanes[0]->d) {
      if (has.n != n) fail("accumulators of wgmmas of different shapes in flight");
      check_in_flight(has);
      if (!warp.fenced && lanes[0]->a_registers) fail("wgmma from registers without wgmma_fence before it");
      return has;
    } else if (has.d[0] < lanes[0]->d + n / 2 && lanes[0]->d < has.d[0] + has.n / 2) {
      fail("accumulators of wgmmas of different shapes in flight");
    }
  if (!warp.fenced) fail("wgmma without wgmma_fence before it");
  Accumulator& made = warp.accumulators.emplace_back();
  made.n = n, made.batches = 0, made.sums.resize(16 * n);
  for (int lane = 0; lane < kLanes; ++lane) made.d[lane] = lanes[lane]->d;
  for (int row = 0; row < 16; ++row)
    for (int col = 0; col < n; ++col) {
      const Place at = place_of(row, col);
      float& from = made.d[at.lane][at.index];
      made.sums[row * n + col] = from;
      std::memcpy(&from, &kInFlight, 4);
    }
  return made;
}

}  // namespace

void wgmma_fence() {
  need_sm90();
  int nothing = 0;
  with_warp(nothing, "wgmma_fence", 0, [](int**, Thread*) { warp_states[current->warp].fenced = true; });
}

void wgmma_commit() {
  int nothing = 0;
  with_warp(nothing, "wgmma_commit", 0, [](int**, Thread*) {
    WarpState& warp = warp_states[current->warp];
    warp.batches.push_back(std::move(warp.open));
    warp.open = Batch();
    warp.fenced = false;
  });
}

void wgmma_wait(int pending) {
  int nothing = 0;
  with_warp(nothing, "wgmma_wait", pending, [&](int**, Thread*) {
    WarpState& warp = warp_states[current->warp];
    const int landed = std::max(0, static_cast<int>(warp.batches.size()) - pending);
    for (int i = 0; i < landed; ++i) {
      for (const Chunks& chunks : warp.batches[i].reads) end_read(*chunks, current->warp);
      for (float* const d : warp.batches[i].accumulators) {
        const auto at = std::find_if(warp.accumulators.begin(), warp.accumulators.end(),
                                     [&](const Accumulator& has) { return has.d[0] == d; });
        if (--at->batches) continue;
        check_in_flight(*at);
        for (int row = 0; row < 16; ++row)
          for (int col = 0; col < at->n; ++col) {
            const Place place = place_of(row, col);
            at->d[place.lane][place.index] = at->sums[row * at->n + col];
          }
        warp.accumulators.erase(at);
      }
    }
    warp.batches.erase(warp.batches.begin(), warp.batches.begin() + landed);
    warp.fenced = false;
    ++now;
  });
}

void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool a_along_k, bool b_along_k,
           bool half, bool accumulate) {
  need_sm90();
  Wgmma operand = {d, a_registers, a, b, accumulate};
  const int kind = n * 16 + (a_registers ? 8 : 0) + a_along_k * 4 + b_along_k * 2 + half;
  with_threads(128, warpgroup_waiting(), State::Warpgroup, operand, "wgmma", kind, [&](Wgmma** all, Thread* group) {
    for (int i = 0; i < 128; ++i)
      if (all[i]->a != a || all[i]->b != b || all[i]->accumulate != accumulate)
        fail("operands of a wgmma that differ between its threads");
    static float A[16 * 64], B[16 * 256];
    const Chunks chunks = std::make_shared<std::vector<int>>();
    if (a_registers) {
      for (int i = 0; i < 128; ++i)
        for (int j = 0; j < 8; ++j) {
          const int row = i / 32 * 16 + i % 32 / 4 + j / 2 % 2 * 8, k = i % 4 * 2 + j % 2 + j / 4 * 8;
          A[k * 64 + row] = value_of(static_cast<uint16_t>(all[i]->a_registers[j / 2] >> (j % 2 * 16)), half);
        }
    } else {
      read_operand(a, 64, a_along_k, half, A, *chunks);
    }
    read_operand(b, n, b_along_k, half, B, *chunks);
    for (int w = 0; w < 4; ++w)
      for (const int chunk : *chunks) check_async(group[w * 32], static_cast<size_t>(chunk) * 16, 16, true);
    begin_read(*chunks, 4);
    for (int w = 0; w < 4; ++w) {
      WarpState& warp = warp_states[group[w * 32].warp];
      Accumulator& sums = accumulator_of(warp, all + w * 32, n);
      warp.open.reads.push_back(chunks);
      auto& written = warp.open.accumulators;
      if (std::find(written.begin(), written.end(), sums.d[0]) == written.end())
        written.push_back(sums.d[0]), ++sums.batches;
      for (int row = 0; row < 16; ++row) {
        double products[256] = {};
        for (int k = 0; k < 16; ++k) {
          const double x = A[k * 64 + w * 16 + row];
          for (int col = 0; col < n; ++col) products[col] += x * B[k * n + col];
        }
        for (int col = 0; col < n; ++col) {
          float& sum = sums.sums[row * n + col];
          sum = static_cast<float>(products[col] + (accumulate ? sum : 0.0f));
        }
      }
    }
  });
}

}  // namespace fastnn::cuda::host
