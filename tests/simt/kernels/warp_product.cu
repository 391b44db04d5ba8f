// Products of a warp, by every way to multiply. Matrices come in the type of the sums, row by row; two warps have 16
// rows each.
#include "fastsam/warp_product.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

constexpr int kWarps = 2, kRows = kWarps * kWarpRows;

__device__ int first_row() { return static_cast<int>(threadIdx.x) / kWarp * kWarpRows; }

// A matrix as operands in shared memory.
template <class Way, class T>
__device__ Shared<typename Way::Operand> operands(SharedArena& arena, Global<const T> matrix, int rows, int columns,
                                                  int pitch, const char* name) {
  const Shared<typename Way::Operand> to = arena.take<typename Way::Operand>(rows * pitch, name);
  for (int i = threadIdx.x; i < rows * columns; i += kWarps * kWarp)
    to[i / columns * pitch + i % columns] = Way::operand(matrix[i]);
  return to;
}

// Between what a lane has of `Tiles` tiles and the rows of its warp in a matrix.
template <class Way, int Tiles, class T>
__device__ void read(Global<const T> matrix, T (&sum)[Tiles][kTileElements]) {
  for (int tile = 0; tile < Tiles; ++tile) {
    for (int e = 0; e < kTileElements; ++e)
      sum[tile][e] = matrix[((first_row() + Way::row(e)) * Tiles + tile) * kTileColumns + Way::column(e)];
  }
}

template <class Way, int Tiles, class T>
__device__ void write(const T (&sum)[Tiles][kTileElements], Global<T> matrix) {
  for (int tile = 0; tile < Tiles; ++tile) {
    for (int e = 0; e < kTileElements; ++e)
      matrix[((first_row() + Way::row(e)) * Tiles + tile) * kTileColumns + Way::column(e)] = sum[tile][e];
  }
}

// out = c + a^T b for a (depth, 32), b (depth, columns).
template <class Way, int Tiles, class T>
__global__ void product_tn(Global<const T> a, Global<const T> b, Global<const T> c, Global<T> out, int depth) {
  constexpr int kColumns = Tiles * kTileColumns, kPitchA = Way::pitch_rows(kRows), kPitchB = Way::pitch_rows(kColumns);
  SharedArena arena;
  const auto left = operands<Way>(arena, a, depth, kRows, kPitchA, "a"),
             right = operands<Way>(arena, b, depth, kColumns, kPitchB, "b");
  T sum[Tiles][kTileElements];
  read<Way, Tiles>(c, sum);
  __syncthreads();
  Way::template multiply_tn<Tiles>(left + first_row(), kPitchA, right, kPitchB, depth, sum);
  write<Way, Tiles>(sum, out);
}

// out = c + a b^T for a (32, depth), b (columns, depth), in the first `tiles` tiles; c in the others.
template <class Way, int Tiles, class T>
__global__ void product_nt(Global<const T> a, Global<const T> b, Global<const T> c, Global<T> out, int depth,
                           int tiles) {
  const int pitch = Way::pitch(depth);
  SharedArena arena;
  const auto left = operands<Way>(arena, a, kRows, depth, pitch, "a"),
             right = operands<Way>(arena, b, tiles * kTileColumns, depth, pitch, "b");
  T sum[Tiles][kTileElements];
  read<Way, Tiles>(c, sum);
  __syncthreads();
  Way::template multiply_nt<Tiles>(left + first_row() * pitch, pitch, right, pitch, depth, sum, tiles);
  write<Way, Tiles>(sum, out);
}

// out = c + p b^T for p (32, 8 Depth), b (columns, 8 Depth), in the first `tiles` tiles; c in the others.
template <class Way, int Depth, int Tiles, class T>
__global__ void product_left(Global<const T> p, Global<const T> b, Global<const T> c, Global<T> out, int tiles) {
  constexpr int kDepth = Depth * kTileColumns, kPitch = Way::pitch(kDepth);
  constexpr int64_t kScratch = Way::template kScratch<kDepth>;
  SharedArena arena;
  const auto right = operands<Way>(arena, b, tiles * kTileColumns, kDepth, kPitch, "b");
  const Shared<typename Way::Operand> scratch =
      arena.take<typename Way::Operand>(kWarps * kScratch, "scratch") + first_row() / kWarpRows * kScratch;
  T left[Depth][kTileElements], sum[Tiles][kTileElements];
  read<Way, Depth>(p, left);
  read<Way, Tiles>(c, sum);
  __syncthreads();
  Way::template multiply_left<Depth, Tiles>(left, scratch, right, kPitch, sum, tiles);
  write<Way, Tiles>(sum, out);
}

// The largest value and the sum of each row of c (32, columns).
template <class Way, int Tiles, class T>
__global__ void rows(Global<const T> c, Global<T> largest, Global<T> total) {
  T value[Tiles][kTileElements];
  read<Way, Tiles>(c, value);
  T most[Way::kLaneRows], sum[Way::kLaneRows] = {};
  for (int row = 0; row < Way::kLaneRows; ++row) most[row] = value[0][row * kTileElements / Way::kLaneRows];
  for (int tile = 0; tile < Tiles; ++tile) {
    for (int e = 0; e < kTileElements; ++e) {
      most[Way::row_index(e)] = max(most[Way::row_index(e)], value[tile][e]);
      sum[Way::row_index(e)] += value[tile][e];
    }
  }
  for (int e = 0; e < kTileElements; ++e) {
    const T of_row[] = {largest_of_row<Way>(most[Way::row_index(e)]), sum_of_row<Way>(sum[Way::row_index(e)])};
    if (Way::column(0) != 0) continue;
    largest[first_row() + Way::row(e)] = of_row[0];
    total[first_row() + Way::row(e)] = of_row[1];
  }
}

// Room for both operands of any of these kernels with their paddings, which are 8 elements at most.
template <class Way>
int64_t bytes_for(int64_t rows, int64_t columns, int64_t depth) {
  return shared_bytes<typename Way::Operand>((rows + columns + kDepthStep) * (depth + kDepthStep));
}

template <int Value>
using Number = std::integral_constant<int, Value>;

// Calls use(the number of tiles); 16-bit operands go in pairs.
template <class Way, class Use>
void with_tiles(int64_t tiles, Use use) {
  if (tiles == 2) return use(Number<2>());
  if (tiles == 8) return use(Number<8>());
  if constexpr (sizeof(typename Way::Operand) > 2) {
    if (tiles == 1) return use(Number<1>());
  }
  throw std::runtime_error("no kernel for " + std::to_string(tiles) + " tiles");
}

template <class Way>
struct Tests {
  using T = typename Way::Accumulator;

  static simt::LaunchShape shape(int64_t depth, int64_t columns) {
    return {dim3(1), dim3(kWarps * kWarp), bytes_for<Way>(kRows, columns, depth)};
  }

  static const char* tn(const T* a, const T* b, const T* c, T* out, int64_t depth, int64_t tiles) {
    return simt::run([&] {
      with_tiles<Way>(tiles, [&](auto count) {
        const int64_t columns = tiles * kTileColumns;
        simt::launch("product_tn", product_tn<Way, decltype(count)::value, T>, shape(depth, columns),
                     simt::input(a, depth * kRows, "A"), simt::input(b, depth * columns, "B"),
                     simt::input(c, kRows * columns, "C"), simt::output(out, kRows * columns, "out"),
                     static_cast<int>(depth));
      });
    });
  }

  static const char* nt(const T* a, const T* b, const T* c, T* out, int64_t depth, int64_t tiles, int64_t used) {
    return simt::run([&] {
      with_tiles<Way>(tiles, [&](auto count) {
        const int64_t columns = tiles * kTileColumns;
        simt::launch("product_nt", product_nt<Way, decltype(count)::value, T>, shape(depth, columns),
                     simt::input(a, kRows * depth, "A"), simt::input(b, used * kTileColumns * depth, "B"),
                     simt::input(c, kRows * columns, "C"), simt::output(out, kRows * columns, "out"),
                     static_cast<int>(depth), static_cast<int>(used));
      });
    });
  }

  static const char* left(const T* p, const T* b, const T* c, T* out, int64_t depth_tiles, int64_t tiles,
                          int64_t used) {
    return simt::run([&] {
      with_tiles<Way>(depth_tiles, [&](auto deep) {
        with_tiles<Way>(tiles, [&](auto count) {
          const int64_t depth = depth_tiles * kTileColumns, columns = tiles * kTileColumns;
          simt::launch("product_left", product_left<Way, decltype(deep)::value, decltype(count)::value, T>,
                       shape(depth, columns), simt::input(p, kRows * depth, "P"),
                       simt::input(b, used * kTileColumns * depth, "B"), simt::input(c, kRows * columns, "C"),
                       simt::output(out, kRows * columns, "out"), static_cast<int>(used));
        });
      });
    });
  }

  static const char* rows(const T* c, T* largest, T* total, int64_t tiles) {
    return simt::run([&] {
      with_tiles<Way>(tiles, [&](auto count) {
        simt::launch("rows", cuda::rows<Way, decltype(count)::value, T>, {dim3(1), dim3(kWarps * kWarp)},
                     simt::input(c, kRows * tiles * kTileColumns, "C"), simt::output(largest, kRows, "largest"),
                     simt::output(total, kRows, "total"));
      });
    });
  }
};

}  // namespace
}  // namespace fastsam::cuda

#define DEFINE(name, T, ...)                                                                                         \
  extern "C" const char* tn_##name(const T* a, const T* b, const T* c, T* out, int64_t depth, int64_t tiles) {       \
    return fastsam::cuda::Tests<fastsam::cuda::__VA_ARGS__>::tn(a, b, c, out, depth, tiles);                         \
  }                                                                                                                  \
  extern "C" const char* nt_##name(const T* a, const T* b, const T* c, T* out, int64_t depth, int64_t tiles,         \
                                   int64_t used) {                                                                   \
    return fastsam::cuda::Tests<fastsam::cuda::__VA_ARGS__>::nt(a, b, c, out, depth, tiles, used);                   \
  }                                                                                                                  \
  extern "C" const char* left_##name(const T* p, const T* b, const T* c, T* out, int64_t depth_tiles, int64_t tiles, \
                                     int64_t used) {                                                                 \
    return fastsam::cuda::Tests<fastsam::cuda::__VA_ARGS__>::left(p, b, c, out, depth_tiles, tiles, used);           \
  }                                                                                                                  \
  extern "C" const char* rows_##name(const T* c, T* largest, T* total, int64_t tiles) {                              \
    return fastsam::cuda::Tests<fastsam::cuda::__VA_ARGS__>::rows(c, largest, total, tiles);                         \
  }

DEFINE(float32, float, WarpFma<float>)
DEFINE(float64, double, WarpFma<double>)
DEFINE(tf32, float, WarpTf32)
DEFINE(half_8, float, WarpHalf<__half, 8>)
DEFINE(half_16, float, WarpHalf<__half, 16>)
DEFINE(bfloat16, float, WarpHalf<__nv_bfloat16, 16>)
