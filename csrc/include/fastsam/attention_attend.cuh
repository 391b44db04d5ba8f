// The second launch of the attention's backward pass: attention_backward.cuh.
#pragma once

#include "fastsam/attention_backward.cuh"

namespace fastsam::cuda {

// Which block does what: both roles of a source, tile by tile, and source by source.
template <class S, class Way, int KeyWarps, int Group>
class AttendBlock {
  using Shape = BackwardShape<Way, KeyWarps, Group>;
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  using Scores = T[Shape::kScoreTiles][kTileElements];
  static constexpr int kRows = Shape::kRows, kPitch = Shape::kPitch, kPitchRows = Shape::kPitchRows,
                       kPitchSlots = Shape::kPitchSlots, kColumns = Shape::kColumns;

 public:
  __device__ __forceinline__ AttendBlock(const AttentionBackwardArguments<S, Way>& in, const BackwardStages& stages)
      : in_(in),
        stages_(stages),
        channels_(static_cast<int>(in.sizes.channels)),
        depth_(static_cast<int>(padded_depth(in.sizes.channels))),
        padded_(padded_positions(in.sizes.positions)) {
    const int64_t tiles = ceil_div(in.sizes.positions, kRows), parts = in.sizes.batch * tiles;
    part_ = blockIdx.x % parts;
    index_ = static_cast<int>(blockIdx.x / parts % in.source_count);
    rows_are_keys_ = blockIdx.x / parts >= in.source_count;
    entry_ = part_ / tiles;
    first_ = part_ % tiles * kRows;
    query_channels_ = in.sources[index_].query_channels;
    query_depth_ = static_cast<int>(padded_depth(query_channels_));
    has_keys_ = in.sources[index_].key != nullptr;
    const BackwardSpace<Way>& space = in.space[index_];
    const int64_t of_entry = entry_ * padded_, columns = of_entry * depth_, of_queries = of_entry * query_depth_;
    const Side queries = {space.query + of_queries, space.dr + columns, query_depth_};
    Side keys = {space.columns + columns, space.columns + columns, 0};
    if (has_keys_) {
      keys.scores = space.keys + of_queries;
      keys.own_depth = query_depth_;
    }
    fixed_ = rows_are_keys_ ? keys : queries;
    stream_ = rows_are_keys_ ? queries : keys;
    rows_take_turns_ = KeyWarps > 1 && stages.rows_take_turns && fixed_.own_depth > 0;

    SharedArena arena;
    fixed_tile_ = arena.take<Operand>(Shape::rows_depth(depth_, fixed_.own_depth, stages) * kPitchRows, "rows");
    SharedArena slots = arena;
    slots_ = slots.take<T>(slots_size<Way, KeyWarps>(Group), "sums");
    stream_tile_ = arena.take<Operand>(stages.tiles * (stream_.own_depth + depth_) * kPitch, "columns");
    column_terms_ = arena.take<T>(stages.tiles * 2 * kColumns, "lse and delta");
    scratch_ = arena.take<Operand>(Shape::kScratch, "softmax weights") +
               BlockShape<1>::warp() * Way::template kScratch<Shape::kWarpColumns>;
  }

  __device__ __forceinline__ void run() {
    if (rows_are_keys_) {
      sum_keys();
    } else {
      sum_queries();
    }
  }

 private:
  // Operands of one side, of this entry: those of the scores and those of dP, which are the same where own_depth is 0.
  struct Side {
    Global<const Operand> scores, dweights;
    int own_depth;
  };

  // Starts to copy `Columns` positions of both operands of a side: those of the scores lie first.
  template <int Columns>
  __device__ __forceinline__ void start_side(const Side& side, int64_t first, Shared<Operand> to, int pitch) const {
    start_rows<Columns>(side.scores + first, padded_, side.own_depth, to, pitch);
    start_rows<Columns>(side.dweights + first, padded_, depth_, to + side.own_depth * pitch, pitch);
  }

  // Starts to copy what a tile of columns is computed with: both operands of the columns, lse and delta where those are
  // queries, and of rows that take turns the operand of the scores.
  __device__ __forceinline__ void start_stream(int stage, int64_t first) const {
    if (first >= in_.sizes.positions) return;
    if (rows_take_turns_) start_rows<kRows>(fixed_.scores + first_, padded_, fixed_.own_depth, fixed_tile_, kPitchRows);
    start_side<kColumns>(stream_, first, stream_at(stage), kPitch);
    if (rows_are_keys_) {
      const BackwardSpace<Way>& space = in_.space[index_];
      for (int i = threadIdx.x; i < 2 * kColumns; i += kAttentionThreads) {
        const Global<const T> from = i < kColumns ? space.lse : space.delta;
        cp_async<sizeof(T)>(terms_at(stage) + i, from + (entry_ * padded_ + first + i % kColumns));
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ Shared<Operand> stream_at(int stage) const {
    return stream_tile_ + stage * (stream_.own_depth + depth_) * kPitch;
  }
  __device__ __forceinline__ Shared<T> terms_at(int stage) const { return column_terms_ + stage * 2 * kColumns; }

  // One pass over all columns. visit(P, dE, operand of the scores, operand of dP) for each tile of them.
  template <class Visit>
  __device__ __forceinline__ void stream(Visit visit) const {
    const int64_t positions = in_.sizes.positions;
    __syncthreads();  // what tiles take the place of is no longer read
    if (!rows_take_turns_) start_side<kRows>(fixed_, first_, fixed_tile_, kPitchRows);
    start_stream(0, 0);
    T lse[Way::kLaneRows] = {}, delta[Way::kLaneRows] = {};
    if (!rows_are_keys_) {
      for_each_row<Way>([&](int index, int row) {
        const int64_t at = entry_ * padded_ + first_ + Shape::first_row() + row;
        lse[index] = in_.space[index_].lse[at];
        delta[index] = in_.space[index_].delta[at];
      });
    }
    int stage = 0;
#pragma unroll 1
    for (int64_t first = 0; first < positions; first += kColumns) {
      cp_async_wait<0>();
      __syncthreads();
      const Shared<Operand> scores = stream_at(stage), dweights = scores + stream_.own_depth * kPitch;
      const Shared<T> terms = terms_at(stage);
      if (stages_.tiles == 2) {
        stage ^= 1;
        start_stream(stage, first + kColumns);
      }
#pragma unroll 1
      for (int step = 0; step < Shape::kSteps; ++step) {
        const int my_column = (Shape::key_warp() * Shape::kSteps + step) * Shape::kWarpColumns;
        Scores p, ds;
        score(scores + my_column, dweights + my_column, p, ds);
        softmax_gradient(lse, delta, terms + my_column, p, ds);
        if (first + kColumns > positions || first_ + kRows > positions) hide(positions - first - my_column, p, ds);
        visit(p, ds, scores + my_column, dweights + my_column);
      }
      if (stages_.tiles == 1) {
        __syncthreads();
        start_stream(0, first + kColumns);
      }
    }
  }

  // p = E and ds = dP.
  __device__ __forceinline__ void score(Shared<Operand> scores, Shared<Operand> dweights, Scores& p, Scores& ds) const {
    const Shared<Operand> rows = fixed_tile_ + Shape::first_row();
    clear_tiles(p);
    Way::template multiply_tn<Shape::kScoreTiles>(rows, kPitchRows, scores, kPitch, has_keys_ ? query_depth_ : depth_,
                                                  p);
    clear_tiles(ds);
    if (rows_take_turns_) {
      __syncthreads();
      start_rows<kRows>(fixed_.dweights + first_, padded_, depth_, fixed_tile_, kPitchRows);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
    }
    const int own_rows = rows_take_turns_ ? 0 : fixed_.own_depth;
    Way::template multiply_tn<Shape::kScoreTiles>(rows + own_rows * kPitchRows, kPitchRows, dweights, kPitch, depth_,
                                                  ds);
  }

  // P = exp(E - lse) and dE = P (dP - delta), where p is E and ds is dP.
  __device__ __forceinline__ void softmax_gradient(const T (&lse)[Way::kLaneRows], const T (&delta)[Way::kLaneRows],
                                                   Shared<T> terms, Scores& p, Scores& ds) const {
#pragma unroll
    for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        T my_lse = lse[Way::row_index(e)], my_delta = delta[Way::row_index(e)];
        if (rows_are_keys_) {
          my_lse = terms[tile * kTileColumns + Way::column(e)];
          my_delta = terms[kColumns + tile * kTileColumns + Way::column(e)];
        }
        p[tile][e] = Way::exponential(p[tile][e] - my_lse);
        ds[tile][e] = p[tile][e] * (ds[tile][e] - my_delta);
      }
    }
  }

  // Leaves out rows and columns beyond the map; `columns` of this warp's are in it.
  __device__ __forceinline__ void hide(int64_t columns, Scores& p, Scores& ds) const {
#pragma unroll
    for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        const bool there = tile * kTileColumns + Way::column(e) < columns &&
                           first_ + Shape::first_row() + Way::row(e) < in_.sizes.positions;
        if (there) continue;
        p[tile][e] = T(0);
        ds[tile][e] = T(0);
      }
    }
  }

  // sum += p b^T for the rows of b from first_row on, of `rows` in all. Those of queries and keys are mostly one step
  // of depth, two tiles, for which nothing is tested on the way either.
  template <int Tiles>
  __device__ __forceinline__ void add(const Scores& p, Shared<Operand> b, int first_row, int rows,
                                      T (&sum)[Tiles][kTileElements]) const {
    constexpr int kStep = kDepthStep / kTileColumns;
    const Shared<Operand> my_b = b + first_row * kPitch;
    const int tiles = (rows - first_row) / kTileColumns;
    if (tiles == kStep) {
      Way::template multiply_left<Shape::kScoreTiles, Tiles>(p, scratch_, my_b, kPitch, sum, kStep);
    } else {
      add_left<Way>(p, scratch_, my_b, kPitch, sum, tiles);
    }
  }

  // Rows are queries: dquery, and the parts of dscore and dscore_bias.
  __device__ __forceinline__ void sum_queries() const {
    const BackwardSpace<Way>& space = in_.space[index_];
    const int outputs = has_keys_ ? query_depth_ : depth_;
#pragma unroll 1
    for (int first_output = 0; first_output < outputs; first_output += Group) {
      T sum[Shape::kGroupTiles][kTileElements];
      clear_tiles(sum);
      stream([&](const Scores&, const Scores& ds, Shared<Operand> keys, Shared<Operand>) {
        add(ds, keys, first_output, outputs, sum);
      });
      collect(sum);
      for_each_part<kRows, 1>(min(Group, outputs - first_output), [&](int i, int row) {
        space.dquery[operand_at(outputs, first_output + i, row)] = Way::operand(slots_[i * kPitchSlots + row]);
      });
      for (int i = threadIdx.x; i < min(Group, query_channels_ - first_output); i += kAttentionThreads) {
        // Sums of every eighth row first, which rounds less than one long sum.
        T sums[8] = {};
#pragma unroll
        for (int row = 0; row < kRows; ++row) sums[row % 8] += slots_[i * kPitchSlots + row];
        const T bias = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        space.dscore_bias[part_ * query_channels_ + first_output + i] = bias;
      }
    }
    const Shared<Operand> dquery = load_rows(space.dquery, outputs), hidden = dquery + outputs * kPitchRows;
    const MapTile<Way, kRows, S> tile{hidden, kPitchRows, in_.vectors};
    tile.start(entry_of(in_.sources[0].x, in_.grid, entry_), in_.sources[0].x.stride_channel, in_.grid, first_,
               in_.sizes.positions, channels_, depth_);
    cp_async_wait<0>();
    tile.finish(nullptr, depth_);
    __syncthreads();
    store_outer<Way, kRows, kPitchRows>(dquery, hidden, query_channels_, channels_,
                                        space.dscore + part_ * query_channels_ * channels_);
  }

  // Rows are keys: dx and, where there is a key map, dkeys and the part of dkey.
  __device__ __forceinline__ void sum_keys() const {
    const int groups = static_cast<int>(
        max(ceil_div(channels_, Group), has_keys_ ? ceil_div(query_channels_, Shape::kKeyGroup) : int64_t{0}));
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      T sum[Shape::kGroupTiles][kTileElements];
      clear_tiles(sum);
      if (has_keys_) {
        sum_projected_keys(group, sum);
      } else {
        stream([&](const Scores& p, const Scores& ds, Shared<Operand> queries, Shared<Operand> dr) {
          add(p, dr, group * Group, depth_, sum);
          add(ds, queries, group * Group, depth_, sum);
        });
        collect(sum);
      }
      store_dx(group * Group);
    }
    if (!has_keys_) return;
    const BackwardSpace<Way>& space = in_.space[index_];
    const Shared<Operand> dkeys = load_rows(space.dkeys, query_depth_), columns = dkeys + query_depth_ * kPitchRows;
    start_rows<kRows>(fixed_.dweights + first_, padded_, depth_, columns, kPitchRows);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    store_outer<Way, kRows, kPitchRows>(dkeys, columns, query_channels_, channels_,
                                        space.dkey + part_ * query_channels_ * channels_);
  }

  // dkeys of a group, into the workspace, and then dx of a group, into slots_.
  __device__ __forceinline__ void sum_projected_keys(int group, T (&sum)[Shape::kGroupTiles][kTileElements]) const {
    const BackwardSpace<Way>& space = in_.space[index_];
    const int first_key = group * Shape::kKeyGroup;
    T of_keys[Shape::kKeyTiles][kTileElements];
    clear_tiles(of_keys);
    stream([&](const Scores& p, const Scores& ds, Shared<Operand> queries, Shared<Operand> dr) {
      add(p, dr, group * Group, depth_, sum);
      add(ds, queries, first_key, query_depth_, of_keys);
    });
    collect(of_keys);
    for_each_part<kRows, 1>(max(0, min(Shape::kKeyGroup, query_depth_ - first_key)), [&](int i, int row) {
      space.dkeys[operand_at(query_depth_, first_key + i, row)] = Way::operand(slots_[i * kPitchSlots + row]);
    });
    collect(sum);
  }

  // slots_[output][row] = sum, over all warps. With barriers before and after.
  template <int Tiles>
  __device__ __forceinline__ void collect(T (&sum)[Tiles][kTileElements]) const {
    __syncthreads();
    sum_over_warps<Way, KeyWarps>(sum, slots_);
    __syncthreads();
  }

  __device__ __forceinline__ void store_dx(int first_channel) const {
    const ColumnMap<T>& unfinished = in_.space[index_].dx;
    if (unfinished.data != nullptr) {
      store_group(unfinished, first_channel);
    } else {
      store_group(in_.dx[index_], first_channel);
    }
  }

  // A group of channels from slots_.
  template <class E>
  __device__ __forceinline__ void store_group(const ColumnMap<E>& to, int first_channel) const {
    const Global<E> plane = entry_of(to, in_.grid, entry_);
    for_each_part<kRows, 1>(min(Group, channels_ - first_channel), [&](int i, int row) {
      const int64_t channel = first_channel + i, position = first_ + row;
      if (position < in_.sizes.positions)
        plane[channel * to.stride_channel + in_.grid.offset(position)] = narrow<E>(slots_[i * kPitchSlots + row]);
    });
  }

  // The place of a row of this block in an operand of the workspace.
  __device__ __forceinline__ int64_t operand_at(int64_t channels, int64_t channel, int row) const {
    return (entry_ * channels + channel) * padded_ + first_ + row;
  }

  // Starts to copy the rows of an operand that this block has just written, to where there is room for `depth_` more
  // channels behind it.
  __device__ __forceinline__ Shared<Operand> load_rows(Global<const Operand> from, int channels) const {
    SharedArena arena;
    const Shared<Operand> tile = arena.take<Operand>((channels + depth_) * kPitchRows, "gradients of the rows");
    __syncthreads();
    start_rows<kRows>(from + operand_at(channels, 0, 0), padded_, channels, tile, kPitchRows);
    cp_async_commit();
    return tile;
  }

  const AttentionBackwardArguments<S, Way>& in_;
  BackwardStages stages_;
  int channels_, depth_, query_channels_, query_depth_, index_;
  int64_t padded_, part_, entry_, first_;
  bool rows_are_keys_, has_keys_, rows_take_turns_;
  Side fixed_, stream_;
  Shared<Operand> fixed_tile_, stream_tile_, scratch_;
  Shared<T> slots_, column_terms_;
};

template <class S, class Way, int KeyWarps, int Group>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_attend_kernel(AttentionBackwardArguments<S, Way> in, BackwardStages stages) {
  if constexpr (served_here<S, Way>()) {
    AttendBlock<S, Way, KeyWarps, Group>(in, stages).run();
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
