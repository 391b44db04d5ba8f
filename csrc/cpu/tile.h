// Products of small matrices that stay in cache: packing, and the register-blocked micro-kernel.
//
// A tile is a row-major matrix whose columns are vector lanes. Products accumulate C (M x N) += A (M x K) B (K x N);
// A is read element by element, so it may lie in any order: "panels" of kRows rows, [M / kRows][K][kRows], are fastest.
#pragma once

#include <cstddef>
#include <new>

#ifdef FASTSAM_OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace fastsam {
namespace FASTSAM_ISA {

// Registers hold kRows x kColumns accumulators: 12 of 16 on AVX2 and SSE, 24 of 32 on AVX-512.
#if defined(__AVX512F__)
constexpr int kRows = 8, kColumns = 3, kTile = 96;
#else
constexpr int kRows = 6, kColumns = 2, kTile = 48;
#endif

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

// Rows and lanes that a product may write beyond M and N.
constexpr int64_t padded_rows(int64_t rows) { return round_up(rows, kRows); }
template <class T>
constexpr int64_t padded_lanes(int64_t lanes) {
  return round_up(lanes, kLanes<T>);
}

enum class Start { kZero, kAdd };

// Kept out of line: inlined into a large function the compiler spills accumulators, which halves the speed.
template <class T, int Columns, Start start>
FASTSAM_NOINLINE void micro_kernel(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
                                   int64_t b_stride, T* c, int64_t c_stride) {
  Vec<T> sum[kRows][Columns];
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < Columns; ++column) {
      sum[row][column] = start == Start::kAdd ? load(c + row * c_stride + column * kLanes<T>) : broadcast<T>(T(0));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[Columns];
    for (int column = 0; column < Columns; ++column) right[column] = load(b + k * b_stride + column * kLanes<T>);
    for (int row = 0; row < kRows; ++row) {
      const Vec<T> left = broadcast<T>(a[row * a_row + k * a_depth]);
      for (int column = 0; column < Columns; ++column) sum[row][column] += left * right[column];
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < Columns; ++column) store(c + row * c_stride + column * kLanes<T>, sum[row][column]);
  }
}

// A in memory: element (row, k) at data[row / kRows * panel + row % kRows * row_stride + k * depth_stride].
template <class T>
struct Left {
  const T* data;
  int64_t panel, row_stride, depth_stride;
};

template <class T>
inline Left<T> panels(const T* data, int64_t depth) {
  return {data, kRows * depth, 1, kRows};
}

// Rows of a row-major matrix; up to kRows - 1 rows beyond the last are read and their products discarded.
template <class T>
inline Left<T> rows_of(const T* data, int64_t stride) {
  return {data, kRows * stride, stride, 1};
}

// The rows of the product are the columns of a row-major matrix, of stride `stride`.
template <class T>
inline Left<T> columns_of(const T* data, int64_t stride) {
  return {data, kRows, 1, stride};
}

// C (rows x lanes) = or += A (rows x depth) B (depth x lanes). Writes padded_rows(rows) x padded_lanes(lanes).
template <class T, Start start>
inline void multiply(int64_t rows, int64_t lanes, int64_t depth, Left<T> a, const T* b, int64_t b_stride, T* c,
                     int64_t c_stride) {
  constexpr int64_t step = kColumns * kLanes<T>;
  for (int64_t row = 0; row < rows; row += kRows) {
    const T* left = a.data + row / kRows * a.panel;
    T* out = c + row * c_stride;
    int64_t lane = 0;
    for (; lane + step <= round_up(lanes, kLanes<T>); lane += step) {
      micro_kernel<T, kColumns, start>(depth, left, a.row_stride, a.depth_stride, b + lane, b_stride, out + lane,
                                       c_stride);
    }
    for (; lane < lanes; lane += kLanes<T>) {
      micro_kernel<T, 1, start>(depth, left, a.row_stride, a.depth_stride, b + lane, b_stride, out + lane, c_stride);
    }
  }
}

// Panels of a rows x depth matrix whose element (row, k) is source[row * row_stride + k * depth_stride], zero-padded.
template <class T>
inline void pack_panels(int64_t rows, int64_t depth, const T* source, int64_t row_stride, int64_t depth_stride,
                        T* out) {
  for (int64_t first = 0; first < rows; first += kRows) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t row = first; row < first + kRows; ++row) {
        *out++ = row < rows ? source[row * row_stride + k * depth_stride] : T(0);
      }
    }
  }
}

// Copies rows x width into a tile of `stride` lanes, zero-padded to the stride.
template <class T>
inline void copy_tile(int64_t rows, int64_t width, const T* source, int64_t source_stride, T* out, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(out + row * stride, source + row * source_stride, width * sizeof(T));
    for (int64_t lane = width; lane < stride; ++lane) out[row * stride + lane] = T(0);
  }
}

// out (width x rows, row stride out_stride) = transpose of source (rows x width), zero-padded to out_stride.
template <class T>
inline void transpose_tile(int64_t rows, int64_t width, const T* source, int64_t source_stride, T* out,
                           int64_t out_stride) {
  for (int64_t column = 0; column < width; ++column) {
    T* line = out + column * out_stride;
    for (int64_t row = 0; row < rows; ++row) line[row] = source[row * source_stride + column];
    for (int64_t row = rows; row < out_stride; ++row) line[row] = T(0);
  }
}

// out (rows x columns) = sum of `count` matrices of row stride `stride`, in their order.
template <class T>
inline void reduce(int64_t count, int64_t rows, int64_t columns, const T* parts, int64_t size, int64_t stride, T* out) {
  std::memset(out, 0, rows * columns * sizeof(T));
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = parts + part * size + row * stride;
      for (int64_t column = 0; column < columns; ++column) out[row * columns + column] += from[column];
    }
  }
}

// One aligned block of memory cut into arrays. A layout is written as a constructor that takes arrays from an Arena and
// runs twice: once on an empty Arena to learn the size, once on the real one.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t offset = size_;
    // A line more than asked for: products read a few rows beyond the last, and neighbours keep apart.
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment) + kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }

  int64_t size() const { return size_; }

  static constexpr int64_t kAlignment = 64;

 private:
  char* base_;
  int64_t size_ = 0;
};

class Block {
 public:
  explicit Block(int64_t size) : data_(static_cast<char*>(::operator new(size, std::align_val_t(Arena::kAlignment)))) {}
  ~Block() { ::operator delete(data_, std::align_val_t(Arena::kAlignment)); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

// Threads that a call of so many multiply-adds can keep busy: waking one costs about what a hundred thousand take.
inline int useful_threads(int threads, int64_t multiply_adds) {
  return static_cast<int>(smaller(threads, 1 + multiply_adds / 200000));
}

#ifdef FASTSAM_OPENMP
inline int thread_index() { return omp_get_thread_num(); }
#else
inline int thread_index() { return 0; }
#endif

}  // namespace FASTSAM_ISA
}  // namespace fastsam
