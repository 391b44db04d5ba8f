// Products of small matrices that stay in cache: the register-blocked micro-kernel, and what brings matrices into
// place.
//
// A tile is a row-major matrix whose columns are vector lanes. Products accumulate C (M x N) += A (M x K) B (K x N);
// B and C are tiles, A is read element by element, so it may lie in memory in any order.
#pragma once

#include <cstddef>
#include <new>

#ifdef FASTSAM_OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace fastsam {
namespace FASTSAM_ISA {

// Registers hold kRows x kColumns accumulators beside a row of B: 12 of 16 on AVX2 and SSE, 24 of 32 on AVX-512.
#if defined(__AVX512F__)
constexpr int kRows = 8, kColumns = 3, kTile = 96;
#else
constexpr int kRows = 4, kColumns = 3, kTile = 48;
#endif

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

// Lanes that a product writes: N rounded up to whole vectors.
template <class T>
constexpr int64_t padded_lanes(int64_t lanes) {
  return round_up(lanes, kLanes<T>);
}

enum class Start { kZero, kAdd };

// A in memory: element (row, k) at data[row * row_stride + k * depth_stride].
template <class T>
struct Left {
  const T* data;
  int64_t row_stride, depth_stride;
};

// A is a row-major matrix.
template <class T>
inline Left<T> rows_of(const T* data, int64_t stride) {
  return {data, stride, 1};
}

// A is the transpose of a row-major matrix.
template <class T>
inline Left<T> columns_of(const T* data, int64_t stride) {
  return {data, 1, stride};
}

// C (panels * Rows x Columns vectors) = or += A B. Out of line, because inlined into a large function the compiler
// spills accumulators; over many panels, because a call costs as much as a few steps of k.
template <class T, int Rows, int Columns, Start start>
FASTSAM_NOINLINE void micro_kernel(int64_t panels, int64_t depth, Left<T> a, const T* b, int64_t b_stride, T* c,
                                   int64_t c_stride) {
  const int64_t row_stride = a.row_stride, depth_stride = a.depth_stride;
  for (int64_t panel = 0; panel < panels; ++panel, c += Rows * c_stride) {
    Vec<T> sum[Rows][Columns];
    for (int row = 0; row < Rows; ++row) {
      for (int column = 0; column < Columns; ++column)
        sum[row][column] = start == Start::kAdd ? load(c + row * c_stride + column * kLanes<T>) : broadcast<T>(T(0));
    }
    const T *left = a.data + panel * Rows * row_stride, *right = b;
    for (int64_t k = 0; k < depth; ++k, left += depth_stride, right += b_stride) {
      Vec<T> line[Columns];
      for (int column = 0; column < Columns; ++column) line[column] = load(right + column * kLanes<T>);
      for (int row = 0; row < Rows; ++row) {
        const Vec<T> factor = broadcast<T>(left[row * row_stride]);
        for (int column = 0; column < Columns; ++column) sum[row][column] += factor * line[column];
      }
    }
    for (int row = 0; row < Rows; ++row) {
      for (int column = 0; column < Columns; ++column) store(c + row * c_stride + column * kLanes<T>, sum[row][column]);
    }
  }
}

template <class T, int Columns, Start start>
inline void multiply_columns(int64_t rows, int64_t depth, Left<T> a, const T* b, int64_t b_stride, T* c,
                             int64_t c_stride) {
  const int64_t panels = rows / kRows, done = panels * kRows;
  micro_kernel<T, kRows, Columns, start>(panels, depth, a, b, b_stride, c, c_stride);
  if (done == rows) return;
  a.data += done * a.row_stride;
  micro_kernel<T, 1, Columns, start>(rows - done, depth, a, b, b_stride, c + done * c_stride, c_stride);
}

// C (rows x lanes) = or += A (rows x depth) B (depth x lanes). Reads and writes padded_lanes(lanes) lanes of B and C.
template <class T, Start start>
inline void multiply(int64_t rows, int64_t lanes, int64_t depth, Left<T> a, const T* b, int64_t b_stride, T* c,
                     int64_t c_stride) {
  static_assert(kColumns == 3, "four vectors are left to two products of two");
  int64_t vectors = padded_lanes<T>(lanes) / kLanes<T>;
  const auto advance = [&](int columns) {
    b += columns * kLanes<T>;
    c += columns * kLanes<T>;
    vectors -= columns;
  };
  for (; vectors == 3 || vectors > 4; advance(3))
    multiply_columns<T, 3, start>(rows, depth, a, b, b_stride, c, c_stride);
  for (; vectors >= 2; advance(2)) multiply_columns<T, 2, start>(rows, depth, a, b, b_stride, c, c_stride);
  if (vectors == 1) multiply_columns<T, 1, start>(rows, depth, a, b, b_stride, c, c_stride);
}

// Copies rows x width, of any storage type, into a tile of `stride` lanes, zero-padded to the stride.
template <class S, class T>
inline void copy_tile(int64_t rows, int64_t width, const S* source, int64_t source_stride, T* out, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    copy_lanes(source + row * source_stride, width, out + row * stride);
    for (int64_t lane = width; lane < stride; ++lane) out[row * stride + lane] = T(0);
  }
}

// Copies rows x width of a tile to memory of any storage type.
template <class T, class S>
inline void store_tile(int64_t rows, int64_t width, const T* tile, int64_t stride, S* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; ++row) copy_lanes(tile + row * stride, width, out + row * out_stride);
}

// out (width x rows, row stride out_stride) = transpose of source (rows x width), zero-padded to out_stride.
template <class T>
inline void transpose_tile(int64_t rows, int64_t width, const T* source, int64_t source_stride, T* out,
                           int64_t out_stride) {
  constexpr int64_t size = kLanes<T>;
  const int64_t whole_rows = rows / size * size, whole_columns = width / size * size;
  for (int64_t row = 0; row < whole_rows; row += size) {
    for (int64_t column = 0; column < whole_columns; column += size)
      transpose_block(source + row * source_stride + column, source_stride, out + column * out_stride + row,
                      out_stride);
  }
  for (int64_t column = 0; column < width; ++column) {
    T* line = out + column * out_stride;
    for (int64_t row = column < whole_columns ? whole_rows : 0; row < rows; ++row)
      line[row] = source[row * source_stride + column];
    for (int64_t row = rows; row < out_stride; ++row) line[row] = T(0);
  }
}

// Sums `count` arrays of `size` that lie one after the other into the first, in their order. All threads of a parallel
// region call it and share the work; it does not wait for them.
template <class T>
inline void reduce(int64_t count, int64_t size, T* parts) {
  constexpr int64_t chunk = 1024;
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < size; first += chunk) {
    for (int64_t part = 1; part < count; ++part) {
      const T* from = parts + part * size;
      for (int64_t at = first; at < smaller(first + chunk, size); ++at) parts[at] += from[at];
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
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment) + kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }

  int64_t size() const { return size_; }

  static constexpr int64_t kAlignment = 64;
  static_assert(kAlignment >= kVectorBytes, "a line is at least a vector");

 private:
  char* base_;
  int64_t size_ = 0;
};

// The memory of one call. The calling thread keeps up to kKept bytes for its next call: pages fresh from the system
// cost a small call a third of its time.
class Workspace {
 public:
  explicit Workspace(int64_t size) {
    Kept& mine = kept();
    if (size > mine.size) {
      mine.release();
      mine.data = static_cast<char*>(::operator new(size, std::align_val_t(Arena::kAlignment)));
      mine.size = size;
    }
    data_ = mine.data;
  }
  ~Workspace() {
    if (kept().size > kKept) kept().release();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }

 private:
  static constexpr int64_t kKept = int64_t{32} << 20;

  struct Kept {
    ~Kept() { release(); }
    void release() {
      ::operator delete(data, std::align_val_t(Arena::kAlignment));
      data = nullptr;
      size = 0;
    }
    char* data = nullptr;
    int64_t size = 0;
  };

  static Kept& kept() {
    static thread_local Kept mine;
    return mine;
  }

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
