// What the kernels of the attention operators share: maps and windows of maps in device memory, tiles of them in shared
// memory, and linear maps of a tile's channels. Equations: fastsam/ops/_attention/eager.py.
//
// A block has 128 threads. Its 16 or 64 rows are positions, one group of 16 a warp; where there are 16, the four warps
// share out the columns of each tile that streams past.
#pragma once

#include <cmath>

#include "fastsam/block_product.cuh"
#include "fastsam/launch.cuh"
#include "fastsam/warp_product.cuh"

namespace fastsam::cuda {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;

// A (B, C, N) map in device memory.
template <class E>
struct ColumnMap {
  Global<E> data;
  int64_t stride_batch;
  int64_t stride_channel;
};

// Where the entries of the batch and their positions lie in such maps. A map may be cut into `down` x `across` windows
// of `height` rows of `width` positions: each is an entry of the batch. Without windows the map is one row.
struct WindowGrid {
  int64_t across, down, height, width;
  int64_t stride_row;

  __host__ __device__ int64_t start(int64_t stride_batch, int64_t entry) const {
    const int64_t sample = entry / (across * down), window = entry % (across * down);
    return sample * stride_batch + window / across * height * stride_row + window % across * width;
  }
  __host__ __device__ int64_t offset(int64_t position) const {
    if (height == 1) return position;
    const int row = static_cast<int>(position) / static_cast<int>(width);
    return row * stride_row + (static_cast<int>(position) - row * static_cast<int>(width));
  }
};

// Where an entry of the batch starts. It costs divisions: once for all tiles.
template <class E>
__device__ __forceinline__ Global<E> entry_of(const ColumnMap<E>& map, const WindowGrid& grid, int64_t entry) {
  return map.data + grid.start(map.stride_batch, entry);
}

// How the warps of a block share its work.
template <int KeyWarps>
struct BlockShape {
  static constexpr int kRowWarps = kAttentionWarps / KeyWarps, kRows = kRowWarps * kWarpRows;
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static __device__ __forceinline__ int key_warp() { return warp() % KeyWarps; }
  static __device__ __forceinline__ int first_row() { return warp() / KeyWarps * kWarpRows; }
};

// Columns of a tile that streams past: 128 bytes a row.
template <class Operand>
constexpr int kStreamColumns = sizeof(Operand) == 2 ? 64 : 32;

__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// visit(index, row) for the rows of this lane in its warp's 16.
template <class Way, class Visit>
__device__ __forceinline__ void for_each_row(Visit visit) {
#pragma unroll
  for (int index = 0; index < Way::kLaneRows; ++index) visit(index, Way::row(index * (kTileElements / Way::kLaneRows)));
}

// visit(row, column) for every `Width` columns of a rows x Columns matrix, shared out among the threads.
template <int Columns, int Width, class Visit>
__device__ __forceinline__ void for_each_part(int64_t rows, Visit visit) {
  constexpr int kAcross = Columns / Width;
  for (int i = threadIdx.x; i < rows * kAcross; i += kAttentionThreads) visit(i / kAcross, i % kAcross * Width);
}

// Starts to copy `Columns` operands, as vectors, of each of `rows` rows, which are `stride` apart. A thread keeps to
// its columns and goes from row to row.
template <int Columns, class Operand>
__device__ __forceinline__ void start_rows(Global<const Operand> from, int64_t stride, int rows, Shared<Operand> to,
                                           int pitch) {
  constexpr int kVector = 16 / sizeof(Operand), kAcross = Columns / kVector, kStep = kAttentionThreads / kAcross;
  const int column = static_cast<int>(threadIdx.x) % kAcross * kVector;
  int row = static_cast<int>(threadIdx.x) / kAcross;
  from += row * stride + column;
  to += row * pitch + column;
#pragma unroll 1
  for (; row < rows; row += kStep) {
    cp_async<16>(to, from);
    from += kStep * stride;
    to += kStep * pitch;
  }
}

// The tile of positions [first, first + Columns) of an entry of the batch, as it is copied and then made operands.
// `vectors`: all rows of all entries start at multiples of 16 bytes and are such multiples long.
template <class Way, int Columns, class S>
struct MapTile {
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  static constexpr int kVector = 16 / sizeof(S);
  static constexpr bool kMayCopyVectors = sizeof(S) == sizeof(Operand);

  Shared<Operand> tile;
  int pitch;
  bool vectors;

  // Starts to copy, from an entry of the batch that starts at `plane`: zeros beyond the channels, up to `depth`, and
  // beyond the positions.
  __device__ __forceinline__ void start(Global<const S> plane, int64_t stride_channel, const WindowGrid& grid,
                                        int64_t first, int64_t positions, int channels, int64_t depth) const {
    if constexpr (kMayCopyVectors) {
      if (vectors) return start_parts<kVector>(plane, stride_channel, grid, first, positions, channels, depth);
    }
    start_parts<1>(plane, stride_channel, grid, first, positions, channels, depth);
  }

  // Makes operands of what this thread has copied, which must have landed, less shift[channel] where there is a shift.
  __device__ __forceinline__ void finish(Shared<T> shift, int64_t depth) const {
    if constexpr (kMayCopyVectors) {
      if (vectors) return make_operands<kVector>(shift, depth);
    }
    make_operands<1>(shift, depth);
  }

 private:
  // A thread keeps to its columns and goes from channel to channel.
  template <int Width>
  __device__ __forceinline__ void start_parts(Global<const S> plane, int64_t stride_channel, const WindowGrid& grid,
                                              int64_t first, int64_t positions, int channels, int64_t depth) const {
    constexpr int kAcross = Columns / Width, kStep = kAttentionThreads / kAcross;
    const int column = static_cast<int>(threadIdx.x) % kAcross * Width;
    int channel = static_cast<int>(threadIdx.x) / kAcross;
    const bool in_map = first + column < positions;
    const int64_t step = in_map ? kStep * stride_channel : 0;
    Global<const S> from = plane;
    if (in_map && channel < channels) from += channel * stride_channel + grid.offset(first + column);
    Shared<Operand> to = tile + (channel * pitch + column);
#pragma unroll 4
    for (; channel < depth; channel += kStep) {
      const bool there = in_map && channel < channels;
      start_part<Width>(to, from, there);
      if (channel + kStep < channels) from += step;
      to += kStep * pitch;
    }
    cp_async_commit();
  }

  template <int Width>
  static __device__ __forceinline__ void start_part(Shared<Operand> to, Global<const S> from, bool there) {
    if constexpr (kMayCopyVectors && Width * sizeof(S) >= 4) {
      cp_async<Width * sizeof(S)>(to, from, there ? Width * sizeof(S) : 0);
    } else {
      T value = T(0);
      if (there) value = widen(__ldg(from));
      to[0] = narrow<Operand>(value);
    }
  }

  template <int Width>
  __device__ __forceinline__ void make_operands(Shared<T> shift, int64_t depth) const {
    using V = Vec<Operand, Width>;
    for_each_part<Columns, Width>(depth, [&](int channel, int column) {
      T taken = T(0);
      if (shift != nullptr) taken = shift[channel];
      V values = load<V>(tile + (channel * pitch + column));
#pragma unroll
      for (int i = 0; i < Width; ++i) values[i] = Way::operand(widen(values[i]) - taken);
      store(tile + (channel * pitch + column), values);
    });
  }
};

// Attention does not change when the same vector is taken from all columns of a source, but for R, which loses it too.
// Maps with a mean, such as images, would lose digits without: where terms of its size cancel, in delta - dP and in
// sums of dE times the keys. Any vector near the mean does: this is the mean of 128 positions at most, groups of 8 all
// over the map, so that a block need not read all of it. Channels whose mean is not finite keep their columns.
template <class S, class T>
__device__ __forceinline__ void sample_means(Global<const S> plane, int64_t stride_channel, const WindowGrid& grid,
                                             int64_t positions, int channels, int64_t depth, Shared<T> shift) {
  constexpr int kSamples = 128, kGroup = 8, kLoads = kSamples / kWarp,
                kAtOnce = sizeof(T) == 8 ? 1 : 4;  // channels: loads take long
  const int count = static_cast<int>(positions < kSamples ? positions : kSamples);
  int64_t offsets[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int sample = lane_of_warp() + i * kWarp;
    const int64_t group = sample / kGroup * (positions - kGroup) / (kSamples / kGroup - 1);
    const int64_t position = positions <= kSamples ? sample : group + sample % kGroup;
    offsets[i] = sample < count ? grid.offset(position) : 0;
  }
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / kWarp * kAtOnce; first < depth; first += kAttentionWarps * kAtOnce) {
    T values[kAtOnce][kLoads], sums[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const Global<const S> from = plane + static_cast<int64_t>(min(first + c, channels - 1)) * stride_channel;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) values[c][i] = widen(__ldg(from + offsets[i]));
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      sums[c] = T(0);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + c < channels && lane_of_warp() + i * kWarp < count) sums[c] += values[c][i];
      }
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const T mean = sum_of_warp(sums[c]) / static_cast<T>(count);
      if (lane_of_warp() == 0) shift[first + c] = mean - mean == T(0) ? mean : T(0);
    }
  }
}

// sum += (W in)^T for the rows of this warp: weight(output, input) is W, in[input][row] in shared memory, `depth`
// inputs. Outputs are first_output + ... on, `Tiles` tiles for each of the KeyWarps warps that share the rows. Starts
// with a barrier, so `in` and `stage` need none before.
template <class Way, int KeyWarps, int Tiles>
constexpr int kMapOutputs = Tiles * kTileColumns * KeyWarps;

// Inputs whose weights are in shared memory at a time.
template <class Way>
constexpr int kMapInputs = sizeof(typename Way::Operand) == 8 ? kDepthStep / 2 : kDepthStep;

template <class Way, int KeyWarps, int Tiles>
__host__ __device__ constexpr int64_t map_stage_size() {
  return kMapInputs<Way> * Way::pitch_rows(kMapOutputs<Way, KeyWarps, Tiles>);
}

template <class Way, int KeyWarps, int Tiles, class Weight>
__device__ __forceinline__ void add_map(Shared<typename Way::Operand> in, int pitch_in, int64_t depth,
                                        Shared<typename Way::Operand> stage, int64_t first_output, Weight weight,
                                        typename Way::Accumulator (&sum)[Tiles][kTileElements]) {
  using Shape = BlockShape<KeyWarps>;
  constexpr int kOutputs = kMapOutputs<Way, KeyWarps, Tiles>, kInputs = kMapInputs<Way>,
                kPitch = Way::pitch_rows(kOutputs);
#pragma unroll 1
  for (int64_t k = 0; k < depth; k += kInputs) {
    __syncthreads();
    for_each_part<kInputs, 1>(kOutputs, [&](int output, int input) {
      stage[input * kPitch + output] = Way::operand(weight(first_output + output, k + input));
    });
    __syncthreads();
    Way::template multiply_tn<Tiles>(in + (k * pitch_in + Shape::first_row()), pitch_in,
                                     stage + Shape::key_warp() * Tiles * kTileColumns, kPitch, kInputs, sum);
  }
}

// What sum_over_warps needs of shared memory, for sums of so many columns.
template <class Way, int KeyWarps>
__host__ __device__ constexpr int64_t slots_size(int columns) {
  return static_cast<int64_t>(KeyWarps == 1 ? 1 : 2) * columns * Way::pitch_rows(BlockShape<KeyWarps>::kRows);
}

// slots[column][row] = sum, added up over the warps that share the rows: in pairs, then the pairs. Needs a barrier
// before where the slots were in use, and one after.
template <class Way, int KeyWarps, int Tiles, class T>
__device__ __forceinline__ void sum_over_warps(T (&sum)[Tiles][kTileElements], Shared<T> slots) {
  using Shape = BlockShape<KeyWarps>;
  constexpr int kPitch = Way::pitch_rows(Shape::kRows), kSlot = Tiles * kTileColumns * kPitch;
  const int warp = Shape::key_warp();
  const auto visit = [&](Shared<T> slot, auto use) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        const int column = tile * kTileColumns + Way::column(e);
        use(slot + (column * kPitch + Shape::first_row() + Way::row(e)), sum[tile][e]);
      }
    }
  };
  const auto put = [](Shared<T> slot, T& value) { slot[0] = value; };
  const auto add = [](Shared<T> slot, T& value) { value += slot[0]; };
  if constexpr (KeyWarps > 1) {
    static_assert(KeyWarps == 4, "two pairs of warps");
    if (warp >= 2) visit(slots + (warp - 2) * kSlot, put);
    __syncthreads();
    if (warp < 2) visit(slots + warp * kSlot, add);
    __syncthreads();
    if (warp == 1) visit(slots, put);
    __syncthreads();
    if (warp == 0) visit(slots, add);
  }
  if (warp == 0) visit(slots, put);
}

// An element of a (rows, columns) matrix in device memory, zero beyond it.
template <class T>
__device__ __forceinline__ T matrix_at(Global<const T> matrix, int64_t rows, int64_t columns, int64_t row,
                                       int64_t column) {
  T value = T(0);
  if (row < rows && column < columns) value = __ldg(matrix + (row * columns + column));
  return value;
}

}  // namespace fastsam::cuda
