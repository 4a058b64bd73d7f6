// Tiles of 16-bit elements in shared memory, in chunks of 16 bytes: where a chunk lies, and how a tile gets there from
// a matrix of any size, alignment and row stride.
//
// A row of a tile is CHUNKS chunks. ldmatrix reads the same chunk of 8 rows that follow each other, cp.async writes
// whole rows; to do both without two lanes meeting in a bank, chunk c of row r lies at place c ^ (r mod 8) of its row,
// or, where a row is shorter than the 128 bytes of all banks, at c ^ (r / rows in 128 bytes).
#pragma once

#include "cuda/ptx.cuh"

namespace fastnn::cuda {

template <int CHUNKS>
FASTNN_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
  static_assert(CHUNKS == 2 || CHUNKS == 4 || CHUNKS % 8 == 0);
  constexpr int rows_in_128_bytes = CHUNKS >= 8 ? 1 : 8 / CHUNKS, mask = CHUNKS >= 8 ? 7 : CHUNKS - 1;
  return row * CHUNKS + (chunk ^ (row / rows_in_128_bytes & mask));
}

// Tiles of 32-bit elements with K as the slow dimension, which ldmatrix cannot turn: lane (g, t) of a fragment reads
// element g of row k + t, so four rows that follow each other are two chunks apart. Copies write whole rows as before.
template <int CHUNKS>
FASTNN_HOST_DEVICE constexpr int swizzled_words(int row, int chunk) {
  static_assert(CHUNKS % 8 == 0);
  return row * CHUNKS + (chunk ^ (row & 3) * 2);
}

// A matrix of 16-bit elements whose rows lie dense, ld elements apart; 0 where there is one row. A float counts as two
// elements: ld, cols and columns are even then, and width is at least 4.
struct RowMatrix {
  const uint16_t* data;
  int64_t ld, rows, cols;
  int width;  // bytes of the widest copy that every chunk's address allows: 16, 8, 4 or 2
};

FASTNN_HOST_DEVICE constexpr int copy_width(uint64_t address, int64_t ld) {
  const uint64_t bits = address | 2 * static_cast<uint64_t>(ld);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

template <int SIZE>
FASTNN_DEVICE void copy_chunk(unsigned char* to, const uint16_t* from, const uint16_t* anywhere, int count) {
#pragma unroll
  for (int i = 0; i < 16 / SIZE; ++i) {
    const int left = count - i * (SIZE / 2), valid = left < 0 ? 0 : left > SIZE / 2 ? SIZE / 2 : left;
    ptx::cp_async<SIZE>(to + i * SIZE, valid ? from + i * (SIZE / 2) : anywhere, 2 * valid);
  }
}

// Elements that lie on odd addresses: stored at once.
FASTNN_DEVICE void copy_chunk_by_elements(unsigned char* to, const uint16_t* from, int count) {
  Vector<uint32_t, 4> words;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = 2 * j < count ? from[2 * j] : 0, high = 2 * j + 1 < count ? from[2 * j + 1] : 0;
    words.data[j] = low | high << 16;
  }
  ptx::shared_store(to, words);
}

// Rows row .. row + ROWS, columns col .. col + 8 CHUNKS; zeros outside of the matrix. By THREADS threads; the caller
// commits and waits. A thread has the same chunk of rows that lie kStep apart, so one address serves them all. PLACE is
// one of the swizzles above; LEAST is the narrowest width that comes.
template <int ROWS, int CHUNKS, int THREADS, int (*PLACE)(int, int) = swizzled<CHUNKS>, int LEAST = 2>
FASTNN_DEVICE void copy_tile(unsigned char* tile, const RowMatrix& matrix, int64_t row, int64_t col,
                             int thread = static_cast<int>(threadIdx.x)) {
  constexpr int kStep = THREADS / CHUNKS, kEach = ROWS / kStep;
  static_assert(THREADS % CHUNKS == 0 && ROWS % kStep == 0 && kStep % 8 == 0, "the swizzle repeats after eight rows");
  const int r = thread / CHUNKS, c = thread % CHUNKS;
  const int rows_left = static_cast<int>(matrix.rows - row < ROWS ? matrix.rows - row : ROWS) - r;
  const int cols_left = static_cast<int>(matrix.cols - col < 8 * CHUNKS ? matrix.cols - col : 8 * CHUNKS) - 8 * c;
  const int count = cols_left < 0 ? 0 : cols_left > 8 ? 8 : cols_left;
  const uint16_t* const from = matrix.data + (row + r) * matrix.ld + col + 8 * c;
  unsigned char* const to = tile + 16 * PLACE(r, c);
  if (matrix.width == 16) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)  // of no bytes, it reads nothing: the address may lie outside
      ptx::cp_async<16>(to + i * 16 * kStep * CHUNKS, from + i * kStep * matrix.ld,
                        i * kStep < rows_left ? 2 * count : 0);
  } else {
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) {
      const int valid = i * kStep < rows_left ? count : 0;
      const uint16_t* const source = valid ? from + i * kStep * matrix.ld : matrix.data;
      unsigned char* const place = to + i * 16 * kStep * CHUNKS;
      if (matrix.width == 8)
        copy_chunk<8>(place, source, matrix.data, valid);
      else if (LEAST == 4 || matrix.width == 4)
        copy_chunk<4>(place, source, matrix.data, valid);
      else
        copy_chunk_by_elements(place, source, valid);
    }
  }
}

// Blocks in groups of eight rows (or as many as the caller wants) of tiles, so that those that run together share what
// they read in L2.
struct TilePlace {
  int64_t m, n;
};
FASTNN_HOST_DEVICE constexpr TilePlace tile_place(int64_t index, int64_t tiles_m, int64_t tiles_n,
                                                  int64_t group_rows = 8) {
  const int64_t group = index / (group_rows * tiles_n), within = index % (group_rows * tiles_n);
  const int64_t first = group * group_rows, rows = tiles_m - first < group_rows ? tiles_m - first : group_rows;
  return {first + within % rows, within / rows};
}

}  // namespace fastnn::cuda
