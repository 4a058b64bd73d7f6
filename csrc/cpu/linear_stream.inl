// stream: few rows by a weight whose rows of outputs are contiguous in memory, [K, N] (`x @ W`, GPT-2's Conv1D). W is read
// once, along its rows, as it lies (thin.inl); bias and activation happen in L1, before the one store. Bound by memory.
#pragma once

#include "cpu/linear_store.inl"
#include "cpu/thin.inl"
#include "fastnn/linear.h"

namespace fastnn::cpu::FASTNN_ISA {

// N is a vector at least.
template <class T, class C>
void linear_stream(const LinearForward& p, const RowMajorStore<T, C>& store_to) {
  Scratch<C> dense(p.M * p.K);  // X in the type of the sums
  const T *x = static_cast<const T*>(p.input), *w = static_cast<const T*>(p.weight);
  copy_rows(p.M, p.K, x, p.input_row, p.input_col, dense.data());
  const int threads = worth_threads(p.threads, 2.0 * p.M * p.N * p.K, 1.0 * sizeof(T) * p.N * p.K);
  parallel(threads, [&](int thread, int running) {
    Range n = share(p.N / 64 * 64, 64, thread, running);
    if (thread == running - 1) n.end = p.N;  // so that no range is shorter than a vector
    if (n.begin == n.end) return;
    const int64_t blocks = (p.M + kThinRows - 1) / kThinRows;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t m = p.M * block / blocks, count = p.M * (block + 1) / blocks - m;
      with_thin_rows(count, [&](auto rows) {
        thin_product<decltype(rows)::value, C, T>(p.K, n.begin, n.end, dense + m * p.K, p.K, w, p.weight_col,
                                                  [&](int64_t from, int64_t to, const C* sums, int64_t width) {
                                                    store_to.finish_rows(m, count, from, to - from, sums, width);
                                                  });
      });
    }
  });
}

}  // namespace fastnn::cpu::FASTNN_ISA
