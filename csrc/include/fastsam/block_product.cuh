// Products of small matrices by a block of 128 threads: D += A B with A (32 Parts, 16) and B (16, Columns) in shared
// memory and D in registers. The kernels are the same for every way to multiply; a way is one of the structs below:
//
//   Operand             what shared memory holds; operand() makes it from a value
//   Accumulator         float or double
//   index_a, index_b    where elements of A and B lie
//   row, column         the place in a part of D of pair `pair` of this thread, 0 <= pair < kPairs
//   kRoundsCopies       whether values of the type Operand become operands only by operand()
//   multiply            D += A B; sum[part][pair] is row 32 part + row(pair)
//   WithColumns         the same way with another number of columns
//   serves<S>           whether devices of a compute capability, times ten, multiply so for maps of S
#pragma once

#include <type_traits>

#include "fastsam/ptx.cuh"

namespace fastsam::cuda {

constexpr int kProductThreads = 128, kPartRows = 32, kProductDepth = 16;

// Rows of B start 8 words apart modulo the 32 banks, those of A 4: then fragments load without conflicts.
template <int Columns>
struct ProductShape {
  static constexpr int kColumns = Columns, kPairs = kPartRows * Columns / kProductThreads, kPitchB = Columns + 8;
  static constexpr int kSizeB = kProductDepth * kPitchB;
  static __host__ __device__ constexpr int index_b(int k, int column) { return k * kPitchB + column; }
};

// Ordinary multiply-adds in T. A thread has 4 rows and kPairs / 4 columns.
template <class T, int Columns>
struct FmaProduct : ProductShape<Columns> {
  using Operand = T;
  using Accumulator = T;
  using Shape = ProductShape<Columns>;
  static constexpr bool kRoundsCopies = false;
  template <int Other>
  using WithColumns = FmaProduct<T, Other>;
  static constexpr int kThreadColumns = Shape::kPairs / 4, kThreadsAcross = Columns / kThreadColumns;

  template <int Parts>
  static constexpr int kSizeA = kProductDepth * (kPartRows * Parts + 4);
  template <int Parts>
  static __host__ __device__ constexpr int index_a(int row, int k) {
    return k * (kPartRows * Parts + 4) + row;
  }
  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return sizeof(S) > 2 || capability < (std::is_same_v<S, __half> ? 75 : 80);
  }
  static __device__ __forceinline__ T operand(T value) { return value; }
  static __device__ __forceinline__ int row(int pair) {
    return static_cast<int>(threadIdx.x) / kThreadsAcross * 4 + pair / kThreadColumns;
  }
  static __device__ __forceinline__ int column(int pair) {
    return static_cast<int>(threadIdx.x) % kThreadsAcross * kThreadColumns + pair % kThreadColumns;
  }

  // `Count` neighbours, 16 bytes at a time where there are as many.
  template <int Count>
  static __device__ __forceinline__ void load_row(Shared<T> from, T* to) {
    constexpr int kWidth = Count * sizeof(T) < 16 ? Count : 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < Count; i += kWidth) {
      const Vec<T, kWidth> values = load<Vec<T, kWidth>>(from + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) to[i + j] = values[j];
    }
  }

  template <int Parts>
  static __device__ __forceinline__ void multiply(Shared<T> a, Shared<T> b, T (&sum)[Parts][Shape::kPairs]) {
    const Shared<T> my_a = a + row(0), my_b = b + column(0);
#pragma unroll 4
    for (int k = 0; k < kProductDepth; ++k) {
      T left[Parts][4], right[kThreadColumns];
#pragma unroll
      for (int part = 0; part < Parts; ++part) load_row<4>(my_a + index_a<Parts>(part * kPartRows, k), left[part]);
      load_row<kThreadColumns>(my_b + Shape::index_b(k, 0), right);
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
#pragma unroll
        for (int pair = 0; pair < Shape::kPairs; ++pair)
          sum[part][pair] += left[part][pair / kThreadColumns] * right[pair % kThreadColumns];
      }
    }
  }
};

// Tensor cores: a warp has 16 rows of each part and half of the columns.
template <int Columns>
struct MmaShape : ProductShape<Columns> {
  using Accumulator = float;
  static constexpr int kTiles = Columns / 16;  // of 8 columns

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 2 * 16; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 64 * (Columns / 2); }
  static __device__ __forceinline__ int row(int pair) { return first_row() + MmaAccumulator::row_c(lane(), pair % 4); }
  static __device__ __forceinline__ int column(int pair) {
    return first_column() + pair / 4 * 8 + MmaAccumulator::col_c(lane(), pair % 4);
  }

  // sum += a b for one part, tile by tile.
  template <class M, int Pairs>
  static __device__ __forceinline__ void multiply_tiles(float (&sum)[Pairs], const uint32_t (&a)[M::kRegistersA],
                                                        const uint32_t (&b)[kTiles][M::kRegistersB]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float (&c)[4] = reinterpret_cast<float (&)[4]>(sum[tile * 4]);
      M::multiply(c, a, b[tile]);
    }
  }
};

// Float32 operands rounded to tf32, 8.0 and up.
template <int Columns>
struct Tf32Product : MmaShape<Columns> {
  using Operand = float;
  using Shape = MmaShape<Columns>;
  using M = Mma<tf32, 8>;
  static constexpr bool kRoundsCopies = true;
  template <int Other>
  using WithColumns = Tf32Product<Other>;
  static constexpr int kPitchA = kProductDepth + 4;

  template <int Parts>
  static constexpr int kSizeA = kPartRows * Parts * kPitchA;
  template <int Parts>
  static __host__ __device__ constexpr int index_a(int row, int k) {
    return row * kPitchA + k;
  }
  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return capability >= 80;
  }
  static __device__ __forceinline__ float operand(float value) { return __uint_as_float(round_to_tf32(value)); }

  template <int Parts>
  static __device__ __forceinline__ void multiply(Shared<float> a, Shared<float> b,
                                                  float (&sum)[Parts][Shape::kPairs]) {
    __syncwarp();  // loads before this may have parted the lanes, and the instructions below are the whole warp's
    const int lane = Shape::lane();
#pragma unroll
    for (int k = 0; k < kProductDepth; k += M::kK) {
      uint32_t right[Shape::kTiles][M::kRegistersB];
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < M::kElementsB; ++i) {
          const int column = Shape::first_column() + tile * 8 + M::col_b(lane, i);
          right[tile][i] = __float_as_uint(b[Shape::index_b(k + M::row_b(lane, i), column)]);
        }
      }
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
        uint32_t left[M::kRegistersA];
#pragma unroll
        for (int i = 0; i < M::kElementsA; ++i) {
          const int row = part * kPartRows + Shape::first_row() + M::row_a(lane, i);
          left[i] = __float_as_uint(a[index_a<Parts>(row, k + M::col_a(lane, i))]);
        }
        Shape::template multiply_tiles<M>(sum[part], left, right);
      }
    }
  }
};

// 16-bit operands: T is __half (K = 8 for 7.5, K = 16 for 8.0 and up) or __nv_bfloat16 (K = 16, 8.0 and up).
template <class T, int K, int Columns>
struct HalfProduct : MmaShape<Columns> {
  using Operand = T;
  using Shape = MmaShape<Columns>;
  using M = Mma<T, K>;
  static constexpr bool kRoundsCopies = false;
  template <int Other>
  using WithColumns = HalfProduct<T, K, Other>;
  static constexpr int kPitchA = kProductDepth + 8;
  static constexpr int kTilesALoad = 32 / K;  // tiles of B in one ldmatrix

  template <int Parts>
  static constexpr int kSizeA = kPartRows * Parts * kPitchA;
  template <int Parts>
  static __host__ __device__ constexpr int index_a(int row, int k) {
    return row * kPitchA + k;
  }
  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return K == 8 ? capability >= 75 && capability < 80 : capability >= 80;
  }
  static __device__ __forceinline__ T operand(float value) { return narrow<T>(value); }

  static __device__ __forceinline__ void load_b(Shared<T> b, int k, uint32_t (&right)[Shape::kTiles][M::kRegistersB]) {
    const int lane = Shape::lane();
    constexpr int kAtOnce = kTilesALoad < Shape::kTiles ? kTilesALoad : Shape::kTiles;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; tile += kAtOnce) {
      uint32_t matrix[kAtOnce * M::kRegistersB];
      const int column = Shape::first_column() + (tile + lane / K % kAtOnce) * 8;
      ldmatrix<kAtOnce * M::kRegistersB, true>(matrix, b + Shape::index_b(k + lane % K, column));
#pragma unroll
      for (int i = 0; i < kAtOnce * M::kRegistersB; ++i)
        right[tile + i / M::kRegistersB][i % M::kRegistersB] = matrix[i];
    }
  }

  template <int Parts>
  static __device__ __forceinline__ void multiply(Shared<T> a, Shared<T> b, float (&sum)[Parts][Shape::kPairs]) {
    __syncwarp();  // loads before this may have parted the lanes, and the instructions below are the whole warp's
    const int lane = Shape::lane();
#pragma unroll
    for (int k = 0; k < kProductDepth; k += K) {
      uint32_t right[Shape::kTiles][M::kRegistersB];
      load_b(b, k, right);
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
        uint32_t left[M::kRegistersA];
        const int row = part * kPartRows + Shape::first_row() + lane % 16;
        ldmatrix<M::kRegistersA>(left, a + index_a<Parts>(row, k + lane / 16 * 8 % K));
        Shape::template multiply_tiles<M>(sum[part], left, right);
      }
    }
  }
};

// Whether code for this device has a use for a way to multiply; what has none is left out, and traps.
template <class S, class Product>
__device__ constexpr bool served_here() {
#ifdef __CUDA_ARCH__
  return Product::template serves<S>(__CUDA_ARCH__ / 10);
#else
  return true;
#endif
}

// What neighbouring threads take while A or B is filled: neighbours along the side that is contiguous in memory.
enum class Along { kDepth, kOther };

// Fills a matrix of Other x kProductDepth elements: put(other, k).
template <int Other, Along along, class Put>
__device__ __forceinline__ void for_each_operand(Put put) {
  static_assert(Other * kProductDepth % kProductThreads == 0, "as many elements for each thread");
#pragma unroll 4  // more would keep the addresses of every step in registers
  for (int step = 0; step < Other * kProductDepth / kProductThreads; ++step) {
    const int i = step * kProductThreads + static_cast<int>(threadIdx.x);
    if (along == Along::kDepth) {
      put(i / kProductDepth, i % kProductDepth);
    } else {
      put(i % Other, i / Other);
    }
  }
}

// Starts to copy an element to shared memory, or a zero. It is there after cp_async_wait and a barrier.
template <class S, class T>
__device__ __forceinline__ void copy_element(Shared<T> to, Global<const S> from, bool there) {
  if constexpr (sizeof(S) == sizeof(T)) {
    cp_async<sizeof(T)>(to, from, there ? sizeof(T) : 0);
  } else {
    T value = T(0);
    if (there) value = widen(__ldg(from));
    to[0] = value;
  }
}

// An element of global memory, or a zero.
template <class E>
struct Source {
  Global<const E> from;
  bool there;
};

// Starts to put an operand into shared memory. One that is copied as it is must be finished.
template <class Product, class E>
__device__ __forceinline__ void start_operand(Shared<typename Product::Operand> to, Source<E> source) {
  using Operand = typename Product::Operand;
  if constexpr (std::is_same_v<E, Operand> && sizeof(E) >= 4) {
    copy_element<E>(to, source.from, source.there);
  } else {
    typename Product::Accumulator value = 0;
    if (source.there) value = widen(__ldg(source.from));
    to[0] = Product::operand(value);
  }
}

// Starts to fill A with source(row, k); a thread finishes it, after cp_async_wait, with the same `along`.
template <class Product, int Parts, Along along, class From>
__device__ __forceinline__ void start_a(Shared<typename Product::Operand> a, From source) {
  for_each_operand<kPartRows * Parts, along>(
      [&](int row, int k) { start_operand<Product>(a + Product::template index_a<Parts>(row, k), source(row, k)); });
}

template <class Product, int Parts, Along along>
__device__ __forceinline__ void finish_a(Shared<typename Product::Operand> a) {
  if constexpr (Product::kRoundsCopies) {
    for_each_operand<kPartRows * Parts, along>([&](int row, int k) {
      const int at = Product::template index_a<Parts>(row, k);
      a[at] = Product::operand(a[at]);
    });
  }
}

// The same for B and source(k, column).
template <class Product, Along along, class From>
__device__ __forceinline__ void start_b(Shared<typename Product::Operand> b, From source) {
  for_each_operand<Product::kColumns, along>(
      [&](int column, int k) { start_operand<Product>(b + Product::index_b(k, column), source(k, column)); });
}

template <class Product, Along along>
__device__ __forceinline__ void finish_b(Shared<typename Product::Operand> b) {
  if constexpr (Product::kRoundsCopies) {
    for_each_operand<Product::kColumns, along>([&](int column, int k) {
      const int at = Product::index_b(k, column);
      b[at] = Product::operand(b[at]);
    });
  }
}

template <int Parts, int Pairs, class T>
__device__ __forceinline__ void clear(T (&sum)[Parts][Pairs]) {
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) sum[part][pair] = T(0);
  }
}

}  // namespace fastsam::cuda
