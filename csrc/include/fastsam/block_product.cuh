// Products of small matrices by a block of 128 threads: D += A B with A (32 Parts, 16) and B (16, Columns) in shared
// memory and D in registers. The kernels are the same for every way to multiply; a way is one of the structs below:
//
//   Operand             what shared memory holds; operand() makes it from a value
//   Accumulator         float or double
//   index_a, index_b    where elements of A and B lie, which may depend on the side along which memory is contiguous
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

// Along which side of A or B neighbours in memory are, and so the elements that neighbouring threads copy.
enum class Along { kDepth, kOther };

template <int Columns>
struct ProductShape {
  static constexpr int kColumns = Columns, kPairs = kPartRows * Columns / kProductThreads;
};

// Rows of B start 8 words apart modulo the 32 banks, those of A 4: then fragments load without conflicts.
template <int Columns>
struct WordShape : ProductShape<Columns> {
  static constexpr int kPitchB = Columns + 8, kSizeB = kProductDepth * kPitchB;
  template <Along = Along::kOther>
  static __host__ __device__ constexpr int index_b(int k, int column) {
    return k * kPitchB + column;
  }
};

// Ordinary multiply-adds in T. A thread has 4 rows and kPairs / 4 columns.
template <class T, int Columns>
struct FmaProduct : WordShape<Columns> {
  using Operand = T;
  using Accumulator = T;
  using Shape = WordShape<Columns>;
  static constexpr bool kRoundsCopies = false;
  template <int Other>
  using WithColumns = FmaProduct<T, Other>;
  static constexpr int kThreadColumns = Shape::kPairs / 4, kThreadsAcross = Columns / kThreadColumns;

  template <int Parts>
  static constexpr int kSizeA = kProductDepth * (kPartRows * Parts + 4);
  template <int Parts, Along = Along::kDepth>
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

  template <Along, Along, int Parts>
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
template <class Shape>
struct MmaShape : Shape {
  using Accumulator = float;
  static constexpr int kTiles = Shape::kColumns / 16;  // of 8 columns

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 2 * 16; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 64 * (Shape::kColumns / 2); }
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
struct Tf32Product : MmaShape<WordShape<Columns>> {
  using Operand = float;
  using Shape = MmaShape<WordShape<Columns>>;
  using M = Mma<tf32, 8>;
  static constexpr bool kRoundsCopies = true;
  template <int Other>
  using WithColumns = Tf32Product<Other>;
  static constexpr int kPitchA = kProductDepth + 4;

  template <int Parts>
  static constexpr int kSizeA = kPartRows * Parts * kPitchA;
  template <int Parts, Along = Along::kDepth>
  static __host__ __device__ constexpr int index_a(int row, int k) {
    return row * kPitchA + k;
  }
  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return capability >= 80;
  }
  static __device__ __forceinline__ float operand(float value) { return __uint_as_float(round_to_tf32(value)); }

  template <Along, Along, int Parts>
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

// 16-bit operands: T is __half (K = 8 for 7.5, K = 16 for 8.0 and up) or __nv_bfloat16 (K = 16, 8.0 and up). Neighbours
// in memory are neighbours here too, so that several are copied at once, and instructions that load fragments transpose
// them where need be. Pitches are such that the 8 rows of 16 bytes of a fragment lie in different banks.
template <class T, int K, int Columns>
struct HalfProduct : MmaShape<ProductShape<Columns>> {
  using Operand = T;
  using Shape = MmaShape<ProductShape<Columns>>;
  using M = Mma<T, K>;
  static constexpr bool kRoundsCopies = false;
  template <int Other>
  using WithColumns = HalfProduct<T, K, Other>;
  static constexpr int kDepthPitch = kProductDepth + 8;
  static constexpr int kTilesALoad = 32 / K;  // tiles of B in one ldmatrix

  // Elements of a matrix of `other` x kProductDepth, whichever side is contiguous.
  static constexpr int size(int other) {
    return other * kDepthPitch > kProductDepth * (other + 8) ? other * kDepthPitch : kProductDepth * (other + 8);
  }
  template <int Parts>
  static constexpr int kSizeA = size(kPartRows * Parts);
  static constexpr int kSizeB = size(Columns);

  template <int Parts, Along along = Along::kDepth>
  static __host__ __device__ constexpr int index_a(int row, int k) {
    return along == Along::kDepth ? row * kDepthPitch + k : k * (kPartRows * Parts + 8) + row;
  }
  template <Along along = Along::kOther>
  static __host__ __device__ constexpr int index_b(int k, int column) {
    return along == Along::kDepth ? column * kDepthPitch + k : k * (Columns + 8) + column;
  }
  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return K == 8 ? capability >= 75 && capability < 80 : capability >= 80;
  }
  static __device__ __forceinline__ T operand(float value) { return narrow<T>(value); }

  // Rows and columns are counted from those of the warp.
  template <Along along, int Parts>
  static __device__ __forceinline__ void load_a(Shared<T> a, int part, int k, uint32_t (&left)[M::kRegistersA]) {
    const int lane = Shape::lane(), row = part * kPartRows + Shape::first_row();
    if constexpr (along == Along::kDepth) {
      ldmatrix<M::kRegistersA>(left, a + index_a<Parts, along>(row + lane % 16, k + lane / 16 * 8 % K));
    } else {
      const int depth = k + lane / 16 * 8 % K + lane % 8;
      ldmatrix<M::kRegistersA, true>(left, a + index_a<Parts, along>(row + lane / 8 % 2 * 8, depth));
    }
  }

  template <Along along>
  static __device__ __forceinline__ void load_b(Shared<T> b, int k, uint32_t (&right)[Shape::kTiles][M::kRegistersB]) {
    const int lane = Shape::lane();
    constexpr int kAtOnce = kTilesALoad < Shape::kTiles ? kTilesALoad : Shape::kTiles;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; tile += kAtOnce) {
      uint32_t matrix[kAtOnce * M::kRegistersB];
      const int column = Shape::first_column() + (tile + lane / K % kAtOnce) * 8;
      if constexpr (along == Along::kDepth) {
        const int depth = k + lane % K / 8 * 8;
        ldmatrix<kAtOnce * M::kRegistersB>(matrix, b + index_b<along>(depth, column + lane % 8));
      } else {
        ldmatrix<kAtOnce * M::kRegistersB, true>(matrix, b + index_b<along>(k + lane % K, column));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce * M::kRegistersB; ++i)
        right[tile + i / M::kRegistersB][i % M::kRegistersB] = matrix[i];
    }
  }

  template <Along along_a, Along along_b, int Parts>
  static __device__ __forceinline__ void multiply(Shared<T> a, Shared<T> b, float (&sum)[Parts][Shape::kPairs]) {
    __syncwarp();  // loads before this may have parted the lanes, and the instructions below are the whole warp's
#pragma unroll
    for (int k = 0; k < kProductDepth; k += K) {
      uint32_t right[Shape::kTiles][M::kRegistersB];
      load_b<along_b>(b, k, right);
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
        uint32_t left[M::kRegistersA];
        load_a<along_a, Parts>(a, part, k, left);
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

// Fills a matrix of Other x kProductDepth elements: put(other, k), for the first of each Step neighbours. More steps
// at once would keep all of their addresses in registers.
template <int Other, Along along, int Step = 1, int StepsAtOnce = 4, class Put>
__device__ __forceinline__ void for_each_operand(Put put) {
  constexpr int kSteps = Other * kProductDepth / Step / kProductThreads;
  static_assert(kSteps * Step * kProductThreads == Other * kProductDepth, "as many elements for each thread");
#pragma unroll StepsAtOnce
  for (int step = 0; step < kSteps; ++step) {
    const int i = (step * kProductThreads + static_cast<int>(threadIdx.x)) * Step;
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
  if constexpr (sizeof(S) == sizeof(T) && sizeof(T) >= 4) {
    cp_async<sizeof(T)>(to, from, there ? sizeof(T) : 0);
  } else {
    Wide<S> value = 0;
    if (there) value = widen(__ldg(from));
    to[0] = narrow<T>(value);
  }
}

// Elements of 16 bits are copied as many at a time where all are aligned for it: an asynchronous copy has at least 4
// bytes.
constexpr int kCopiedAtOnce = 4;

// Whether copies can start at an address and at multiples of kCopiedAtOnce elements from there. On the host.
template <class S>
bool aligned_for_copies(const S* address) {
  return reinterpret_cast<uintptr_t>(address) % (kCopiedAtOnce * sizeof(S)) == 0;
}

// Starts to copy the first `count` of kCopiedAtOnce elements, and zeros instead of the others.
template <class S>
__device__ __forceinline__ void copy_elements(Shared<S> to, Global<const S> from, int count) {
  cp_async<kCopiedAtOnce * sizeof(S)>(to, from, count * static_cast<int>(sizeof(S)));
}

// An element of global memory, or a zero.
template <class E>
struct Source {
  using Element = E;
  Global<const E> from;
  bool there;
};

// Starts to put an operand into shared memory. One that is copied as it is must be finished.
template <class Product, class E>
__device__ __forceinline__ void start_operand(Shared<typename Product::Operand> to, Source<E> source) {
  if constexpr (std::is_same_v<E, typename Product::Operand>) {
    copy_element<E>(to, source.from, source.there);
  } else {
    typename Product::Accumulator value = 0;
    if (source.there) value = widen(__ldg(source.from));
    to[0] = Product::operand(value);
  }
}

// Starts to fill a matrix of Other x kProductDepth operands, which are where place(other, k) says, with source(other,
// k). `aligned` operands of 16 bits come several at a time: then neighbours `along` one side are there or not together.
template <class Product, int Other, Along along, class Place, class From>
__device__ __forceinline__ void start_operands(bool aligned, Place place, From source) {
  using E = typename decltype(source(0, 0))::Element;
  if constexpr (std::is_same_v<E, typename Product::Operand> && sizeof(E) == 2) {
    if (aligned) {
      return for_each_operand<Other, along, kCopiedAtOnce, 1>([&](int other, int k) {
        const Source<E> first = source(other, k);
        copy_elements<E>(place(other, k), first.from, first.there ? kCopiedAtOnce : 0);
      });
    }
  }
  for_each_operand<Other, along>([&](int other, int k) { start_operand<Product>(place(other, k), source(other, k)); });
}

// Starts to fill A with source(row, k); a thread finishes it, after cp_async_wait, with the same `along`.
template <class Product, int Parts, Along along, class From>
__device__ __forceinline__ void start_a(Shared<typename Product::Operand> a, bool aligned, From source) {
  start_operands<Product, kPartRows * Parts, along>(
      aligned, [&](int row, int k) { return a + Product::template index_a<Parts, along>(row, k); }, source);
}

template <class Product, int Parts, Along along>
__device__ __forceinline__ void finish_a(Shared<typename Product::Operand> a) {
  if constexpr (Product::kRoundsCopies) {
    for_each_operand<kPartRows * Parts, along>([&](int row, int k) {
      const int at = Product::template index_a<Parts, along>(row, k);
      a[at] = Product::operand(a[at]);
    });
  }
}

// The same for B and source(column, k).
template <class Product, Along along, class From>
__device__ __forceinline__ void start_b(Shared<typename Product::Operand> b, bool aligned, From source) {
  start_operands<Product, Product::kColumns, along>(
      aligned, [&](int column, int k) { return b + Product::template index_b<along>(k, column); }, source);
}

template <class Product, Along along>
__device__ __forceinline__ void finish_b(Shared<typename Product::Operand> b) {
  if constexpr (Product::kRoundsCopies) {
    for_each_operand<Product::kColumns, along>([&](int column, int k) {
      const int at = Product::template index_b<along>(k, column);
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
