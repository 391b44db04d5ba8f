// The third launch of the attention's backward pass: attention_backward.cuh. Some blocks add to dx what flows back
// through the query and key maps, score^T dquery of all sources for the hidden state and key^T dkeys for each source;
// the others add up the parts of the weights' gradients.
#pragma once

#include "fastsam/attention_backward.cuh"

namespace fastsam::cuda {

// out[i] = sum over the parts of parts[part][i].
template <class T>
struct PartsOfSum {
  Global<const T> parts;
  Global<T> out;
  int64_t count, number;  // of elements, of parts
};

constexpr int kMostSums = 4 * kMaxSources + 1, kSumColumns = 32;

template <class T>
struct AttentionSums {
  PartsOfSum<T> sums[kMostSums];
  int number;

  __host__ __device__ int64_t blocks() const {
    int64_t all = 0;
    for (int i = 0; i < number; ++i) all += ceil_div(sums[i].count, kSumColumns);
    return all;
  }
};

// Each warp adds up every fourth part of 32 elements; then the four are added.
template <class T>
__device__ __forceinline__ void add_parts(const AttentionSums<T>& sums, int64_t block) {
  FASTSAM_SHARED(T, of_warps, kAttentionWarps * kSumColumns);
  int which = 0;
  for (int64_t blocks = ceil_div(sums.sums[0].count, kSumColumns); block >= blocks;
       blocks = ceil_div(sums.sums[which].count, kSumColumns)) {
    block -= blocks;
    ++which;
  }
  const PartsOfSum<T>& sum = sums.sums[which];
  const int64_t i = block * kSumColumns + lane_of_warp();
  T value = T(0);
  if (i < sum.count) {
#pragma unroll 4
    for (int64_t part = threadIdx.x / kWarp; part < sum.number; part += kAttentionWarps)
      value += sum.parts[part * sum.count + i];
  }
  of_warps[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x >= kSumColumns || i >= sum.count) return;
  for (int warp = 1; warp < kAttentionWarps; ++warp) value += of_warps[warp * kSumColumns + threadIdx.x];
  sum.out[i] = value;
}

template <class S, class Way, int KeyWarps>
class FinishBlock {
  using Shape = MapShape<Way, KeyWarps>;
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  static constexpr int kRows = Shape::kRows, kPitch = Shape::kPitchSlots, kTiles = Shape::kMapTiles,
                       kOutputs = kMapOutputs<Way, KeyWarps, kTiles>;

 public:
  __device__ __forceinline__ FinishBlock(const AttentionBackwardArguments<S, Way>& in, int64_t block)
      : in_(in), channels_(static_cast<int>(in.sizes.channels)) {
    const int64_t tiles = ceil_div(in.sizes.positions, kRows), parts = in.sizes.batch * tiles;
    index_ = static_cast<int>(block / parts);
    entry_ = block % parts / tiles;
    first_ = block % tiles * kRows;
    int most = 0;
    for (int s = 0; s < in.source_count; ++s) most = max(most, in.sources[s].query_channels);
    SharedArena arena;
    tile_ = arena.take<Operand>(padded_depth(most) * kPitch, "dquery or dkeys");
    stage_ = arena.take<Operand>(map_stage_size<Way, KeyWarps, kTiles>(), "weights");
  }

  __device__ __forceinline__ void run() const {
#pragma unroll 1
    for (int first_channel = 0; first_channel < channels_; first_channel += kOutputs) {
      T sum[kTiles][kTileElements];
      clear_tiles(sum);
      for (int s = 0; index_ == 0 && s < in_.source_count; ++s)
        add(in_.space[s].dquery, in_.sources[s].score, in_.sources[s].query_channels, first_channel, sum);
      if (in_.space[index_].dkeys != nullptr) {
        add(in_.space[index_].dkeys, in_.sources[index_].key, in_.sources[index_].query_channels, first_channel, sum);
      }
      store(first_channel, sum);
    }
  }

 private:
  // sum += weight^T from, for the rows of this block and the channels from first_channel on.
  __device__ __forceinline__ void add(Global<const Operand> from, Global<const T> weight, int inputs, int first_channel,
                                      T (&sum)[kTiles][kTileElements]) const {
    const int64_t depth = padded_depth(inputs), padded = padded_positions(in_.sizes.positions);
    __syncthreads();
    start_rows<kRows>(from + (entry_ * depth * padded + first_), padded, static_cast<int>(depth), tile_, kPitch);
    cp_async_commit();
    cp_async_wait<0>();
    add_map<Way, KeyWarps, kTiles>(
        tile_, kPitch, depth, stage_, first_channel,
        [&](int64_t channel, int64_t d) { return matrix_at(weight, inputs, channels_, d, channel); }, sum);
  }

  __device__ __forceinline__ void store(int first_channel, const T (&sum)[kTiles][kTileElements]) const {
    const ColumnMap<S>& dx = in_.dx[index_];
    const ColumnMap<T>& unfinished = in_.space[index_].dx;
    const Global<S> plane = entry_of(dx, in_.grid, entry_);
    const Global<T> before = entry_of(unfinished, in_.grid, entry_);
    const int64_t positions = in_.sizes.positions;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        const int64_t channel = first_channel + (Shape::key_warp() * kTiles + tile) * kTileColumns + Way::column(e),
                      position = first_ + Shape::first_row() + Way::row(e);
        if (channel >= channels_ || position >= positions) continue;
        const int64_t offset = in_.grid.offset(position);
        const T value = before[channel * unfinished.stride_channel + offset] + sum[tile][e];
        plane[channel * dx.stride_channel + offset] = narrow<S>(value);
      }
    }
  }

  const AttentionBackwardArguments<S, Way>& in_;
  int index_, channels_;
  int64_t entry_, first_;
  Shared<Operand> tile_, stage_;
};

// The first `map_blocks` blocks are tiles of the sources to which there is something to add.
template <class S, class Way, int KeyWarps>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_finish_kernel(AttentionBackwardArguments<S, Way> in,
                                     AttentionSums<typename Way::Accumulator> sums, int64_t map_blocks) {
  if constexpr (served_here<S, Way>()) {
    if (blockIdx.x < map_blocks) {
      FinishBlock<S, Way, KeyWarps>(in, blockIdx.x).run();
    } else {
      add_parts(sums, blockIdx.x - map_blocks);
    }
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
