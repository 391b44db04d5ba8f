// The third launch of the gradients of the separable gates: through the depthwise filter, channel by channel, and the
// sums of the weights' gradients. See separable_gates_backward.cuh.
#pragma once

#include "fastsam/separable_gates_backward.cuh"

namespace fastsam::cuda {

constexpr int kChannelTileHeight = 8, kWarps = kProductThreads / 32;

template <class T>
struct GateWeightGradients {
  Global<T> ddepthwise, dpointwise, dbias;
};

// Blocks of the third launch: the channels of [z; h], elements of dpointwise, rows of dbias.
struct GateChannels {
  int64_t channel_blocks, pointwise_blocks, bias_blocks;
  int planes;

  __host__ __device__ int64_t blocks() const { return channel_blocks + pointwise_blocks + bias_blocks; }
};

template <class T>
int64_t channel_shared_bytes(const GateSizes& sizes, int planes) {
  const int64_t taps = sizes.kernel_size * sizes.kernel_size;
  if (taps == 0) return shared_bytes<T>(kWarps);
  const int64_t windows = planes * window_shape(kChannelTileHeight, static_cast<int>(sizes.kernel_size)).plane;
  return 2 * shared_bytes<T>(windows) + shared_bytes<T>(taps) + shared_bytes<T>(kWarps * taps);
}

template <class T>
GateChannels gate_channels(const GateSizes& sizes, bool has_bias) {
  const int64_t inputs = input_channels(sizes), rows = kGates * sizes.channels;
  return {sizes.kernel_size == 0 ? 0 : inputs, ceil_div(rows * inputs, kProductThreads), has_bias ? rows : 0,
          planes_that_fit(kGateSharedBytes, [&](int count) { return channel_shared_bytes<T>(sizes, count); })};
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
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

// One channel of [z; h] through its filter, for all samples.
template <class S>
class ChannelBlock {
 public:
  using T = Wide<S>;

  __device__ __forceinline__ ChannelBlock(const GateInputs<S>& in, int planes, int64_t channel)
      : in_(in),
        channel_(channel),
        k_(static_cast<int>(in.sizes.kernel_size)),
        planes_(planes),
        shape_(window_shape(kChannelTileHeight, k_)) {
    SharedArena arena;
    x_ = arena.take<T>(planes * shape_.plane, "input windows");
    du_ = arena.take<T>(planes * shape_.plane, "du windows");
    filter_ = arena.take<T>(k_ * k_, "flipped filter");
    sums_ = arena.take<T>(kWarps * k_ * k_, "tap sums");
    for (int tap = threadIdx.x; tap < k_ * k_; tap += kProductThreads)
      filter_[k_ * k_ - 1 - tap] = __ldg(in.depthwise + (channel * k_ * k_ + tap));
  }

  // For filters whose size is known: each thread has a column of a tile and a sum for every tap.
  template <int K>
  __device__ __forceinline__ void run(Global<const T> du, const GateInputGradients<S>& out, Global<T> ddepthwise) {
    T sum[K * K];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) sum[tap] = T(0);
    for_each_window(du, [&](int64_t first) {
      const Column at = my_column(first);
      if (at.rows <= 0) return;
      store_column<K>(at, out);
      add_tap_products<K>(du_ + at.offset, x_ + at.offset, shape_.width, at.rows, inside(at.tile, at.x), sum);
    });
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const T total = sum_of_warp(sum[tap]);
      if (threadIdx.x % 32 == 0) sums_[threadIdx.x / 32 * (K * K) + tap] = total;
    }
    __syncthreads();
    for (int tap = threadIdx.x; tap < K * K; tap += kProductThreads) {
      T total = T(0);
      for (int warp = 0; warp < kWarps; ++warp) total += sums_[warp * (K * K) + tap];
      ddepthwise[channel_ * (K * K) + tap] = total;
    }
  }

  // For any size: each thread has taps of its own, and sums over whole tiles.
  __device__ __forceinline__ void run_any(Global<const T> du, const GateInputGradients<S>& out, Global<T> ddepthwise) {
    const int taps = k_ * k_;
    for (int tap = threadIdx.x; tap < taps; tap += kProductThreads) sums_[tap] = T(0);
    for_each_window(du, [&](int64_t first) {
      const Column at = my_column(first);
      if (at.rows > 0) store_column<0>(at, out);
      for (int tap = threadIdx.x; tap < taps; tap += kProductThreads) {
        T total = T(0);
        for (int plane = 0; plane < planes_; ++plane) total += tap_product(first + plane, plane, tap / k_, tap % k_);
        sums_[tap] += total;
      }
    });
    for (int tap = threadIdx.x; tap < taps; tap += kProductThreads) ddepthwise[channel_ * taps + tap] = sums_[tap];
  }

 private:
  struct Tile {
    int64_t batch;
    int top, left;
  };
  struct Column {
    Tile tile;
    int x;       // in the tile
    int offset;  // of its window in shared memory
    int rows;    // of the map; 0 where the column is beyond it
  };

  __device__ __forceinline__ Tile tile_at(int64_t index) const {
    const int64_t tiles = tile_count(in_.sizes, kChannelTileHeight), across = ceil_div(in_.sizes.width, kTileWidth),
                  tile = index % tiles;
    return {index / tiles, static_cast<int>(tile / across * kChannelTileHeight),
            static_cast<int>(tile % across * kTileWidth)};
  }

  __device__ __forceinline__ int64_t all_tiles() const {
    return in_.sizes.batch * tile_count(in_.sizes, kChannelTileHeight);
  }

  // The tile column of this thread, of the windows that start with tile `first`.
  __device__ __forceinline__ Column my_column(int64_t first) const {
    const int plane = threadIdx.x / kTileWidth, x = threadIdx.x % kTileWidth;
    if (plane >= planes_ || first + plane >= all_tiles()) return {{0, 0, 0}, 0, 0, 0};
    const Tile tile = tile_at(first + plane);
    const int64_t left = in_.sizes.height - tile.top;
    const int rows = left < kChannelTileHeight ? static_cast<int>(left) : kChannelTileHeight;
    return {tile, x, plane * shape_.plane + x, tile.left + x < in_.sizes.width ? rows : 0};
  }

  // Loads windows of the input and of du, of as many tiles as fit at a time; use(first tile).
  template <class Use>
  __device__ __forceinline__ void for_each_window(Global<const T> du, Use use) {
    const int64_t tiles = all_tiles(), area = in_.sizes.height * in_.sizes.width;
    const int height = static_cast<int>(in_.sizes.height), width = static_cast<int>(in_.sizes.width), pad = k_ / 2;
    const Global<const T> my_du = du + channel_ * (in_.sizes.batch * area);
    for (int64_t first = 0; first < tiles; first += planes_) {
      __syncthreads();
      load_windows<S>(planes_, shape_, height, width, x_, [&](int plane) {
        if (first + plane >= tiles) return PlaneWindow<S>{nullptr, 0, 0};
        const Tile tile = tile_at(first + plane);
        return PlaneWindow<S>{input_plane(in_, tile.batch, channel_), tile.top - pad, tile.left - pad};
      });
      load_windows<T>(planes_, shape_, height, width, du_, [&](int plane) {
        if (first + plane >= tiles) return PlaneWindow<T>{nullptr, 0, 0};
        const Tile tile = tile_at(first + plane);
        return PlaneWindow<T>{my_du + tile.batch * area, tile.top - pad, tile.left - pad};
      });
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      use(first);
    }
  }

  // A column of dz or dh. K is k_ or 0, for any.
  template <int K>
  __device__ __forceinline__ void store_column(const Column& at, const GateInputGradients<S>& out) {
    T gradient[kChannelTileHeight];
    correlate_column<K>(k_, du_ + at.offset, shape_.width, filter_, gradient);
    const Global<S> plane = input_gradient_plane(in_.sizes, out, at.tile.batch, channel_);
#pragma unroll
    for (int row = 0; row < kChannelTileHeight; ++row) {
      if (row < at.rows) plane[(at.tile.top + row) * in_.sizes.width + at.tile.left + at.x] = narrow<S>(gradient[row]);
    }
  }

  // What is in the map of a window that starts in column `x` of a tile's.
  __device__ __forceinline__ WindowPart inside(const Tile& tile, int x) const {
    const int pad = k_ / 2;
    return {pad - tile.top, static_cast<int>(in_.sizes.height) - tile.top + pad, pad - tile.left - x,
            static_cast<int>(in_.sizes.width) - tile.left - x + pad};
  }

  // The sum over a tile of du times the input shifted by (dy, dx).
  __device__ __forceinline__ T tap_product(int64_t index, int plane, int dy, int dx) const {
    if (index >= all_tiles()) return T(0);
    const WindowPart part = inside(tile_at(index), 0);
    const int pad = k_ / 2, bottom = min(min(part.bottom - pad, part.bottom - dy), kChannelTileHeight),
              right = min(min(part.right - pad, part.right - dx), kTileWidth);
    const Shared<T> du = du_ + (plane * shape_.plane + pad * (shape_.width + 1));
    const Shared<T> x = x_ + (plane * shape_.plane + dy * shape_.width + dx);
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
  int k_, planes_;
  WindowShape shape_;
  Shared<T> x_, du_, filter_, sums_;
};

template <class S>
__device__ __forceinline__ void channel_gradients(const GateInputs<S>& in, int planes, int64_t channel,
                                                  Global<const Wide<S>> du, const GateInputGradients<S>& out,
                                                  Global<Wide<S>> ddepthwise) {
  ChannelBlock<S> block(in, planes, channel);
  with_kernel_size(in.sizes.kernel_size, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    if constexpr (kSize == 0) {
      block.run_any(du, out, ddepthwise);
    } else {
      block.template run<kSize>(du, out, ddepthwise);
    }
  });
}

// One element of dpointwise for each thread: the sum of its parts.
template <class T>
__device__ __forceinline__ void add_parts(int64_t block, int64_t parts, int64_t count, Global<T> partial,
                                          Global<T> total) {
  const int64_t at = block * kProductThreads + threadIdx.x;
  if (at >= count) return;
  T sum = T(0);
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + at];
  total[at] = sum;
}

// dbias of one row of the gates.
template <class T, class Operand>
__device__ __forceinline__ void sum_row(int64_t row, int64_t count, Global<Operand> dgates, Global<T> dbias) {
  SharedArena arena;
  const Shared<T> of_warps = arena.take<T>(kWarps, "row sums");
  T sum = T(0);
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < count; at += kProductThreads) sum += widen(dgates[row * count + at]);
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  T total = T(0);
  for (int warp = 0; warp < kWarps; ++warp) total += of_warps[warp];
  dbias[row] = total;
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
                                                   const GateWeightGradients<Wide<S>>& weights) {
  int64_t block = blockIdx.x;
  if (block < channels.channel_blocks) {
    return channel_gradients<S>(in, channels.planes, block, workspace.du, out, weights.ddepthwise);
  }
  block -= channels.channel_blocks;
  if (block < channels.pointwise_blocks) {
    const int64_t count = kGates * in.sizes.channels * input_channels(in.sizes);
    return add_parts(block, parts, count, workspace.dpointwise, weights.dpointwise);
  }
  sum_row(block - channels.pointwise_blocks, all_positions(in.sizes), workspace.dgates, weights.dbias);
}

template <class S, class Operand>
__global__ void __launch_bounds__(kProductThreads, kBlocksAtOnce<Wide<S>>)
    separable_gates_backward_channels_kernel(GateInputs<S> in, GateChannels channels, int64_t parts,
                                             GateWorkspace<Wide<S>, Operand> workspace, GateInputGradients<S> out,
                                             GateWeightGradients<Wide<S>> weights) {
  if constexpr (channels_served_here<S, Operand>()) {
    gradients_of_block(in, channels, parts, workspace, out, weights);
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
