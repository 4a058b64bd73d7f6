// The shim itself: its instructions against plain arithmetic, and that each mistake it is there to catch ends the
// program.
#include <cmath>
#include <cstdio>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/storage.cuh"
#include "shim_case.h"

using namespace fastnn;
using namespace fastnn::cuda;
using namespace fastnn::cuda::shim;

namespace {

float* floats() { return reinterpret_cast<float*>(ptx::dynamic_shared()); }
alignas(16) float source[256];

void mistakes() {
  dies("read before it was written", [] { ptx::shared_load<float>(floats()); });
  dies("read with no barrier after another thread's write", [] {
    ptx::shared_store(floats() + thread(), 1.0f);
    ptx::shared_load<float>(floats() + (thread() ? thread() - 1 : 0));
  });
  dies("read with no barrier after another thread's write", [] {  // a warp's barrier does not order two warps
    ptx::shared_store(floats() + thread(), 1.0f);
    __syncwarp();
    ptx::shared_load<float>(floats() + thread() % 32);
  });
  dies("written with no barrier after another thread's read", [] {
    ptx::shared_store(floats() + thread(), 1.0f);
    __syncthreads();
    ptx::shared_load<float>(floats() + (thread() + 1) % 64);
    ptx::shared_store(floats() + thread(), 2.0f);
  });
  dies("written with no barrier after another thread's write", [] { ptx::shared_store(floats(), 1.0f); });
  dies("before the copy that fills it was waited for", [] {
    ptx::cp_async<4>(floats() + thread(), source + thread(), 4);
    ptx::cp_async_commit();
    __syncthreads();
    ptx::shared_load<float>(floats() + thread());
  });
  dies("before the copy that fills it was waited for", [] {  // one group too few
    for (int i = 0; i < 2; ++i) {
      ptx::cp_async<4>(floats() + 64 * i + thread(), source + thread(), 4);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    ptx::shared_load<float>(floats() + 64 + thread());
  });
  dies("read with no barrier after another thread's write", [] {  // waited for, but only by its own thread
    ptx::cp_async<4>(floats() + thread(), source + thread(), 4);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::shared_load<float>(floats() + (thread() ? thread() - 1 : 0));
  });
  dies("ends before its cp.async", [] { ptx::cp_async<4>(floats() + thread(), source + thread(), 4); });
  dies("cp.async from a misaligned address", [] { ptx::cp_async<16>(floats() + 4 * thread(), source + 1, 16); });
  dies("cp.async to a misaligned address", [] { ptx::cp_async<16>(floats() + 4 * thread() + 1, source, 16); });
  dies("ldmatrix of a misaligned row", [] {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, floats() + 1);
  });
  dies("outside of shared memory", [] { ptx::shared_store(floats() + 1024 + thread(), 1.0f); });
  dies("a barrier that not all threads of the block reach", [] {
    if (thread() < 32) __syncthreads();
  });
  dies("meet at different barriers", [] {
    if (thread() < 32)
      __syncthreads();
    else
      __syncthreads();
  });
  dies("an instruction of a warp that not all its lanes reach", [] {
    if (thread() % 32 != 5) __syncwarp();
  });
  dies("lanes of a warp meet at different instructions", [] {
    if (thread() % 2)
      __syncwarp();
    else
      __shfl_xor_sync(0xffffffffu, 1, 1);
  });
#if defined(__SANITIZE_ADDRESS__)
  dies("use-after-poison", [] { floats()[thread()] = 1.0f; });
#endif
}

void instructions() {
  // Products of matrices of small integers, the fragments filled as the PTX ISA lays them out.
  static double A[16][16], B[16][8], C[16][8];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) A[i][k] = (i * 5 + k * 3) % 7 - 3, B[k][i % 8] = (k * 4 + i % 8) % 5 - 2;
  const auto product = [](int i, int j, int depth) {
    double sum = 1;
    for (int k = 0; k < depth; ++k) sum += A[i][k] * B[k][j];
    return sum;
  };
  const auto right = [&](int rows, int depth, const char* what) {
    bool equal = true;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < 8; ++j) equal &= C[i][j] == product(i, j, depth);
    expect(equal, what);
  };
  run(
      [] {
        const int g = thread() / 4, t = thread() % 4;
        uint32_t a[4], b[2];
        float c[4] = {1, 1, 1, 1};
        for (int i = 0; i < 4; ++i) a[i] = bitcast<uint32_t>(float(A[g + i % 2 * 8][t + i / 2 * 4]));
        for (int i = 0; i < 2; ++i) b[i] = bitcast<uint32_t>(float(B[t + 4 * i][g]));
        ptx::mma_m16n8k8_tf32(c, a, b);
        for (int i = 0; i < 4; ++i) C[g + i / 2 * 8][2 * t + i % 2] = c[i];
      },
      32);
  right(16, 8, "mma m16n8k8 tf32");
  run(
      [] {
        const int g = thread() / 4, t = thread() % 4;
        double c[2] = {1, 1};
        ptx::mma_m8n8k4_f64(c, A[g][t], B[t][g]);
        for (int i = 0; i < 2; ++i) C[g][2 * t + i] = c[i];
      },
      32);
  right(8, 4, "mma m8n8k4 f64");
  for (const bool half : {true, false}) {
    const auto bits = [half](double x) -> uint32_t {
      return half ? host::float_to_half(static_cast<float>(x)) : bitcast<uint32_t>(static_cast<float>(x)) >> 16;
    };
    run(
        [&] {
          const int g = thread() / 4, t = thread() % 4;
          uint32_t a[4], b[2];
          float c[4] = {1, 1, 1, 1};
          for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8, col = 2 * t + i / 2 * 8;
            a[i] = bits(A[row][col]) | bits(A[row][col + 1]) << 16;
          }
          for (int i = 0; i < 2; ++i) b[i] = bits(B[2 * t + 8 * i][g]) | bits(B[2 * t + 8 * i + 1][g]) << 16;
          half ? ptx::mma_m16n8k16(c, a, b, Float16{}) : ptx::mma_m16n8k16(c, a, b, BFloat16{});
          for (int i = 0; i < 4; ++i) C[g + i / 2 * 8][2 * t + i % 2] = c[i];
        },
        32);
    right(16, 16, half ? "mma m16n8k16 f16" : "mma m16n8k16 bf16");
  }
  static uint32_t loaded[2][32][4];
  run(
      [] {  // matrix i, row r, column c holds 64 i + 8 r + c
        auto* const elements = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
        for (int c = 0; c < 8; ++c)
          ptx::shared_store(elements + 8 * thread() + c, static_cast<uint16_t>(8 * thread() + c));
        __syncwarp();
        ptx::ldmatrix_x4(loaded[0][thread()], elements + 8 * thread());
        ptx::ldmatrix_x4_trans(loaded[1][thread()], elements + 8 * thread());
      },
      32);
  bool plain = true, transposed = true;
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned g = lane / 4, t = lane % 4, first = 64 * i + 8 * g + 2 * t, top = 64 * i + 16 * t + g;
      plain &= loaded[0][lane][i] == (first | (first + 1) << 16);
      transposed &= loaded[1][lane][i] == (top | (top + 8) << 16);
    }
  expect(plain, "ldmatrix"), expect(transposed, "ldmatrix.trans");
  static float copied[64];
  for (int i = 0; i < 256; ++i) source[i] = static_cast<float>(i + 1);
  run([] {
    ptx::cp_async<8>(floats() + 2 * thread(), source + 2 * thread(), thread() % 2 ? 8 : 4);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    copied[thread()] = ptx::shared_load<float>(floats() + 2 * thread() + 1);
  });
  bool filled = true;
  for (int i = 0; i < 64; ++i) filled &= copied[i] == (i % 2 ? 2 * i + 2 : 0);
  expect(filled, "cp.async fills with zeros");
}

void conversions() {
  bool same = true;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = host::half_to_float(static_cast<uint16_t>(bits));
    if (value == value) same &= host::float_to_half(value) == bits;
    const float wide = bitcast<float>(bits << 16);
    if (wide == wide) same &= ptx::float_to_bfloat(wide) == bits;
  }
  expect(same, "16-bit types survive float and back");
  expect(host::float_to_half(2049.0f) == host::float_to_half(2048.0f), "ties go to even");
  expect(host::float_to_half(2051.0f) == host::float_to_half(2052.0f), "ties go to even");
  expect(host::float_to_half(65519.0f) == 0x7bff && host::float_to_half(65520.0f) == 0x7c00, "half's largest");
  expect(ptx::pack_pair(1.0f, 2.0f, Float16{}) == 0x40003c00 && ptx::pack_pair(1.0f, 2.0f, BFloat16{}) == 0x40003f80,
         "the first of a pair lies low");
  expect(ptx::exp2_approximate(-3.0f) == 0.125f && ptx::exp2_approximate(-INFINITY) == 0.0f &&
             ptx::exp2_approximate(-127.0f) == 0.0f,
         "powers of two, subnormal ones flushed");
  static int seen;
  seen = 0;
  run([] { seen += __any_sync(0xffffffffu, thread() == 37); });
  expect(seen == 32, "a vote is a warp's");
}

}  // namespace

int main() {
  conversions();
  instructions();
  mistakes();
  std::printf("shim: %d failed\n", failures);
  return failures != 0;
}
