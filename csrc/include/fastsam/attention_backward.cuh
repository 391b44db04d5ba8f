// Gradients of the attention operators in three launches. Equations: fastsam/ops/_attention/eager.py, `backward`.
//
//   1. prepare  for tiles of positions: the columns less their shift, keys, queries, dR = value^T dz and delta, as
//               operands, which the second launch reads again and again; parts of dvalue
//   2. attend   two roles of blocks. Rows are queries and the source streams past: dquery, and parts of dscore. Or rows
//               are keys and the queries stream past: dx and dkeys, and parts of dkey. P is made again, from the
//               log-sum-exps, and never leaves the registers
//   3. finish   (attention_finish.cuh) what flows back through the query and the key map, and the sums of the parts
//
// Both roles of the second launch have the same loop: with fixed operands A (queries and dR, or keys and columns) and
// streaming ones B (the other two), E = A1^T B1, dP = A2^T B2, P = exp(E - lse), dE = P (dP - delta), and then the sum
// dE B1^T and, where rows are keys, P B2^T. There are no atomics and all sums are in a fixed order.
#pragma once

#include "fastsam/attention.cuh"

namespace fastsam::cuda {

constexpr int kPositionPadding = 64;

__host__ __device__ constexpr int64_t padded_positions(int64_t positions) {
  return (positions + kPositionPadding - 1) / kPositionPadding * kPositionPadding;
}

// What goes from launch to launch for one source. Operands are (entry, channels padded, positions padded).
template <class Way>
struct BackwardSpace {
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  Global<Operand> columns, query, dr, dquery;
  Global<Operand> keys, dkeys;  // where there is a key map, else nullptr
  Global<T> lse, delta;         // (entry, positions padded)
  ColumnMap<T> dx;              // what the third launch adds to; without data where it has nothing to add
  Global<T> dvalue;             // parts, one a block of the first launch: (Cz, C)
  Global<T> dscore, dkey;       // parts, one a block of the second launch: (D, C)
  Global<T> dscore_bias;        // (D)
};

template <class S, class Way>
struct AttentionBackwardArguments {
  using T = typename Way::Accumulator;
  AttentionSizes sizes;
  WindowGrid grid;
  int source_count;
  bool vectors;
  SourceView<S> sources[kMaxSources];
  ColumnMap<const S> dz;
  Global<const T> r[kMaxSources], lse[kMaxSources], shift[kMaxSources];
  ColumnMap<S> dx[kMaxSources];
  BackwardSpace<Way> space[kMaxSources];
  Global<T> dvalue_bias;  // parts, one a block of the first launch for source 0: (Cz)
};

// What a block of the second launch has in shared memory at a time: tiles of columns, and both operands of its rows or,
// in turn, one of them.
struct BackwardStages {
  int tiles;
  bool rows_take_turns;
};

// The blocks of the first and the third launch, which compute maps of the channels of their rows.
template <class Way, int KeyWarps>
struct MapShape : BlockShape<KeyWarps> {
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  using BlockShape<KeyWarps>::kRows;
  static constexpr int kMapTiles = KeyWarps == 1 ? 8 : 2;
  // A tile of 16 rows does without padding: it saves what 128 channels lack on 6.1, and products along it are short.
  static constexpr int kPitchRows = KeyWarps == 1 ? Way::pitch(kRows) : Way::pitch_rows(kRows),
                       kPitchSlots = Way::pitch_rows(kRows);

  static int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

  static int64_t prepare_bytes(int64_t channels, int64_t value_channels) {
    const int64_t depth = padded_depth(channels), wide = larger(depth, padded_depth(value_channels));
    return shared_bytes<T>(depth) + shared_bytes<Operand>(wide * kPitchRows) +
           shared_bytes<Operand>(depth * kPitchRows) +
           shared_bytes<Operand>(map_stage_size<Way, KeyWarps, kMapTiles>());
  }

  static int64_t finish_bytes(int64_t query_channels) {
    return shared_bytes<Operand>(padded_depth(query_channels) * kPitchSlots) +
           shared_bytes<Operand>(map_stage_size<Way, KeyWarps, kMapTiles>());
  }
};

// Those of the second launch, with sums of so many channels at a time.
template <class Way, int KeyWarps, int Group>
struct BackwardShape : MapShape<Way, KeyWarps> {
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  using Rows = MapShape<Way, KeyWarps>;
  using Rows::kPitchRows, Rows::kRows, Rows::larger;
  // In how many steps a warp computes with its columns of a tile: 64 at once need too many registers beside the sums.
  static constexpr int kSteps = sizeof(Operand) == 2 && KeyWarps == 1 ? Group / 32 : 1;
  static constexpr int kColumns = kStreamColumns<Operand>, kWarpColumns = kColumns / KeyWarps / kSteps,
                       kScoreTiles = kWarpColumns / kTileColumns, kGroupTiles = Group / kTileColumns, kKeyGroup = 32,
                       kKeyTiles = kKeyGroup / kTileColumns, kPitch = Way::pitch(kColumns);
  static constexpr int64_t kScratch = kAttentionWarps * Way::template kScratch<kWarpColumns>;

  // The two roles have the same operands, fixed in one and streaming in the other. Without a key map the columns are
  // the keys.
  static int64_t attend_bytes(int64_t channels, int64_t query_channels, bool has_keys, const BackwardStages& stages) {
    const int64_t depth = padded_depth(channels), query_depth = padded_depth(query_channels),
                  key_depth = has_keys ? query_depth : 0;
    const auto rows = [&](int64_t own_depth) {
      return shared_bytes<Operand>(rows_depth(depth, own_depth, stages) * kPitchRows);
    };
    const auto columns = [&](int64_t own_depth) {
      const int64_t stream = shared_bytes<Operand>(stages.tiles * (depth + own_depth) * kPitch) +
                             shared_bytes<T>(stages.tiles * 2 * kColumns) + shared_bytes<Operand>(kScratch);
      return larger(stream, shared_bytes<T>(slots_size<Way, KeyWarps>(Group)));
    };
    return larger(rows(query_depth) + columns(key_depth), rows(key_depth) + columns(query_depth));
  }

  // Channels of the operands of the rows that are in shared memory at a time: `depth` those of dP, `own_depth` those of
  // the scores.
  static __host__ __device__ int64_t rows_depth(int64_t depth, int64_t own_depth, const BackwardStages& stages) {
    if (!stages.rows_take_turns) return depth + own_depth;
    return depth < own_depth ? own_depth : depth;
  }
};

// out (rows, columns) = a b^T over the kRows positions of a block, a[row][position] and b[column][position]: tiles of
// 16 x 64 are shared out among the warps.
template <class Way, int Rows, int kPitch, class T>
__device__ __forceinline__ void store_outer(Shared<typename Way::Operand> a, Shared<typename Way::Operand> b,
                                            int64_t rows, int64_t columns, Global<T> out) {
  constexpr int kTiles = 8;
  const int row_tiles = static_cast<int>(padded_depth(rows)) / kWarpRows,
            all_columns = static_cast<int>(padded_depth(columns)),
            column_tiles = (all_columns + kTiles * kTileColumns - 1) / (kTiles * kTileColumns);
#pragma unroll 1
  for (int i = BlockShape<1>::warp(); i < row_tiles * column_tiles; i += kAttentionWarps) {
    const int row = i / column_tiles * kWarpRows, column = i % column_tiles * kTiles * kTileColumns;
    T sum[kTiles][kTileElements];
    clear_tiles(sum);
    Way::template multiply_nt<kTiles>(a + row * kPitch, kPitch, b + column * kPitch, kPitch, Rows, sum,
                                      (all_columns - column) / kTileColumns);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        const int64_t at_row = row + Way::row(e), at_column = column + tile * kTileColumns + Way::column(e);
        if (at_row < rows && at_column < columns) out[at_row * columns + at_column] = sum[tile][e];
      }
    }
  }
}

template <class S, class Way, int KeyWarps>
class PrepareBlock {
  using Shape = MapShape<Way, KeyWarps>;
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  static constexpr int kRows = Shape::kRows, kPitch = Shape::kPitchRows;

 public:
  __device__ __forceinline__ explicit PrepareBlock(const AttentionBackwardArguments<S, Way>& in) : in_(in) {
    const int64_t tiles = padded_positions(in.sizes.positions) / kRows;
    part_ = blockIdx.x % (in.sizes.batch * tiles);
    index_ = static_cast<int>(blockIdx.x / (in.sizes.batch * tiles));
    entry_ = part_ / tiles;
    first_ = part_ % tiles * kRows;
    SharedArena arena;
    shift_ = arena.take<T>(padded_depth(in.sizes.channels), "shift");
    const int64_t depth = padded_depth(in.sizes.channels), value_depth = padded_depth(in.sizes.value_channels);
    in_tile_ = arena.take<Operand>((depth < value_depth ? value_depth : depth) * kPitch, "inputs");
    r_ = arena.take<Operand>(depth * kPitch, "R");
    stage_ = arena.take<Operand>(map_stage_size<Way, KeyWarps, Shape::kMapTiles>(), "weights");
  }

  __device__ __forceinline__ void run() {
    const AttentionSizes& sizes = in_.sizes;
    const SourceView<S>& source = in_.sources[index_];
    const BackwardSpace<Way>& space = in_.space[index_];
    const int channels = static_cast<int>(sizes.channels), query_channels = source.query_channels;
    const int64_t depth = padded_depth(channels), query_depth = padded_depth(query_channels),
                  value_depth = padded_depth(sizes.value_channels);
    for (int channel = threadIdx.x; channel < depth; channel += kAttentionThreads) {
      T shift = T(0);
      if (channel < channels) shift = __ldg(in_.shift[index_] + (entry_ * channels + channel));
      shift_[channel] = shift;
    }
    __syncthreads();

    load(source.x, channels, depth, shift_);
    __syncthreads();
    for_each_part<kRows, 1>(depth, [&](int channel, int row) {
      Operand value = in_tile_[channel * kPitch + row];
      if (first_ + row >= sizes.positions) value = narrow<Operand>(T(0));
      space.columns[at(depth, channel, row)] = value;
    });
    if (source.key != nullptr) {
      map(
          depth, query_depth,
          [&](int64_t d, int64_t channel) { return matrix_at(source.key, query_channels, channels, d, channel); },
          [&](int64_t d, int row, T value) { space.keys[at(query_depth, d, row)] = Way::operand(value); });
    }

    __syncthreads();
    load(in_.sources[0].x, channels, depth, nullptr);
    map(
        depth, query_depth,
        [&](int64_t d, int64_t channel) { return matrix_at(source.score, query_channels, channels, d, channel); },
        [&](int64_t d, int row, T value) {
          if (d < query_channels) value += __ldg(source.score_bias + d);
          space.query[at(query_depth, d, row)] = Way::operand(value);
        });

    __syncthreads();
    load(in_.dz, static_cast<int>(sizes.value_channels), value_depth, nullptr);
    load_r(depth);
    map(
        value_depth, depth,
        [&](int64_t channel, int64_t output) {
          return matrix_at(source.value, sizes.value_channels, channels, output, channel);
        },
        [&](int64_t channel, int row, T value) { space.dr[at(depth, channel, row)] = Way::operand(value); });
    store_rows();
    store_outer<Way, kRows, kPitch>(in_tile_, r_, sizes.value_channels, channels,
                                    space.dvalue + part_ * sizes.value_channels * channels);
    if (index_ == 0) sum_dz();
  }

 private:
  // The place of a row of this block in an operand of the workspace with so many channels.
  __device__ __forceinline__ int64_t at(int64_t channels, int64_t channel, int row) const {
    return (entry_ * channels + channel) * padded_positions(in_.sizes.positions) + first_ + row;
  }

  // R of the context: less its shift, as it came out of the forward pass.
  __device__ __forceinline__ T r_at(int64_t channel, int row) const {
    T value = T(0);
    if (channel < in_.sizes.channels && first_ + row < in_.sizes.positions)
      value = __ldg(in_.r[index_] + ((entry_ * in_.sizes.channels + channel) * in_.sizes.positions + first_ + row));
    return value;
  }

  __device__ __forceinline__ void load(const ColumnMap<const S>& map, int channels, int64_t depth,
                                       Shared<T> shift) const {
    const MapTile<Way, kRows, S> tile{in_tile_, kPitch, in_.vectors};
    tile.start(entry_of(map, in_.grid, entry_), map.stride_channel, in_.grid, first_, in_.sizes.positions, channels,
               depth);
    cp_async_wait<0>();
    tile.finish(shift, depth);
  }

  __device__ __forceinline__ void load_r(int64_t depth) const {
    for_each_part<kRows, 1>(depth, [&](int channel, int row) {
      const T shift = shift_[channel];
      T value = r_at(channel, row);
      if (first_ + row < in_.sizes.positions) value += shift;
      r_[channel * kPitch + row] = Way::operand(value);
    });
  }

  // use(output, row, value) for the outputs of a map of the tile; starts with a barrier.
  template <class Weight, class Use>
  __device__ __forceinline__ void map(int64_t depth, int64_t outputs, Weight weight, Use use) const {
    constexpr int kTiles = Shape::kMapTiles, kOutputs = kMapOutputs<Way, KeyWarps, kTiles>;
#pragma unroll 1
    for (int64_t first = 0; first < outputs; first += kOutputs) {
      T sum[kTiles][kTileElements];
      clear_tiles(sum);
      add_map<Way, KeyWarps, kTiles>(in_tile_, kPitch, depth, stage_, first, weight, sum);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < kTileElements; ++e) {
          const int64_t output = first + (Shape::key_warp() * kTiles + tile) * kTileColumns + Way::column(e);
          const int row = Shape::first_row() + Way::row(e);
          if (output < outputs) use(output, row, sum[tile][e]);
        }
      }
    }
  }

  // delta, and lse: infinite beyond the map, so that P is 0 there. Terms are added one channel after the other, as
  // ordinary multiply-adds do for dP: where one key takes all of the softmax both are the same to the last bit, and
  // nothing reaches the scores.
  __device__ __forceinline__ void store_rows() const {
    __syncthreads();
    const BackwardSpace<Way>& space = in_.space[index_];
    const int64_t positions = in_.sizes.positions, depth = padded_depth(in_.sizes.channels);
    for (int row = threadIdx.x; row < kRows; row += kAttentionThreads) {
      const int64_t to = entry_ * padded_positions(positions) + first_ + row;
      T sum = T(0), lse = INFINITY;
#pragma unroll 8
      for (int64_t channel = 0; channel < in_.sizes.channels; ++channel)
        sum += widen(space.dr[at(depth, channel, row)]) * r_at(channel, row);
      if (first_ + row < positions) lse = __ldg(in_.lse[index_] + (entry_ * positions + first_ + row));
      space.delta[to] = sum;
      space.lse[to] = lse;
    }
  }

  // The part of dvalue_bias, from dz as it is and not from the operands.
  __device__ __forceinline__ void sum_dz() const {
    const Global<const S> plane = entry_of(in_.dz, in_.grid, entry_);
    const int64_t channels = in_.sizes.value_channels;
    for (int64_t channel = threadIdx.x / kWarp; channel < channels; channel += kAttentionWarps) {
      T sum = T(0);
      for (int row = lane_of_warp(); row < kRows; row += kWarp) {
        if (first_ + row < in_.sizes.positions)
          sum += widen(__ldg(plane + (channel * in_.dz.stride_channel + in_.grid.offset(first_ + row))));
      }
      sum = sum_of_warp(sum);
      if (lane_of_warp() == 0) in_.dvalue_bias[part_ * channels + channel] = sum;
    }
  }

  const AttentionBackwardArguments<S, Way>& in_;
  int64_t part_, entry_, first_;
  int index_;
  Shared<T> shift_;
  Shared<Operand> in_tile_, r_, stage_;
};

template <class S, class Way, int KeyWarps>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_prepare_kernel(AttentionBackwardArguments<S, Way> in) {
  if constexpr (served_here<S, Way>()) {
    PrepareBlock<S, Way, KeyWarps>(in).run();
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
