// A whole step of SAM with 1x1 gates in one launch: the attention's forward pass, and on its z, which need not leave
// the block, and the hidden state the gates of separable_gates.cuh without a depthwise filter.
#pragma once

#include "fastsam/attention.cuh"
#include "fastsam/separable_gates.cuh"

namespace fastsam::cuda {

template <class S>
struct AttentionGatesArguments {
  AttentionForwardArguments<S> attention;
  ColumnMap<const S> m;
  Global<const Wide<S>> pointwise, bias;  // (3C, Cz + C), (3C) or nullptr
  ColumnMap<S> h_hat, m_new;
};

template <class S, class Way, int KeyWarps, int Group>
class GatedBlock : public ForwardBlock<S, Way, KeyWarps, Group> {
  using Base = ForwardBlock<S, Way, KeyWarps, Group>;
  using Shape = ForwardShape<S, Way, KeyWarps, Group>;
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;
  using Base::channels_, Base::depth_, Base::entry_, Base::first_;
  // Each gate has so many tiles of channels a warp.
  static constexpr int kTiles = KeyWarps == 1 ? 4 : 2, kAllTiles = kGates * kTiles,
                       kChannels = kMapOutputs<Way, KeyWarps, kTiles>;

 public:
  // Elements of shared memory for z and the hidden state, and their bytes with the weights'.
  static __host__ __device__ int64_t tile_size(int64_t channels) { return padded_depth(channels) * Shape::kPitchRows; }
  static int64_t bytes(int64_t channels, int64_t value_channels) {
    return shared_bytes<Operand>(tile_size(value_channels)) + shared_bytes<Operand>(tile_size(channels)) +
           shared_bytes<Operand>(map_stage_size<Way, KeyWarps, kAllTiles>());
  }

  __device__ __forceinline__ GatedBlock(const AttentionGatesArguments<S>& in, const ForwardStages& stages)
      : Base(in.attention, stages), gates_(in), value_channels_(static_cast<int>(in.attention.sizes.value_channels)) {}

  __device__ __forceinline__ void run() {
    {
      T z[Shape::kValueTiles][kTileElements];
      this->aggregate(z);
      this->store_z(z);
      share_inputs(z);
    }
#pragma unroll 1
    for (int first = 0; first < channels_; first += kChannels) {
      T sum[kAllTiles][kTileElements];
      clear_tiles(sum);
      add_gates(z_, 0, value_channels_, first, sum);
      add_gates(hidden_, value_channels_, channels_, first, sum);
      update_memory(first, sum);
    }
  }

 private:
  // z, as it would be stored, and the hidden state as operands in shared memory.
  __device__ __forceinline__ void share_inputs(const T (&z)[Shape::kValueTiles][kTileElements]) {
    SharedArena arena;
    z_ = arena.take<Operand>(tile_size(value_channels_), "z");
    hidden_ = arena.take<Operand>(tile_size(channels_), "hidden");
    stage_ = arena.take<Operand>(map_stage_size<Way, KeyWarps, kAllTiles>(), "weights of the gates");
    __syncthreads();  // R and the value map are no longer read
    const MapTile<Way, Shape::kRows, S> tile{hidden_, Shape::kPitchRows, gates_.attention.vectors};
    const AttentionForwardArguments<S>& in = gates_.attention;
    tile.start(entry_of(in.sources[0].x, in.grid, entry_), in.sources[0].x.stride_channel, in.grid, first_,
               in.sizes.positions, channels_, depth_);
    for_each_part<Shape::kRows, 1>(padded_depth(value_channels_) - value_channels_, [&](int channel, int row) {
      z_[(value_channels_ + channel) * Shape::kPitchRows + row] = narrow<Operand>(T(0));
    });
    this->for_each_z(z, [&](T value, int64_t channel, int row, int64_t) {
      z_[channel * Shape::kPitchRows + row] = Way::operand(widen(narrow<S>(value)));
    });
    cp_async_wait<0>();
    tile.finish(nullptr, depth_);
  }

  // Adds the inputs [first_input, first_input + inputs) of [z; h] to the gates of the channels from `first` on. The
  // tiles of a warp are those of gate i, then g, then o, for the same channels.
  __device__ __forceinline__ void add_gates(Shared<Operand> in, int first_input, int inputs, int first,
                                            T (&sum)[kAllTiles][kTileElements]) const {
    const int64_t all_inputs = value_channels_ + channels_;
    add_map<Way, KeyWarps, kAllTiles>(
        in, Shape::kPitchRows, padded_depth(inputs), stage_, 0,
        [&](int64_t output, int64_t input) {
          const int tile = static_cast<int>(output) / kTileColumns, of_warp = tile % kAllTiles;
          const int channel = channel_of(first, tile / kAllTiles, of_warp % kTiles) + output % kTileColumns;
          T weight = T(0);
          if (channel < channels_ && input < inputs) {
            const int64_t row = static_cast<int64_t>(of_warp / kTiles) * channels_ + channel;
            weight = __ldg(gates_.pointwise + (row * all_inputs + first_input + input));
          }
          return weight;
        },
        sum);
  }

  static __device__ __forceinline__ int channel_of(int first, int key_warp, int tile) {
    return first + (key_warp * kTiles + tile) * kTileColumns;
  }

  __device__ __forceinline__ void update_memory(int first, const T (&sum)[kAllTiles][kTileElements]) const {
    const WindowGrid& grid = gates_.attention.grid;
    const int64_t positions = gates_.attention.sizes.positions;
    const Global<const S> memory = entry_of(gates_.m, grid, entry_);
    const Global<S> h_hat = entry_of(gates_.h_hat, grid, entry_), m_next = entry_of(gates_.m_new, grid, entry_);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) {
        const int64_t channel = channel_of(first, Shape::key_warp(), tile) + Way::column(e),
                      position = first_ + Shape::first_row() + Way::row(e);
        if (channel >= channels_ || position >= positions) continue;
        T gate[kGates];
#pragma unroll
        for (int which = 0; which < kGates; ++which) {
          gate[which] = sum[which * kTiles + tile][e];
          if (gates_.bias != nullptr) gate[which] += __ldg(gates_.bias + (which * channels_ + channel));
        }
        const int64_t offset = grid.offset(position);
        const T m = widen(__ldg(memory + (channel * gates_.m.stride_channel + offset)));
        const ActivatedGates<T> gates = activate(gate, m);
        m_next[channel * gates_.m_new.stride_channel + offset] = narrow<S>(gates.m_new);
        h_hat[channel * gates_.h_hat.stride_channel + offset] = narrow<S>(gates.o * gates.m_new);
      }
    }
  }

  const AttentionGatesArguments<S>& gates_;
  int value_channels_;
  Shared<Operand> z_, hidden_, stage_;
};

template <class S, class Way, int KeyWarps, int Group>
__global__ void __launch_bounds__(kAttentionThreads, kForwardBlocks<KeyWarps, Group>)
    attention_gates_forward_kernel(AttentionGatesArguments<S> in, ForwardStages stages) {
  if constexpr (served_here<S, Way>()) {
    GatedBlock<S, Way, KeyWarps, Group>(in, stages).run();
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
