// Runs a kernel on the CPU, block after block, the threads of a block as fibers that give way at barriers and at
// instructions of a whole warp. What a GPU leaves undefined ends the program with a word about it:
//   - a barrier that not all threads of the block reach, or at different lines; a warp's instruction without all 32 lanes
//   - shared memory read before it was written, or before the cp.async that fills it was waited for
//   - shared memory accessed by two threads, one of them writing, with no barrier between (__syncthreads, or __syncwarp
//     inside a warp)
//   - misaligned cp.async and ldmatrix, shared memory out of bounds; global memory is AddressSanitizer's matter
// sm90.cpp adds mbarriers, TMA, wgmma and named barriers, and what goes wrong with them.
// Shared memory is poisoned for AddressSanitizer, so a pointer to it works through the functions of ptx.cuh alone.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "block.h"

#if defined(FASTNN_WITH_ASAN)  // linked with it; this file itself is compiled without, to be quick
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastnn::cuda::host {

std::vector<Thread>& threads = *new std::vector<Thread>;  // their stacks live as long as the program
std::vector<Warp> warps;
std::vector<Cell> cells(kShared / 2);
alignas(1024) unsigned char shared[kShared];
int shared_bytes, threads_in_block;
uint32_t now = 1, block_synced;
Thread* current = nullptr;
bool clocked = false;

namespace {

constexpr int kStack = 256 * 1024;

int at_barrier, done;
Context scheduler;
const std::function<void()>* body = nullptr;
std::mt19937 random_order;
std::map<const void*, int> allowed;
std::vector<uint32_t> read_times;  // [cell, warp]

// ---- fibers ---------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void fastnn_switch_stack(void** save, void* load);
asm(R"(
.text
.globl fastnn_switch_stack
fastnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

// Leaves `from`, goes on in `to`; returns when something switches back.
void switch_to(Context& from, Context& to) {
#if defined(FASTNN_WITH_ASAN)
  __sanitizer_start_switch_fiber(&from.shadow, to.stack, to.size);
#endif
#if defined(__x86_64__)
  fastnn_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
#if defined(FASTNN_WITH_ASAN)
  __sanitizer_finish_switch_fiber(from.shadow, nullptr, nullptr);
#endif
}

void run_fiber() {
#if defined(FASTNN_WITH_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.size);
#endif
  for (;;) {
    (*body)();
    if (!current->open.empty() || !current->groups.empty()) {
      for (const auto& group : current->groups)
        if (!group.empty()) fail("a thread ends before its cp.async landed");
      if (!current->open.empty()) fail("a thread ends before its cp.async was committed");
    }
    current->groups.clear();
    end_thread_sm90(*current);
    current->state = State::Done;
    ++done;
    switch_to(current->context, scheduler);
  }
}

void make_fiber(Thread& thread) {
  void* const stack = std::aligned_alloc(64, kStack);
  thread.context.stack = stack, thread.context.size = kStack;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStack);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(run_fiber);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  thread.context.stack_pointer = top - 8;
#else
  getcontext(&thread.context.state);
  thread.context.state.uc_stack.ss_sp = stack, thread.context.state.uc_stack.ss_size = kStack;
  makecontext(&thread.context.state, run_fiber, 0);
#endif
}

// Who waits where, in runs of threads that do the same; then the end of the program.
[[noreturn]] void deadlock() {
  const auto describe = [](const Thread& thread) {
    char text[200] = "";
    switch (thread.state) {
      case State::Ready: return std::string("runs");
      case State::Done: return std::string("has ended");
      case State::Barrier: std::snprintf(text, sizeof text, "waits at %s:%d", thread.file, thread.line); break;
      case State::Warp:
      case State::Warpgroup:
        std::snprintf(text, sizeof text, "waits in %s:%d for the rest of its warp or warpgroup", thread.file,
                      thread.line);
        break;
      default: describe_sm90(thread, text, sizeof text);
    }
    return std::string(text);
  };
  for (int first = 0, i = 1; i <= threads_in_block; ++i)
    if (i == threads_in_block || describe(threads[i]) != describe(threads[first])) {
      std::fprintf(stderr, "cuda host: threads %d to %d: %s\n", first, i - 1, describe(threads[first]).c_str());
      first = i;
    }
  State worst = State::Done;  // the plainest first
  for (const State state : {State::Mbarrier, State::Named, State::Barrier, State::Warpgroup, State::Warp})
    for (int i = 0; i < threads_in_block; ++i)
      if (threads[i].state == state) worst = state, current = &threads[i];
  fail(worst == State::Warp || worst == State::Warpgroup ? "an instruction of a warp that not all its lanes reach"
       : worst == State::Barrier                         ? "a barrier that not all threads of the block reach"
                                                         : "a deadlock: all threads wait for each other");
}

void run_block(const std::vector<int>& order) {
  std::fill_n(cells.begin(), (shared_bytes + 1) / 2, Cell());
  std::fill(warps.begin(), warps.end(), Warp());
  read_times.resize(std::max(read_times.size(), cells.size() * warps.size()));
  at_barrier = done = 0;
  block_synced = now++;
  clocked = false;
  start_block_sm90();
  for (int i = 0; i < threads_in_block; ++i) threads[i].state = State::Ready;
  while (done < threads_in_block) {
    bool moved = false;
    for (const int i : order) {
      current = &threads[i];
      if (threads[i].state == State::Mbarrier && wake(threads[i])) threads[i].state = State::Ready;
      if (threads[i].state != State::Ready) continue;
      moved = true;
      threadIdx = current->index;
      switch_to(scheduler, current->context);
    }
    if (at_barrier == threads_in_block) {
      for (int i = 1; i < threads_in_block; ++i)
        if (threads[i].line != threads[0].line || std::strcmp(threads[i].file, threads[0].file)) {
          current = &threads[i];
          fail("threads of a block meet at different barriers");
        }
      for (int i = 0; i < threads_in_block; ++i) threads[i].state = State::Ready;
      at_barrier = 0, block_synced = now++;
      moved = true;
    }
    if (!moved && done < threads_in_block) deadlock();
  }
  end_block_sm90();
  current = nullptr;
}

}  // namespace

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda host: %s; thread %d of block (%u, %u, %u), %s:%d\n", what, current ? current->number : -1,
               blockIdx.x, blockIdx.y, blockIdx.z, current ? current->file : "", current ? current->line : 0);
  std::abort();
}

void wait(State state, const char* file, int line) {
  current->state = state, current->file = file, current->line = line;
  Thread* const self = current;
  switch_to(self->context, scheduler);
}

// ---- clocks ---------------------------------------------------------------------------------------------------------

static std::vector<Clock> clocks;

Clock& clock_of(int thread) { return clocks[thread]; }

void start_clocks() {  // times of earlier blocks are too early to matter
  if (clocked) return;
  clocked = true;
  clocks.resize(std::max(clocks.size(), size_t(threads_in_block)));
  for (int i = 0; i < threads_in_block; ++i) clocks[i].assign(threads_in_block + kMbarriers, block_synced);
}

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  uint32_t* const a = clock.data();
  const uint32_t* const b = other.data();
  for (size_t i = 0, size = other.size(); i < size; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
}

void release(const Thread& thread, Clock& to) {
  start_clocks();
  join(to, clocks[thread.number]);
  for (int i = thread.number / kLanes * kLanes, end = i + kLanes; i < end; ++i)
    to[i] = std::max(to[i], i == thread.number ? now : warps[thread.warp].synced);
}

void acquire(const Thread& thread, const Clock& from) {
  start_clocks();
  join(clocks[thread.number], from);
}

bool known(const Thread& thread, int other, uint32_t time) {
  if (other == thread.number || time <= block_synced) return true;
  if (other < threads_in_block && other / kLanes == thread.warp && time <= warps[thread.warp].synced) return true;
  return clocked && clocks[thread.number][other] >= time;
}

// Whether the thread knows of all that all lanes of a warp did until then.
static bool known_of_warp(const Thread& thread, int warp, uint32_t time) {
  if (time <= block_synced || (warp == thread.warp && time <= warps[warp].synced)) return true;
  if (!clocked) return false;
  const uint32_t* const lanes = clocks[thread.number].data() + warp * kLanes;
  for (int i = 0; i < kLanes; ++i)
    if (lanes[i] < time && warp * kLanes + i != thread.number) return false;
  return true;
}

// ---- the watch over shared memory -----------------------------------------------------------------------------------

size_t offset_of(const void* pointer, int bytes) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p < shared || p + bytes > shared + shared_bytes) fail("an access outside of shared memory");
  if ((p - shared) % 2 || bytes % 2) fail("an access of an odd byte of shared memory");
  return static_cast<size_t>(p - shared);
}

void check_read(const Thread& thread, const void* from, int bytes) {
  const size_t offset = offset_of(from, bytes), count = warps.size();
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.barrier) fail("an mbarrier read as data");
    if (cell.coming) fail("shared memory read before the copy that fills it was waited for");
    if (cell.writer < 0) fail("shared memory read before it was written");
    if (!known(thread, cell.writer, cell.write_time))
      fail("shared memory read with no barrier after another thread's write");
    // Who knows of this read knows of those that this thread knew of: they need not be remembered.
    const uint32_t own = 1u << thread.warp;
    if (cell.reader >= 0 ? known(thread, cell.reader, cell.read_time)
                         : cell.read_time <= block_synced ||
                               (cell.reading_warps == own && cell.read_time <= warps[thread.warp].synced))
      cell.reading_warps = 0;
    cell.reader = cell.reading_warps == 0 ? static_cast<int16_t>(thread.number) : -2;
    cell.reading_warps |= own;
    read_times[i * count + thread.warp] = cell.read_time = now;
  }
}

void check_write(const Thread& thread, const void* to, int bytes, bool coming) {
  const size_t offset = offset_of(to, bytes), count = warps.size();
  check_written_async(thread, offset, bytes);
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.barrier) fail("an mbarrier written as data");
    if (cell.coming) fail("shared memory written while a copy to it is on its way");
    if (cell.writer >= 0 && !known(thread, cell.writer, cell.write_time))
      fail("shared memory written with no barrier after another thread's write");
    if (cell.reading_warps && cell.reader != thread.number) {
      for (uint32_t mask = cell.reading_warps; mask; mask &= mask - 1) {
        const int warp = __builtin_ctz(mask);
        const uint32_t time = read_times[i * count + warp];
        if (cell.reader >= 0 ? !known(thread, cell.reader, time) : !known_of_warp(thread, warp, time))
          fail("shared memory written with no barrier after another thread's read");
      }
    }
    cell.writer = static_cast<int16_t>(thread.number), cell.write_time = now;
    cell.reader = -1, cell.reading_warps = 0;
    cell.coming = coming, cell.stored = true;
  }
}

void copy_bytes(void* to, const void* from, int bytes) {
  for (int i = 0; i < bytes; i += 2) {
    *reinterpret_cast<volatile uint16_t*>(static_cast<char*>(to) + i) =
        *reinterpret_cast<const volatile uint16_t*>(static_cast<const char*>(from) + i);
  }
}

void check_aligned(const void* pointer, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(what);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > machine.shared_bytes) return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t execute(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const dim3 block = config.blockDim, grid = config.gridDim;
  const int count = static_cast<int>(block.x * block.y * block.z);
  if (count == 0 || count > 1024 || count % kLanes) return cudaErrorInvalidConfiguration;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  const size_t most = allowed.count(kernel) ? allowed[kernel] : 49152;
  if (config.dynamicSmemBytes > most) return cudaErrorInvalidValue;
  ++launches;
  while (static_cast<int>(threads.size()) < count) threads.reserve(1024), make_fiber(threads.emplace_back());
  warps.resize(count / kLanes);
  threads_in_block = count, shared_bytes = static_cast<int>(config.dynamicSmemBytes);
  blockDim = block, gridDim = grid;
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.number = i, t.lane = i % kLanes, t.warp = i / kLanes;
    t.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
#if defined(FASTNN_WITH_ASAN)
  __asan_poison_memory_region(shared, sizeof shared);
#endif
  body = &thread;
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = machine.order == Machine::Backward ? count - 1 - i : i;
  const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = machine.order == Machine::Forward ? b : blocks - 1 - b;
    blockIdx = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    if (machine.order == Machine::Shuffled) std::shuffle(order.begin(), order.end(), random_order);
    run_block(order);
  }
  body = nullptr;
  return cudaSuccess;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

unsigned char* dynamic_shared() { return shared; }

void shared_load(void* value, const void* from, int bytes) {
  check_aligned(from, bytes, "a misaligned load of shared memory");
  check_read(*current, from, bytes);
  copy_bytes(value, from, bytes);
}

void shared_store(void* to, const void* value, int bytes) {
  check_aligned(to, bytes, "a misaligned store to shared memory");
  check_write(*current, to, bytes, false);
  copy_bytes(to, value, bytes);
}

void cp_async(void* to, const void* from, int size, int bytes) {
  check_aligned(to, size, "cp.async to a misaligned address of shared memory");
  check_aligned(from, size, "cp.async from a misaligned address of global memory");
  if (bytes < 0 || bytes > size || bytes % 2) fail("cp.async of a wrong number of bytes");
  check_write(*current, to, size, true);
  current->open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), size, bytes});
}

void cp_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void cp_async_wait(int pending) {
  auto& groups = current->groups;
  const int landed = static_cast<int>(groups.size()) - pending;
  for (int i = 0; i < landed; ++i)
    for (const Copy& copy : groups[i]) {
      unsigned char data[16] = {};
      std::memcpy(data, copy.from, copy.bytes);  // a call, so AddressSanitizer watches the source
      const size_t cell = offset_of(copy.to, copy.size) / 2;
      for (int j = 0; j < copy.size / 2; ++j) cells[cell + j].coming = false;
      check_write(*current, copy.to, copy.size, false);
      copy_bytes(copy.to, data, copy.size);
    }
  if (landed > 0) groups.erase(groups.begin(), groups.begin() + landed);
}

// ---- instructions of a warp -----------------------------------------------------------------------------------------

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  struct Operand {
    uint32_t* r;
    const void* row;
  } operand{r, row};
  check_aligned(row, 16, "ldmatrix of a misaligned row");
  with_warp(operand, transposed ? "ldmatrix.trans" : "ldmatrix", 0, [&](Operand** lanes, Thread* threads) {
    uint16_t rows[32][8];
    for (int i = 0; i < kLanes; ++i) {
      check_read(threads[i], lanes[i]->row, 16);
      copy_bytes(rows[i], lanes[i]->row, 16);
    }
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < kLanes; ++i) {
        const int g = i / 4, t = i % 4;
        const uint32_t low = transposed ? rows[8 * matrix + 2 * t][g] : rows[8 * matrix + g][2 * t];
        const uint32_t high = transposed ? rows[8 * matrix + 2 * t + 1][g] : rows[8 * matrix + g][2 * t + 1];
        lanes[i]->r[matrix] = low | high << 16;
      }
  });
}

static float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half) {
  struct Operand {
    float* c;
    const uint32_t *a, *b;
  } operand{c, a, b};
  with_warp(operand, half ? "mma.m16n8k16.f16" : "mma.m16n8k16.bf16", 0, [&](Operand** lanes, Thread*) {
    const auto value = [&](uint32_t pair, int high) {
      const uint16_t bits = static_cast<uint16_t>(high ? pair >> 16 : pair & 0xffff);
      return half ? half_to_float(bits) : from_bits(uint32_t{bits} << 16);
    };
    float A[16][16], B[16][8];
    for (int i = 0; i < kLanes; ++i) {
      const int g = i / 4, t = i % 4;
      for (int j = 0; j < 8; ++j) A[g + j / 2 % 2 * 8][2 * t + j % 2 + j / 4 * 8] = value(lanes[i]->a[j / 2], j % 2);
      for (int j = 0; j < 4; ++j) B[2 * t + j % 2 + j / 2 * 8][g] = value(lanes[i]->b[j / 2], j % 2);
    }
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        double sum = lanes[i]->c[j];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(A[row][k]) * B[k][column];
        lanes[i]->c[j] = static_cast<float>(sum);
      }
  });
}

// As tensor cores were found to add (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021): the terms are cut to
// the last place of the largest, and so is their sum. Chips that keep a bit or two more do better.
static float truncated_sum(const double (&terms)[5]) {
  double largest = 0, plain = 0;
  for (const double term : terms) largest = std::fmax(largest, std::fabs(term)), plain += term;
  if (!(std::fabs(plain) < INFINITY) || largest == 0) return static_cast<float>(plain);
  const int last = std::max(std::ilogb(largest) - 23, -149);
  double sum = 0;
  for (const double term : terms) sum += std::trunc(std::ldexp(term, -last));
  sum = std::ldexp(sum, last);
  const float rounded = static_cast<float>(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0.0f) : rounded;
}

void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operand {
    float* c;
    const uint32_t *a, *b;
  } operand{c, a, b};
  with_warp(operand, "mma.m16n8k8.tf32", 0, [&](Operand** lanes, Thread*) {
    double A[16][8], B[8][8];
    for (int i = 0; i < kLanes; ++i) {
      const int g = i / 4, t = i % 4;
      for (int j = 0; j < 4; ++j) A[g + j % 2 * 8][t + j / 2 * 4] = from_bits(lanes[i]->a[j] & ~0x1fffu);
      for (int j = 0; j < 2; ++j) B[t + j * 4][g] = from_bits(lanes[i]->b[j] & ~0x1fffu);
    }
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        for (int k = 0; k < 8; k += 4) {
          const double terms[5] = {lanes[i]->c[j], A[row][k] * B[k][column], A[row][k + 1] * B[k + 1][column],
                                   A[row][k + 2] * B[k + 2][column], A[row][k + 3] * B[k + 3][column]};
          lanes[i]->c[j] = truncated_sum(terms);
        }
      }
  });
}

void mma_m8n8k4_f64(double (&c)[2], double a, double b) {
  struct Operand {
    double *c, a, b;
  } operand{c, a, b};
  with_warp(operand, "mma.m8n8k4.f64", 0, [&](Operand** lanes, Thread*) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 4; ++k)
          lanes[i]->c[j] = std::fma(lanes[i / 4 * 4 + k]->a, lanes[(i % 4 * 2 + j) * 4 + k]->b, lanes[i]->c[j]);
  });
}

void barrier(const char* file, int line) {
  ++at_barrier;
  wait(State::Barrier, file, line);
}

void warp_barrier(const char* file, int line) {
  int nothing = 0;
  with_warp(nothing, file, line, [](int**, Thread* lanes) {
    if (clocked) {
      Clock all;
      for (int i = 0; i < kLanes; ++i) join(all, clocks[lanes[i].number]);
      for (int i = 0; i < kLanes; ++i) clocks[lanes[i].number] = all;
    }
    warps[current->warp].synced = now++;
  });
}

void shuffle(void* value, int bytes, int source_lane, const char* file, int line) {
  struct Operand {
    void* value;
    int source;
  } operand{value, source_lane};
  with_warp(operand, file, line, [&](Operand** lanes, Thread*) {
    unsigned char copies[kLanes][16];
    for (int i = 0; i < kLanes; ++i) std::memcpy(copies[i], lanes[i]->value, bytes);
    for (int i = 0; i < kLanes; ++i) std::memcpy(lanes[i]->value, copies[lanes[i]->source], bytes);
  });
}

int lane() { return current->lane; }

// ---- conversions ----------------------------------------------------------------------------------------------------

void trap() { fail("a trap"); }

float exp2_approximate(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24));
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-05f)  // subnormal: a whole number of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  std::frexp(size, &exponent);  // size = f 2^exponent, f in [0.5, 1)
  const int whole = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024 .. 2048
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + (whole - 1024));
}

}  // namespace fastnn::cuda::host

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->numRegs = fastnn::cuda::host::machine.no_body ? 4 : 128, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& machine = fastnn::cuda::host::machine;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = machine.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = machine.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = machine.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = machine.shared_bytes; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
