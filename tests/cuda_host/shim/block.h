// The block that runs, as execute.cpp and sm90.cpp share it: its fibers, and the watch over shared memory.
//
// What happened before what is kept in times: a counter that moves on at every synchronisation. Thread t knows what
// thread u did until clock(t, u). __syncthreads makes all known to all, __syncwarp to the warp; mbarriers and named
// barriers hand clocks on. What TMA writes is done by a thread of its own for each mbarrier, known to those that
// waited.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastnn::cuda::host {

constexpr int kLanes = 32, kShared = 232448, kMbarriers = 64;

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  const void* stack = nullptr;  // its lowest address; AddressSanitizer wants to know
  size_t size = 0;
  void* shadow = nullptr;
};

enum class State { Ready, Barrier, Warp, Warpgroup, Named, Mbarrier, Done };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int size, bytes;
};

struct Thread {
  Context context;
  int number, lane, warp;
  dim3 index;
  State state = State::Done;
  const char* file = "";  // where it waits
  int line = 0;
  void* operand = nullptr;                // of the warp's instruction
  std::vector<std::vector<Copy>> groups;  // cp.async committed and not waited for
  std::vector<Copy> open;                 // not committed
};

struct Warp {
  int waiting = 0;
  uint32_t synced = 0;  // when
};

// Who touched two bytes of shared memory last, and when.
struct Cell {
  int16_t writer = -1, reader = -1;  // reader -2: several
  bool coming = false;               // a cp.async or a TMA copy is on its way
  bool stored = false;               // by an ordinary store
  bool barrier = false;              // of an mbarrier
  uint32_t write_time = 0, read_time = 0;
  uint32_t reading_warps = 0;  // since the last write; their times in read_times
};

extern std::vector<Thread>& threads;
extern std::vector<Warp> warps;
extern std::vector<Cell> cells;
extern unsigned char shared[kShared];
extern int shared_bytes, threads_in_block;
extern uint32_t now, block_synced;
extern Thread* current;
extern bool clocked;  // an mbarrier or a named barrier was used in this block

[[noreturn]] void fail(const char* what);
void wait(State state, const char* file, int line);

// ---- clocks ---------------------------------------------------------------------------------------------------------

using Clock = std::vector<uint32_t>;  // of each thread, then of each mbarrier's writer
Clock& clock_of(int thread);
void start_clocks();                            // of the block, at its first use
void join(Clock& clock, const Clock& other);    // later of the two
void release(const Thread& thread, Clock& to);  // what the thread did and knows
void acquire(const Thread& thread, const Clock& from);
bool known(const Thread& thread, int other, uint32_t time);

// ---- shared memory --------------------------------------------------------------------------------------------------

size_t offset_of(const void* pointer, int bytes);
void check_read(const Thread& thread, const void* from, int bytes);
void check_write(const Thread& thread, const void* to, int bytes, bool coming);
void check_aligned(const void* pointer, int bytes, const char* what);
void copy_bytes(void* to, const void* from, int bytes);

// Lays the operand down and waits for all threads of the warp, or of the warpgroup; the last to come runs f on them.
template <class Operand, class F>
void with_threads(int count, int& waiting, State state, Operand& operand, const char* file, int line, const F& f) {
  current->operand = &operand;
  current->file = file, current->line = line;
  if (++waiting < count) return wait(state, file, line);
  Thread* const group = &threads[current->number / count * count];
  static Operand* operands[128];
  for (int i = 0; i < count; ++i) {
    if (group[i].file != file && __builtin_strcmp(group[i].file, file))
      fail("lanes of a warp meet at different instructions");
    if (group[i].line != line) fail("lanes of a warp meet at different instructions");
    operands[i] = static_cast<Operand*>(group[i].operand);
  }
  waiting = 0;
  f(operands, group);
  for (int i = 0; i < count; ++i)
    if (&group[i] != current) group[i].state = State::Ready;
}
template <class Operand, class F>
void with_warp(Operand& operand, const char* file, int line, const F& f) {
  with_threads(kLanes, warps[current->warp].waiting, State::Warp, operand, file, line, f);
}

// ---- what sm90.cpp adds ---------------------------------------------------------------------------------------------

void start_block_sm90();
void end_block_sm90();
bool wake(Thread& thread);  // one that waits at an mbarrier: whether it may go on
void check_written_async(const Thread& thread, size_t offset, int bytes);  // that no wgmma or TMA store reads it
void end_thread_sm90(Thread& thread);
void describe_sm90(const Thread& thread, char* text, size_t size);  // what it waits for

}  // namespace fastnn::cuda::host
