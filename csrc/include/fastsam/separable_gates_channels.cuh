// The third launch of the gradients of the separable gates: through the depthwise filter, channel by channel, and the
// sums of the weights' gradients. See separable_gates_backward.cuh.
#pragma once

#include "fastsam/separable_gates_backward.cuh"
#include "fastsam/warp.cuh"

namespace fastsam::cuda {

constexpr int kChannelThreads = 256, kChannelWarps = kChannelThreads / 32, kChannelTileHeight = 8;

template <class S>
struct GateWeightGradients {
  Global<S> ddepthwise, dpointwise, dbias;
};

// Blocks of the third launch: the channels of [z; h], elements of dpointwise, rows of dbias.
struct GateChannels {
  int64_t channel_blocks, pointwise_blocks, bias_blocks;
  int warps;  // of a channel's block that have windows

  __host__ __device__ int64_t blocks() const { return channel_blocks + pointwise_blocks + bias_blocks; }
};

// Tiles that a warp has at a time: with a filter of a usual size four, a column for each lane. Other filters have large
// windows.
__host__ __device__ constexpr int tiles_of_warp(int64_t kernel_size) {
  return kernel_size <= kLargestUsualKernel ? 32 / kTileWidth : 1;
}

// Shared memory of a block of which `warps` warps have windows.
template <class T>
int64_t channel_shared_bytes(const GateSizes& sizes, int warps) {
  const int64_t taps = sizes.kernel_size * sizes.kernel_size;
  if (taps == 0) return shared_bytes<T>(kChannelWarps);
  const int64_t windows = warps * tiles_of_warp(sizes.kernel_size) *
                          window_shape<T>(kChannelTileHeight, static_cast<int>(sizes.kernel_size)).plane;
  return 2 * shared_bytes<T>(windows) + shared_bytes<T>(taps) + shared_bytes<T>(warps * taps);
}

// As many warps get windows as there is room for; no warps: the filter is too large. The order of the sums follows from
// this number, which is the same on every card.
template <class T>
GateChannels gate_channels(const GateSizes& sizes, bool has_bias) {
  const int64_t inputs = input_channels(sizes), rows = kGates * sizes.channels;
  int warps = kChannelWarps;
  while (warps > 0 && channel_shared_bytes<T>(sizes, warps) > kGateSharedBytes) --warps;
  return {sizes.kernel_size == 0 ? 0 : inputs, ceil_div(rows * inputs, kChannelThreads), has_bias ? rows : 0, warps};
}

// The rows and columns of a window, from `top` to before `bottom`, that are in the map.
struct WindowPart {
  int top, bottom, left, right;
};

// Adds du times the input shifted by each tap: a column of the first `rows` rows of a tile. Pairs of which one is
// beyond the map are left out, because 0 times infinity is not 0.
template <int K, class T>
__device__ __forceinline__ void add_tap_products(Shared<T> du, Shared<T> window, int pitch, int rows, WindowPart inside,
                                                 T (&sum)[K * K]) {
  constexpr int kRows = kChannelTileHeight, kPad = K / 2;
  T gradient[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) gradient[row] = du[(row + kPad) * pitch + kPad];
#pragma unroll
  for (int dx = 0; dx < K; ++dx) {
    if (dx < inside.left || dx >= inside.right) continue;
#pragma unroll
    for (int y = 0; y < kRows + K - 1; ++y) {
      if (y < inside.top || y >= inside.bottom) continue;
      const T value = window[y * pitch + dx];
#pragma unroll
      for (int dy = 0; dy < K; ++dy) {
        const int row = y - dy;
        if (row >= 0 && row < kRows && row < rows) sum[dy * K + dx] += gradient[row] * value;
      }
    }
  }
}

// One channel of [z; h] through its filter, for all samples. Its warps go through the tiles without waiting for each
// other, kTiles at a time; the lanes of a tile fill its windows and have a column or, of few rows, a part of one. K is
// the size of the filter or, where that is unusual, 0.
template <class S, int K>
class ChannelBlock {
 public:
  using T = Wide<S>;

  __device__ __forceinline__ ChannelBlock(const GateInputs<S>& in, int warps, int64_t channel)
      : in_(in),
        channel_(channel),
        k_(K > 0 ? K : static_cast<int>(in.sizes.kernel_size)),
        warps_(warps),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        shape_(window_shape<T>(kChannelTileHeight, k_)) {
    const int taps = k_ * k_, windows = warps * kTiles, mine = warp_ * kTiles + lane_ / kLanes;
    SharedArena arena;
    x_ = arena.take<T>(windows * shape_.plane, "input windows") + mine * shape_.plane;
    du_ = arena.take<T>(windows * shape_.plane, "du windows") + mine * shape_.plane;
    filter_ = arena.take<T>(taps, "flipped filter");
    sums_ = arena.take<T>(warps * taps, "tap sums");
    for (int tap = threadIdx.x; tap < taps; tap += kChannelThreads)
      filter_[taps - 1 - tap] = widen(__ldg(in.depthwise + (channel * taps + tap)));
    __syncthreads();
  }

  __device__ __forceinline__ void run(Global<const T> du, const GateInputGradients<S>& out, Global<S> ddepthwise) {
    const Shared<T> sums = sums_ + warp_ * k_ * k_;
    if constexpr (K > 0) {
      sum_in_registers(du, out, sums);
    } else {
      sum_in_shared(du, out, sums);
    }
    __syncthreads();
    const int taps = k_ * k_;
    for (int tap = threadIdx.x; tap < taps; tap += kChannelThreads) {
      T total = T(0);
      for (int warp = 0; warp < warps_; ++warp) total += sums_[warp * taps + tap];
      ddepthwise[channel_ * taps + tap] = narrow<S>(total);
    }
  }

 private:
  static constexpr int kTiles = tiles_of_warp(K > 0 ? K : kLargestUsualKernel + 1), kLanes = 32 / kTiles,
                       kLaneRows = kChannelTileHeight * kTileWidth / kLanes;

  struct Tile {
    int64_t batch;
    int top, left;
    bool there;
  };
  // What a lane has of a tile.
  struct Column {
    int x, first_row;
    int rows;  // of the map
  };

  // Each lane has a sum for every tap.
  __device__ __forceinline__ void sum_in_registers(Global<const T> du, const GateInputGradients<S>& out,
                                                   Shared<T> sums) {
    T sum[K * K];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) sum[tap] = T(0);
    for_each_tile(du, [&](const Tile& tile) {
      const Column column = my_column(tile);
      if (column.rows <= 0) return;
      store_column(tile, column, out);
      add_tap_products<K>(du_ + column.x, x_ + column.x, shape_.width, column.rows, inside(tile, column.x), sum);
    });
    __syncthreads();  // shuffles take more instructions where the compiler cannot tell that all lanes are there
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const T total = sum_of_warp(sum[tap]);
      if (lane_ == 0 && warp_ < warps_) sums[tap] = total;
    }
  }

  // Each lane has taps of its own, and sums over whole tiles.
  __device__ __forceinline__ void sum_in_shared(Global<const T> du, const GateInputGradients<S>& out, Shared<T> sums) {
    if (warp_ >= warps_) return;
    for (int tap = lane_; tap < k_ * k_; tap += 32) sums[tap] = T(0);
    for_each_tile(du, [&](const Tile& tile) {
      const Column column = my_column(tile);
      if (column.rows > 0) store_column(tile, column, out);
      for (int tap = lane_; tap < k_ * k_; tap += 32) sums[tap] += tap_product(tile, tap / k_, tap % k_);
    });
  }

  __device__ __forceinline__ int64_t all_tiles() const {
    return in_.sizes.batch * tile_count(in_.sizes, kChannelTileHeight);
  }

  __device__ __forceinline__ Tile tile_at(int64_t index) const {
    const int64_t tiles = tile_count(in_.sizes, kChannelTileHeight), across = ceil_div(in_.sizes.width, kTileWidth),
                  tile = index % tiles;
    return {index / tiles, static_cast<int>(tile / across * kChannelTileHeight),
            static_cast<int>(tile % across * kTileWidth), index < all_tiles()};
  }

  __device__ __forceinline__ Column my_column(const Tile& tile) const {
    const int x = lane_ % kTileWidth, first_row = lane_ % kLanes / kTileWidth * kLaneRows;
    const int64_t below = in_.sizes.height - tile.top - first_row;
    const bool in_map = tile.there && tile.left + x < in_.sizes.width;
    return {x, first_row, in_map ? static_cast<int>(below < kLaneRows ? below : kLaneRows) : 0};
  }

  // Fills the windows of the warp's tiles, as many at a time as it has; use(tile of this lane).
  template <class Use>
  __device__ __forceinline__ void for_each_tile(Global<const T> du, Use use) const {
    const int64_t tiles = warp_ < warps_ ? all_tiles() : 0, area = in_.sizes.height * in_.sizes.width;
    for (int64_t first = warp_ * kTiles; first < tiles; first += warps_ * kTiles) {
      const Tile tile = tile_at(first + lane_ / kLanes);
      __syncwarp();
      if (tile.there) {
        load_window<S>(tile, input_plane(in_, tile.batch, channel_), x_);
        load_window<T>(tile, du + (channel_ * in_.sizes.batch + tile.batch) * area, du_);
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      use(tile);
    }
  }

  // Starts to fill a window of a plane, zero beyond its edges.
  template <class E>
  __device__ __forceinline__ void load_window(const Tile& tile, Global<const E> plane, Shared<T> to) const {
    const int height = static_cast<int>(in_.sizes.height), width = static_cast<int>(in_.sizes.width);
    const int top = tile.top - k_ / 2, left = tile.left - k_ / 2;
#pragma unroll 4  // several loads at a time where copies are not asynchronous
    for (int row = 0; row < shape_.rows; ++row) {
      const int y = top + row;
      for (int step = 0; step < shape_.width; step += kLanes) {
        const int column = step + lane_ % kLanes, x = left + column;
        if (column >= shape_.width) break;
        copy_element<E>(to + (row * shape_.width + column), plane + (static_cast<int64_t>(y) * width + x),
                        y >= 0 && y < height && x >= 0 && x < width);
      }
    }
  }

  // A column of dz or dh.
  __device__ __forceinline__ void store_column(const Tile& tile, const Column& column,
                                               const GateInputGradients<S>& out) const {
    T gradient[kLaneRows];
    correlate_column<K>(k_, du_ + (column.first_row * shape_.width + column.x), shape_.width, filter_, gradient);
    const Global<S> plane = input_gradient_plane(in_.sizes, out, tile.batch, channel_);
    const int64_t start = (tile.top + column.first_row) * in_.sizes.width + tile.left + column.x;
#pragma unroll
    for (int row = 0; row < kLaneRows; ++row) {
      if (row < column.rows) plane[start + row * in_.sizes.width] = narrow<S>(gradient[row]);
    }
  }

  // What is in the map of a window that starts in column `x` of a tile's.
  __device__ __forceinline__ WindowPart inside(const Tile& tile, int x) const {
    const int pad = k_ / 2;
    return {pad - tile.top, static_cast<int>(in_.sizes.height) - tile.top + pad, pad - tile.left - x,
            static_cast<int>(in_.sizes.width) - tile.left - x + pad};
  }

  // The sum over a tile of du times the input shifted by (dy, dx).
  __device__ __forceinline__ T tap_product(const Tile& tile, int dy, int dx) const {
    const WindowPart part = inside(tile, 0);
    const int pad = k_ / 2, bottom = min(min(part.bottom - pad, part.bottom - dy), kChannelTileHeight),
              right = min(min(part.right - pad, part.right - dx), kTileWidth);
    const Shared<T> du = du_ + pad * (shape_.width + 1), x = x_ + (dy * shape_.width + dx);
    T total = T(0);
    for (int row = max(part.top - dy, 0); row < bottom; ++row) {
      for (int column = max(part.left - dx, 0); column < right; ++column) {
        const T gradient = du[row * shape_.width + column], value = x[row * shape_.width + column];
        total += gradient * value;
      }
    }
    return total;
  }

  const GateInputs<S>& in_;
  int64_t channel_;
  int k_, warps_, warp_, lane_;
  WindowShape shape_;
  Shared<T> x_, du_;  // windows of this lane's tile
  Shared<T> filter_, sums_;
};

// One element of dpointwise for each thread: the sum of its parts.
template <class S>
__device__ __forceinline__ void add_parts(int64_t block, int64_t parts, int64_t count, Global<Wide<S>> partial,
                                          Global<S> total) {
  const int64_t at = block * kChannelThreads + threadIdx.x;
  if (at >= count) return;
  Wide<S> sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + at];
  total[at] = narrow<S>(sum);
}

// dbias of one row of the gates.
template <class S, class Operand>
__device__ __forceinline__ void sum_row(int64_t row, int64_t count, Global<Operand> dgates, Global<S> dbias) {
  using T = Wide<S>;
  SharedArena arena;
  const Shared<T> of_warps = arena.take<T>(kChannelWarps, "row sums");
  T sum = T(0);
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < count; at += kChannelThreads) sum += widen(dgates[row * count + at]);
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  T total = T(0);
  for (int warp = 0; warp < kChannelWarps; ++warp) total += of_warps[warp];
  dbias[row] = narrow<S>(total);
}

// Operands of 16 bits are those of tensor cores.
template <class S, class Operand>
__device__ constexpr bool channels_served_here() {
#ifdef __CUDA_ARCH__
  return sizeof(S) > 2 || (sizeof(Operand) > 2) == FmaProduct<float, 64>::template serves<S>(__CUDA_ARCH__ / 10);
#else
  return true;
#endif
}

template <class S, class Operand>
__device__ __forceinline__ void gradients_of_block(const GateInputs<S>& in, const GateChannels& channels, int64_t parts,
                                                   const GateWorkspace<Wide<S>, Operand>& workspace,
                                                   const GateInputGradients<S>& out,
                                                   const GateWeightGradients<S>& weights) {
  int64_t block = blockIdx.x;
  if (block < channels.channel_blocks) {
    return with_kernel_size(in.sizes.kernel_size, [&](auto size) {
      ChannelBlock<S, decltype(size)::value>(in, channels.warps, block).run(workspace.du, out, weights.ddepthwise);
    });
  }
  block -= channels.channel_blocks;
  if (block < channels.pointwise_blocks) {
    const int64_t count = kGates * in.sizes.channels * input_channels(in.sizes);
    return add_parts(block, parts, count, workspace.dpointwise, weights.dpointwise);
  }
  sum_row(block - channels.pointwise_blocks, all_positions(in.sizes), workspace.dgates, weights.dbias);
}

template <class S, class Operand>
__global__ void __launch_bounds__(kChannelThreads, kBlocksAtOnce<Wide<S>>* kProductThreads / kChannelThreads)
    separable_gates_backward_channels_kernel(GateInputs<S> in, GateChannels channels, int64_t parts,
                                             GateWorkspace<Wide<S>, Operand> workspace, GateInputGradients<S> out,
                                             GateWeightGradients<S> weights) {
  if constexpr (channels_served_here<S, Operand>()) {
    gradients_of_block(in, channels, parts, workspace, out, weights);
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
