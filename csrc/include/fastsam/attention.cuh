// The attention operators: z = sum over the sources of value R + value_bias in one launch, R being the average of a
// source's columns with softmax weights.
//
// A block has 16 or 64 queries and goes through the source in tiles of positions. A tile is loaded once, as it lies in
// memory, and is key and value: scores, an online softmax (running maximum and sum), and R += P x^T. Scores and weights
// never leave the registers, but for ordinary multiply-adds, which pass the weights through shared memory. The keys are
// the columns themselves or, where there is a key map, their image, made for each tile by the operations of the
// backward pass: so both passes have the same scores to the last bit.
#pragma once

#include "fastsam/attention_softmax.cuh"

namespace fastsam::cuda {

// One map that is attended to: params.h.
template <class S>
struct SourceView {
  ColumnMap<const S> x;
  int query_channels;
  Global<const Wide<S>> score, score_bias, value, key;
};

template <class S>
struct AttentionContext {
  Global<Wide<S>> r, lse, shift;  // nullptr where it is not kept
};

// What the blocks for many channels serve.
constexpr int kMostValueChannels = 256;

// What a block has in shared memory at a time: tiles of x, and at most so many query channels of the key map.
struct ForwardStages {
  int tiles, keys;
};

template <class S>
struct AttentionForwardArguments {
  AttentionSizes sizes;
  WindowGrid grid;
  int source_count;
  bool vectors;
  SourceView<S> sources[kMaxSources];
  AttentionContext<S> contexts[kMaxSources];
  Global<const Wide<S>> value_bias;
  ColumnMap<S> z;  // without data where it is not kept
};

// Elements of shared memory. The three phases of a source use the same bytes in turn.
template <class S, class Way, int KeyWarps, int Group>
struct ForwardShape : BlockShape<KeyWarps> {
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  using BlockShape<KeyWarps>::kRows;
  static constexpr int kSteps = Group == 128 && KeyWarps == 1 && sizeof(Operand) == 2 ? 2 : 1,
                       kColumns = kStreamColumns<Operand>, kWarpColumns = kColumns / KeyWarps / kSteps,
                       kScoreTiles = kWarpColumns / kTileColumns, kGroupTiles = Group / kTileColumns,
                       kQueryTiles = KeyWarps == 1 ? 4 : 2,
                       kValueChannels = KeyWarps == 1 || Group == 64 ? Group : kMostValueChannels,
                       kValueTiles = kValueChannels / kTileColumns / KeyWarps;
  static constexpr int kPitch = Way::pitch(kColumns), kPitchRows = Way::pitch_rows(kRows);
  // Whether keys may be made for a part of the query channels at a time: where others have failed to find room.
  static constexpr bool kKeysInParts = KeyWarps > 1 && Group != 64;
  static constexpr bool kInPlace = sizeof(T) == sizeof(Operand);
  static constexpr int64_t kScratch = kAttentionWarps * Way::template kScratch<kWarpColumns>;

  // depth, query_depth: channels and query channels, padded.
  struct Layout {
    int keys_at_once;
    int64_t query, hidden, query_stage, x, key_weights, keys, slots, r, value_stage;

    __host__ __device__ Layout(int64_t depth, int64_t query_depth, bool has_keys, const ForwardStages& stages)
        : keys_at_once(static_cast<int>(has_keys && stages.keys < query_depth ? stages.keys : query_depth)),
          query(query_depth * kPitchRows),
          hidden(depth * kPitchRows),
          query_stage(map_stage_size<Way, KeyWarps, kQueryTiles>()),
          x(depth * kPitch * stages.tiles),
          key_weights(has_keys ? depth * Way::pitch_rows(keys_at_once) : 0),
          keys(has_keys ? keys_at_once * kPitch : 0),
          slots(slots_size<Way, KeyWarps>(Group)),
          r(kInPlace ? 0 : Group * kPitchRows),
          value_stage(map_stage_size<Way, KeyWarps, kValueTiles>()) {}

    int64_t bytes(int64_t depth) const {
      const auto operands = [](int64_t count) { return shared_bytes<Operand>(count); };
      const int64_t queries = operands(hidden) + operands(query_stage),
                    stream = operands(x) + operands(key_weights) + operands(keys) + operands(kScratch),
                    values = shared_bytes<T>(slots) + operands(r) + operands(value_stage);
      return shared_bytes<T>(depth) + operands(query) + max_of(queries, max_of(stream, values));
    }

    static int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }
  };
};

template <class S, class Way, int KeyWarps, int Group>
class ForwardBlock {
  using Shape = ForwardShape<S, Way, KeyWarps, Group>;
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  using Softmax = OnlineSoftmax<Way, KeyWarps>;
  static constexpr int kRows = Shape::kRows, kPitch = Shape::kPitch, kPitchRows = Shape::kPitchRows;

 public:
  __device__ __forceinline__ ForwardBlock(const AttentionForwardArguments<S>& in, const ForwardStages& stages)
      : in_(in),
        channels_(static_cast<int>(in.sizes.channels)),
        depth_(padded_depth(in.sizes.channels)),
        stages_(stages) {
    const int64_t tiles = ceil_div(in.sizes.positions, kRows);
    entry_ = blockIdx.x / tiles;
    first_ = blockIdx.x % tiles * kRows;
  }

  __device__ __forceinline__ void run() {
    T z[Shape::kValueTiles][kTileElements];
    aggregate(z);
    store_z(z);
  }

 protected:
  // z of all sources without its bias.
  __device__ __forceinline__ void aggregate(T (&z)[Shape::kValueTiles][kTileElements]) {
    clear_tiles(z);
#pragma unroll 1
    for (int s = 0; s < in_.source_count; ++s) {
      begin_source(in_.sources[s]);
#pragma unroll 1
      for (int first_channel = 0; first_channel < channels_; first_channel += Group) {
        T r[Shape::kGroupTiles][kTileElements];
        attend(first_channel, r);
        finish_r(s, first_channel, r);
        add_map<Way, KeyWarps, Shape::kValueTiles>(
            r_, kPitchRows, padded_depth(min(Group, channels_ - first_channel)), value_stage_, 0,
            [&](int64_t output, int64_t channel) {
              return matrix_at(in_.sources[s].value, in_.sizes.value_channels, channels_, output,
                               first_channel + channel);
            },
            z);
      }
    }
  }

  // visit(z with its bias, channel, row of the block, position) for what this thread has of z; the position may be
  // beyond the map.
  template <class Visit>
  __device__ __forceinline__ void for_each_z(const T (&z)[Shape::kValueTiles][kTileElements], Visit visit) const {
#pragma unroll
    for (int tile = 0; tile < Shape::kValueTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        const int64_t channel = (Shape::key_warp() * Shape::kValueTiles + tile) * kTileColumns + Way::column(e);
        const int row = Shape::first_row() + Way::row(e);
        if (channel < in_.sizes.value_channels)
          visit(z[tile][e] + __ldg(in_.value_bias + channel), channel, row, first_ + row);
      }
    }
  }

  __device__ __forceinline__ void store_z(const T (&z)[Shape::kValueTiles][kTileElements]) const {
    if (in_.z.data == nullptr) return;
    const Global<S> plane = entry_of(in_.z, in_.grid, entry_);
    for_each_z(z, [&](T value, int64_t channel, int, int64_t position) {
      if (position < in_.sizes.positions)
        plane[channel * in_.z.stride_channel + in_.grid.offset(position)] = narrow<S>(value);
    });
  }

  const AttentionForwardArguments<S>& in_;
  int channels_;
  int64_t depth_, entry_, first_;

 private:
  // Shares out the memory for a source, and makes its shift and its queries.
  __device__ __forceinline__ void begin_source(const SourceView<S>& source) {
    source_ = &source;
    query_depth_ = padded_depth(source.query_channels);
    const typename Shape::Layout layout(depth_, query_depth_, source.key != nullptr, stages_);
    SharedArena arena;
    shift_ = arena.take<T>(depth_, "shift");
    query_ = arena.take<Operand>(layout.query, "query");
    SharedArena queries = arena, stream = arena, values = arena;
    const Shared<Operand> hidden = queries.take<Operand>(layout.hidden, "hidden"),
                          stage = queries.take<Operand>(layout.query_stage, "weights of the query map");
    x_ = stream.take<Operand>(layout.x, "x");
    keys_at_once_ = layout.keys_at_once;
    key_weights_ = stream.take<Operand>(layout.key_weights, "key weights");
    keys_ = stream.take<Operand>(layout.keys, "keys");
    scratch_ = stream.take<Operand>(Shape::kScratch, "softmax weights") +
               BlockShape<1>::warp() * Way::template kScratch<Shape::kWarpColumns>;
    slots_ = values.take<T>(layout.slots, "R");
    if constexpr (Shape::kInPlace) {
      r_ = slots_;
    } else {
      r_ = values.take<Operand>(layout.r, "R as operand");
    }
    value_stage_ = values.take<Operand>(layout.value_stage, "weights of the value map");

    __syncthreads();  // the source before may still be read
    plane_ = entry_of(source.x, in_.grid, entry_);
    sample_means(plane_, source.x.stride_channel, in_.grid, in_.sizes.positions, channels_, depth_, shift_);
    const MapTile<Way, kRows, S> tile{hidden, kPitchRows, in_.vectors};
    tile.start(entry_of(in_.sources[0].x, in_.grid, entry_), in_.sources[0].x.stride_channel, in_.grid, first_,
               in_.sizes.positions, channels_, depth_);
    cp_async_wait<0>();
    tile.finish(nullptr, depth_);
    make_queries(hidden, stage);
  }

  // query = score h + score_bias.
  __device__ __forceinline__ void make_queries(Shared<Operand> hidden, Shared<Operand> stage) const {
    constexpr int kTiles = Shape::kQueryTiles, kOutputs = kMapOutputs<Way, KeyWarps, kTiles>;
    const SourceView<S>& source = *source_;
#pragma unroll 1
    for (int64_t first = 0; first < query_depth_; first += kOutputs) {
      T sum[kTiles][kTileElements];
      clear_tiles(sum);
      add_map<Way, KeyWarps, kTiles>(
          hidden, kPitchRows, depth_, stage, first,
          [&](int64_t d, int64_t channel) {
            return matrix_at(source.score, source.query_channels, channels_, d, channel);
          },
          sum);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < kTileElements; ++e) {
          const int64_t d = first + (Shape::key_warp() * kTiles + tile) * kTileColumns + Way::column(e);
          T value = sum[tile][e];
          if (d < source.query_channels) value += __ldg(source.score_bias + d);
          if (d < query_depth_) query_[d * kPitchRows + Shape::first_row() + Way::row(e)] = Way::operand(value);
        }
      }
    }
  }

  // One pass over the source: unnormalised R of `Group` channels from first_channel on, and the state of the softmax.
  __device__ __forceinline__ void attend(int first_channel, T (&r)[Shape::kGroupTiles][kTileElements]) {
    __syncthreads();  // queries are there, and what tiles take the place of is no longer read
    clear_tiles(r);
    softmax_.start();
    const int64_t positions = in_.sizes.positions;
    start_tile(0, 0);
    if (source_->key != nullptr) load_key_weights(0);
    int stage = 0;
#pragma unroll 1
    for (int64_t first = 0; first < positions; first += Shape::kColumns) {
      cp_async_wait<0>();
      x_tile(stage).finish(shift_, depth_);
      __syncthreads();
      const Shared<Operand> x = x_tile(stage).tile;
      if (stages_.tiles == 2) {
        stage ^= 1;
        start_tile(stage, first + Shape::kColumns);
      }
      if (!Shape::kKeysInParts && source_->key != nullptr) make_keys(x, 0);
#pragma unroll 1
      for (int step = 0; step < Shape::kSteps; ++step) {
        const int my_column = (Shape::key_warp() * Shape::kSteps + step) * Shape::kWarpColumns;
        T score[Shape::kScoreTiles][kTileElements];
        make_scores(x, my_column, score);
        const int64_t count = positions - first - my_column;
        if (count < Shape::kWarpColumns) hide_columns(static_cast<int>(count), score);
        softmax_.step(score, r);
        add_left<Way>(score, scratch_, x + (first_channel * kPitch + my_column), kPitch, r,
                      static_cast<int>(depth_ - first_channel) / kTileColumns);
      }
      if (stages_.tiles == 1) {
        __syncthreads();
        start_tile(0, first + Shape::kColumns);
      }
    }
  }

  __device__ __forceinline__ MapTile<Way, Shape::kColumns, S> x_tile(int stage) const {
    return {x_ + stage * depth_ * kPitch, kPitch, in_.vectors};
  }

  __device__ __forceinline__ void start_tile(int stage, int64_t first) const {
    if (first >= in_.sizes.positions) return;
    x_tile(stage).start(plane_, source_->x.stride_channel, in_.grid, first, in_.sizes.positions, channels_, depth_);
  }

  // Scores of a warp's columns. Where keys may come in parts they are made on the way, keys_at_once_ query channels at
  // a time.
  __device__ __forceinline__ void make_scores(Shared<Operand> x, int my_column,
                                              T (&score)[Shape::kScoreTiles][kTileElements]) {
    const bool has_keys = source_->key != nullptr;
    const Shared<Operand> keys = (has_keys ? keys_ : x) + my_column;
    clear_tiles(score);
    if constexpr (!Shape::kKeysInParts) {
      Way::template multiply_tn<Shape::kScoreTiles>(query_ + Shape::first_row(), kPitchRows, keys, kPitch,
                                                    static_cast<int>(query_depth_), score);
    } else {
#pragma unroll 1
      for (int first = 0; first < query_depth_; first += keys_at_once_) {
        if (has_keys) make_keys(x, first);
        Way::template multiply_tn<Shape::kScoreTiles>(query_ + (first * kPitchRows + Shape::first_row()), kPitchRows,
                                                      keys, kPitch, keys_at_once_, score);
      }
    }
  }

  // The keys of a tile for keys_at_once_ query channels from `first` on. Where those are not all, their weights come
  // anew from device memory for every tile.
  __device__ __forceinline__ void make_keys(Shared<Operand> x, int first) {
    if (Shape::kKeysInParts && first != first_weight_) {
      load_key_weights(first);
      __syncthreads();
    }
    project_keys(x);
    __syncthreads();
  }

  __device__ __forceinline__ void load_key_weights(int first) {
    const int depth = static_cast<int>(depth_), pitch = Way::pitch_rows(keys_at_once_);
    for (int i = threadIdx.x; i < depth * keys_at_once_; i += kAttentionThreads) {
      const int d = i / depth, channel = i % depth;
      key_weights_[channel * pitch + d] =
          Way::operand(matrix_at(source_->key, source_->query_channels, channels_, first + d, channel));
    }
    first_weight_ = first;
  }

  // keys = key x: the positions of the tile are rows here, 16 a warp; where there are fewer than 64, two warps share
  // rows and take every other tile of columns.
  __device__ __forceinline__ void project_keys(Shared<Operand> x) const {
    constexpr int kRowWarps = Shape::kColumns / kWarpRows, kTiles = kRowWarps == kAttentionWarps ? 2 : 1,
                  kStep = kTiles * kTileColumns * (kAttentionWarps / kRowWarps);
    const int warp = BlockShape<1>::warp(), first_row = warp % kRowWarps * kWarpRows;
    const int pitch = Way::pitch_rows(keys_at_once_);
#pragma unroll 1
    for (int first = warp / kRowWarps * kTiles * kTileColumns; first < keys_at_once_; first += kStep) {
      T sum[kTiles][kTileElements];
      clear_tiles(sum);
      Way::template multiply_tn<kTiles>(x + first_row, kPitch, key_weights_ + first, pitch, static_cast<int>(depth_),
                                        sum);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < kTileElements; ++e)
          keys_[(first + tile * kTileColumns + Way::column(e)) * kPitch + first_row + Way::row(e)] =
              Way::operand(sum[tile][e]);
      }
    }
  }

  // Only the first `count` columns of this warp are positions.
  __device__ __forceinline__ void hide_columns(int count, T (&score)[Shape::kScoreTiles][kTileElements]) const {
#pragma unroll
    for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        if (tile * kTileColumns + Way::column(e) >= count) score[tile][e] = -INFINITY;
      }
    }
  }

  // Adds up what the warps of a row have, divides by the sums of weights, keeps the context, and leaves R with its
  // shift in r_, [channel][row], for the value map.
  __device__ __forceinline__ void finish_r(int s, int first_channel, T (&r)[Shape::kGroupTiles][kTileElements]) {
    FASTSAM_SHARED(T, row_sum, kRows);
    FASTSAM_SHARED(T, warp_maximum, Softmax::kJoined);
    FASTSAM_SHARED(T, warp_sum, Softmax::kJoined);
    softmax_.join(warp_maximum, warp_sum, r);  // its barrier lets R take the place of tiles
    const bool first_lane = Way::column(0) == 0 && Shape::key_warp() == 0;
    for_each_row<Way>([&](int index, int row) {
      if (first_lane) row_sum[Shape::first_row() + row] = softmax_.sum(index);
    });
    sum_over_warps<Way, KeyWarps>(r, slots_);
    __syncthreads();

    const AttentionContext<S>& context = in_.contexts[s];
    const int64_t positions = in_.sizes.positions;
    for_each_part<kRows, 1>(Group, [&](int channel, int row) {
      const int at = channel * kPitchRows + row;
      const T value = slots_[at] / row_sum[row];
      const int64_t of = first_channel + channel, position = first_ + row;
      const bool there = of < channels_;
      if (there && position < positions && context.r != nullptr)
        context.r[(entry_ * channels_ + of) * positions + position] = value;
      T shift = T(0);
      if (there) shift = shift_[of];
      r_[at] = Way::operand(there ? value + shift : T(0));
    });
    if (first_channel > 0 || context.lse == nullptr) return;
    for_each_row<Way>([&](int index, int row) {
      const int64_t position = first_ + Shape::first_row() + row;
      if (first_lane && position < positions) context.lse[entry_ * positions + position] = softmax_.lse(index);
    });
    if (first_ == 0) {
      for (int channel = threadIdx.x; channel < channels_; channel += kAttentionThreads)
        context.shift[entry_ * channels_ + channel] = shift_[channel];
    }
  }

  const SourceView<S>* source_ = nullptr;
  Global<const S> plane_;
  ForwardStages stages_;
  int keys_at_once_ = 0, first_weight_ = 0;  // query channels, of the keys and their weights in shared memory
  int64_t query_depth_ = 0;
  Shared<T> shift_, slots_;
  Shared<Operand> query_, key_weights_, x_, keys_, scratch_, r_, value_stage_;
  Softmax softmax_;
};

// Blocks that are to find room on a multiprocessor: the registers of small ones with few sums do for three.
template <int KeyWarps, int Group>
constexpr int kForwardBlocks = KeyWarps > 1 && Group == 64 ? 3 : 2;

template <class S, class Way, int KeyWarps, int Group>
__global__ void __launch_bounds__(kAttentionThreads, kForwardBlocks<KeyWarps, Group>)
    attention_forward_kernel(AttentionForwardArguments<S> in, ForwardStages stages) {
  if constexpr (served_here<S, Way>()) {
    ForwardBlock<S, Way, KeyWarps, Group>(in, stages).run();
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
