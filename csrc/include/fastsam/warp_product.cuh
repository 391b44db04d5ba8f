// Products of small matrices by one warp: sums of 16 rows stay in its registers, as tiles of 8 columns with 4 elements
// a lane. Rows never leave their warp, so softmaxes over them need no barrier of the block. The kernels are the same
// for every way to multiply; a way is one of the structs below:
//
//   Operand, Accumulator  what shared memory holds, and the sums; operand() makes the one from the other
//   row(e), column(e)     the place in a tile of this lane's element e, 0 <= e < 4
//   row_index(e)          which of the kLaneRows rows of this lane it is in
//   kRowMask              lanes that differ in these bits of their number share their rows
//   exponential(x)        e^x, as exact as the products
//   pitch_rows(n)         a pitch for matrices whose rows are read by multiply_tn alone, of n columns
//   pitch(n)              a pitch for matrices that any product reads
//   multiply_tn           sum += A^T B; a[k][row], b[k][column], both in shared memory
//   multiply_nt           sum += A B^T; a[row][k], b[column][k], both in shared memory
//   multiply_left         sum += P B^T; P is a sum of other products; b[column][k]; kScratch elements of the warp's own
//   serves<S>             whether devices of a compute capability, times ten, multiply so for maps of S
//
// Depths are multiples of 16, numbers of tiles are even where operands have 16 bits. The last argument of the latter
// two leaves out the tiles from there on.
#pragma once

#include <type_traits>

#include "fastsam/ptx.cuh"
#include "fastsam/warp.cuh"

namespace fastsam::cuda {

constexpr int kWarpRows = 16, kTileColumns = 8, kTileElements = 4, kDepthStep = 16;

__host__ __device__ constexpr int64_t padded_depth(int64_t depth) {
  return (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
}

template <int Tiles, class T>
__device__ __forceinline__ void clear_tiles(T (&sum)[Tiles][kTileElements]) {
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int e = 0; e < kTileElements; ++e) sum[tile][e] = T(0);
  }
}

// Ordinary multiply-adds. A lane has 4 rows and one column of each tile.
template <class T>
struct WarpFma {
  using Operand = T;
  using Accumulator = T;
  static constexpr int kLaneRows = 4, kRowMask = 7, kVector = 16 / sizeof(T);

  static __device__ __forceinline__ int row(int e) { return lane_of_warp() / 8 * 4 + e; }
  static __device__ __forceinline__ int column(int) { return lane_of_warp() % 8; }
  static __host__ __device__ constexpr int row_index(int e) { return e; }
  static __host__ __device__ constexpr int pitch_rows(int n) { return n; }
  // Eight rows at one column, 16 bytes each, are in different banks.
  static __host__ __device__ constexpr int pitch(int n) { return n + kVector; }
  static __device__ __forceinline__ T operand(T value) { return value; }
  static __device__ __forceinline__ float exponential(float x) { return expf(x); }
  static __device__ __forceinline__ double exponential(double x) { return exp(x); }

  template <int Depth>
  static constexpr int kScratch = kWarpRows * (Depth + kVector);

  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return sizeof(S) > 2 || capability < (std::is_same_v<S, __half> ? 75 : 80);
  }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_tn(Shared<T> a, int pitch_a, Shared<T> b, int pitch_b, int depth,
                                                     T (&sum)[Tiles][kTileElements]) {
    const Shared<T> my_a = a + row(0), my_b = b + column(0);
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      T left[4];
#pragma unroll
      for (int i = 0; i < 4; i += kVector) {
        const auto values = load<Vec<T, kVector>>(my_a + (k * pitch_a + i));
#pragma unroll
        for (int j = 0; j < kVector; ++j) left[i + j] = values[j];
      }
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        const T right = my_b[k * pitch_b + tile * kTileColumns];
#pragma unroll
        for (int e = 0; e < kTileElements; ++e) sum[tile][e] += left[e] * right;
      }
    }
  }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_nt(Shared<T> a, int pitch_a, Shared<T> b, int pitch_b, int depth,
                                                     T (&sum)[Tiles][kTileElements], int tiles = Tiles) {
    using V = Vec<T, kVector>;
    const Shared<T> my_a = a + row(0) * pitch_a, my_b = b + column(0) * pitch_b;
#pragma unroll 1
    for (int k = 0; k < depth; k += kVector) {
      V left[kTileElements];
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) left[e] = load<V>(my_a + (e * pitch_a + k));
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        if (tile >= tiles) break;
        const V right = load<V>(my_b + (tile * kTileColumns * pitch_b + k));
#pragma unroll
        for (int e = 0; e < kTileElements; ++e) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum[tile][e] += left[e][j] * right[j];
        }
      }
    }
  }

  template <int Depth, int Tiles>
  static __device__ __forceinline__ void multiply_left(const T (&p)[Depth][kTileElements], Shared<T> scratch,
                                                       Shared<T> b, int pitch_b, T (&sum)[Tiles][kTileElements],
                                                       int tiles = Tiles) {
    constexpr int kPitch = Depth * kTileColumns + kVector;
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < Depth; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) scratch[row(e) * kPitch + tile * kTileColumns + column(e)] = p[tile][e];
    }
    __syncwarp();
    multiply_nt<Tiles>(scratch, kPitch, b, pitch_b, Depth * kTileColumns, sum, tiles);
  }
};

// What all products on tensor cores share: the accumulators of mma.m16n8. Four lanes have the same two rows.
struct WarpMma {
  using Accumulator = float;
  static constexpr int kLaneRows = 2, kRowMask = 3;
  static __device__ __forceinline__ int row(int e) { return MmaAccumulator::row_c(lane_of_warp(), e); }
  static __device__ __forceinline__ int column(int e) { return MmaAccumulator::col_c(lane_of_warp(), e); }
  static __host__ __device__ constexpr int row_index(int e) { return e / 2; }
  // To |x| / 2^24 and 2 ulp, less than operands lose. x is a difference, and scaled only then: with log2(e) in the
  // queries it would be lse that is scaled, and P would lose digits (csrc/README.md, the end).
  static __device__ __forceinline__ float exponential(float x) { return exp2_approx(x * 1.4426950408889634f); }
  // Rows of 4-byte elements start 8 banks apart, of 2-byte ones 4.
  static __host__ __device__ constexpr int pitch_rows(int n) { return n + 8; }
  static __host__ __device__ constexpr int pitch(int n) { return n + 8; }
  template <int>
  static constexpr int kScratch = 0;
};

// Float32 operands rounded to tf32, 8.0 and up.
struct WarpTf32 : WarpMma {
  using Operand = float;
  using M = Mma<tf32, 8>;

  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return capability >= 80;
  }
  static __device__ __forceinline__ float operand(float value) { return __uint_as_float(round_to_tf32(value)); }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_tn(Shared<float> a, int pitch_a, Shared<float> b, int pitch_b,
                                                     int depth, float (&sum)[Tiles][kTileElements]) {
    __syncwarp();
    const int lane = lane_of_warp();
    const Shared<float> my_a = a + (lane % 4 * pitch_a + lane / 4), my_b = b + (lane % 4 * pitch_b + lane / 4);
#pragma unroll 2
    for (int k = 0; k < depth; k += M::kK) {
      uint32_t left[M::kRegistersA];
#pragma unroll
      for (int i = 0; i < M::kElementsA; ++i) left[i] = __float_as_uint(my_a[(k + i / 2 * 4) * pitch_a + i % 2 * 8]);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        uint32_t right[M::kRegistersB];
#pragma unroll
        for (int i = 0; i < M::kElementsB; ++i)
          right[i] = __float_as_uint(my_b[(k + i * 4) * pitch_b + tile * kTileColumns]);
        M::multiply(sum[tile], left, right);
      }
    }
  }

  // In the products below, the instruction's depth index l + 4 i stands for 2 l + i: the order of a sum is free, and so
  // both values of a lane are neighbours in memory, and an accumulator is a left operand as it is.
  template <int Tiles>
  static __device__ __forceinline__ void multiply_row(const uint32_t (&left)[4], Shared<float> b, int pitch_b,
                                                      float (&sum)[Tiles][kTileElements], int tiles) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      if (tile >= tiles) break;
      const float2 pair = load<float2>(b + ((tile * kTileColumns + lane / 4) * pitch_b + lane % 4 * 2));
      const uint32_t right[M::kRegistersB] = {__float_as_uint(pair.x), __float_as_uint(pair.y)};
      M::multiply(sum[tile], left, right);
    }
  }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_nt(Shared<float> a, int pitch_a, Shared<float> b, int pitch_b,
                                                     int depth, float (&sum)[Tiles][kTileElements], int tiles = Tiles) {
    __syncwarp();
    const int lane = lane_of_warp();
#pragma unroll 2
    for (int k = 0; k < depth; k += M::kK) {
      const float2 top = load<float2>(a + (lane / 4 * pitch_a + k + lane % 4 * 2));
      const float2 bottom = load<float2>(a + ((lane / 4 + 8) * pitch_a + k + lane % 4 * 2));
      const uint32_t left[4] = {__float_as_uint(top.x), __float_as_uint(bottom.x), __float_as_uint(top.y),
                                __float_as_uint(bottom.y)};
      multiply_row<Tiles>(left, b + k, pitch_b, sum, tiles);
    }
  }

  template <int Depth, int Tiles>
  static __device__ __forceinline__ void multiply_left(const float (&p)[Depth][kTileElements], Shared<float>,
                                                       Shared<float> b, int pitch_b, float (&sum)[Tiles][kTileElements],
                                                       int tiles = Tiles) {
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < Depth; ++tile) {
      const uint32_t left[4] = {round_to_tf32(p[tile][0]), round_to_tf32(p[tile][2]), round_to_tf32(p[tile][1]),
                                round_to_tf32(p[tile][3])};
      multiply_row<Tiles>(left, b + tile * kTileColumns, pitch_b, sum, tiles);
    }
  }
};

// 16-bit operands: T is __half (K = 8 for 7.5, K = 16 for 8.0 and up) or __nv_bfloat16 (K = 16, 8.0 and up).
template <class T, int K>
struct WarpHalf : WarpMma {
  using Operand = T;
  using M = Mma<T, K>;
  static constexpr int kLoaded = 2;  // tiles whose right operands one ldmatrix brings

  template <class S>
  static __host__ __device__ constexpr bool serves(int capability) {
    return K == 8 ? capability >= 75 && capability < 80 : capability >= 80;
  }
  static __device__ __forceinline__ T operand(float value) { return narrow<T>(value); }

  // sum[first ...] += left times the tiles of `matrix`.
  template <int Tiles>
  static __device__ __forceinline__ void multiply_loaded(int first, const uint32_t (&left)[M::kRegistersA],
                                                         const uint32_t (&matrix)[kLoaded * M::kRegistersB],
                                                         float (&sum)[Tiles][kTileElements]) {
#pragma unroll
    for (int tile = 0; tile < kLoaded; ++tile) {
      uint32_t right[M::kRegistersB];
#pragma unroll
      for (int i = 0; i < M::kRegistersB; ++i) right[i] = matrix[tile * M::kRegistersB + i];
      M::multiply(sum[first + tile], left, right);
    }
  }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_tn(Shared<T> a, int pitch_a, Shared<T> b, int pitch_b, int depth,
                                                     float (&sum)[Tiles][kTileElements]) {
    static_assert(Tiles % kLoaded == 0, "tiles are loaded two at a time");
    __syncwarp();
    const int lane = lane_of_warp();
#pragma unroll 1
    for (int k = 0; k < depth; k += K) {
      uint32_t left[M::kRegistersA];
      ldmatrix<M::kRegistersA, true>(left, a + ((k + lane / 16 * 8 % K + lane % 8) * pitch_a + lane / 8 % 2 * 8));
#pragma unroll
      for (int tile = 0; tile < Tiles; tile += kLoaded) {
        uint32_t matrix[kLoaded * M::kRegistersB];
        ldmatrix<kLoaded * M::kRegistersB, true>(
            matrix, b + ((k + lane % K) * pitch_b + (tile + lane / K % kLoaded) * kTileColumns));
        multiply_loaded(tile, left, matrix, sum);
      }
    }
  }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_row(const uint32_t (&left)[M::kRegistersA], Shared<T> b, int pitch_b,
                                                      float (&sum)[Tiles][kTileElements], int tiles) {
    constexpr int kHalves = K / 8;
    static_assert(Tiles % kLoaded == 0, "tiles are loaded two at a time");
    const int lane = lane_of_warp(), matrix_index = lane / 8;
#pragma unroll
    for (int tile = 0; tile < Tiles; tile += kLoaded) {
      if (tile >= tiles) break;
      uint32_t matrix[kLoaded * M::kRegistersB];
      const int column = (tile + matrix_index / kHalves % kLoaded) * kTileColumns + lane % 8;
      ldmatrix<kLoaded * M::kRegistersB>(matrix, b + (column * pitch_b + matrix_index % kHalves * 8));
      multiply_loaded(tile, left, matrix, sum);
    }
  }

  template <int Tiles>
  static __device__ __forceinline__ void multiply_nt(Shared<T> a, int pitch_a, Shared<T> b, int pitch_b, int depth,
                                                     float (&sum)[Tiles][kTileElements], int tiles = Tiles) {
    __syncwarp();
    const int lane = lane_of_warp();
#pragma unroll 1
    for (int k = 0; k < depth; k += K) {
      uint32_t left[M::kRegistersA];
      ldmatrix<M::kRegistersA>(left, a + (lane % 16 * pitch_a + k + lane / 16 * 8 % K));
      multiply_row<Tiles>(left, b + k, pitch_b, sum, tiles);
    }
  }

  template <int Depth, int Tiles>
  static __device__ __forceinline__ void multiply_left(const float (&p)[Depth][kTileElements], Shared<T>, Shared<T> b,
                                                       int pitch_b, float (&sum)[Tiles][kTileElements],
                                                       int tiles = Tiles) {
    constexpr int kStep = K / kTileColumns;
    static_assert(Depth % kStep == 0, "as deep as the instruction");
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < Depth; tile += kStep) {
      uint32_t left[M::kRegistersA];
#pragma unroll
      for (int i = 0; i < M::kRegistersA; ++i)
        left[i] = pack<T>(p[tile + i / 2][i % 2 * 2], p[tile + i / 2][i % 2 * 2 + 1]);
      multiply_row<Tiles>(left, b + tile * kTileColumns, pitch_b, sum, tiles);
    }
  }
};

// multiply_left for the first `tiles` tiles of the sum. Where there are all of them nothing is tested on the way, and
// loads run ahead of products.
template <class Way, int Depth, int Tiles, class T>
__device__ __forceinline__ void add_left(const T (&p)[Depth][kTileElements], Shared<typename Way::Operand> scratch,
                                         Shared<typename Way::Operand> b, int pitch_b, T (&sum)[Tiles][kTileElements],
                                         int tiles) {
  if (tiles >= Tiles) {
    Way::template multiply_left<Depth, Tiles>(p, scratch, b, pitch_b, sum);
  } else {
    Way::template multiply_left<Depth, Tiles>(p, scratch, b, pitch_b, sum, tiles);
  }
}

// The largest value, or the sum, of the lanes that share this lane's rows.
template <class Way, class T>
__device__ __forceinline__ T largest_of_row(T value) {
#pragma unroll
  for (int distance = 1; distance <= Way::kRowMask; distance *= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

template <class Way, class T>
__device__ __forceinline__ T sum_of_row(T value) {
#pragma unroll
  for (int distance = 1; distance <= Way::kRowMask; distance *= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

}  // namespace fastsam::cuda
