// What the forward and the backward pass of separable_gates share: a block of the map, its gates before activation, and
// the activations. Equations: fastsam/ops/separable_gates/eager.py.
#pragma once

#include "fastsam/params.h"
#include "tile.h"

namespace fastsam {
namespace FASTSAM_ISA {

// Multiply-adds of the forward pass.
inline int64_t gate_work(const GateSizes& sizes) {
  const int64_t inputs = sizes.z_channels + sizes.channels;
  return sizes.batch * sizes.height * sizes.width * inputs *
         (3 * sizes.channels + sizes.kernel_size * sizes.kernel_size);
}

// A map is cut into blocks of a few rows and up to kBlockWidth columns, about kBlockLanes positions, so that u and the
// gates of a block stay in the L2 cache. A row of a block takes `row_lanes` lanes.
constexpr int64_t kBlockLanes = 96, kBlockWidth = 96;

template <class T>
struct Blocks {
  explicit Blocks(const GateSizes& sizes)
      : row_lanes(padded_lanes<T>(smaller(sizes.width, kBlockWidth))),
        rows(smaller(sizes.height, kBlockLanes > row_lanes ? kBlockLanes / row_lanes : 1)),
        down((sizes.height + rows - 1) / rows),
        across((sizes.width + kBlockWidth - 1) / kBlockWidth) {}

  int64_t count() const { return down * across; }
  int64_t lanes() const { return rows * row_lanes; }

  int64_t row_lanes, rows, down, across;
};

struct Block2d {
  int64_t top, left, rows, columns;
};

template <class T>
inline Block2d block_at(const Blocks<T>& blocks, const GateSizes& sizes, int64_t index) {
  const int64_t top = index / blocks.across * blocks.rows, left = index % blocks.across * kBlockWidth;
  return {top, left, smaller(blocks.rows, sizes.height - top), smaller(kBlockWidth, sizes.width - left)};
}

// Channel `channel` of [z; h].
template <class T, class Call>
inline const T* input_channel(const Call& call, int64_t batch, int64_t channel) {
  const int64_t z_channels = call.sizes.z_channels;
  if (channel < z_channels) return call.z.data + batch * call.z.stride_batch + channel * call.z.stride_channel;
  return call.h.data + batch * call.h.stride_batch + (channel - z_channels) * call.h.stride_channel;
}

// Copies rows x columns from (top, left) of a height x width plane, 0 outside of it.
template <class T>
inline void copy_window(const T* plane, int64_t height, int64_t width, int64_t top, int64_t left, int64_t rows,
                        int64_t columns, T* out, int64_t out_stride) {
  const int64_t first = left < 0 ? -left : 0, last = smaller(columns, width - left);
  for (int64_t row = 0; row < rows; ++row) {
    T* line = out + row * out_stride;
    const int64_t y = top + row;
    if (y < 0 || y >= height || last <= first) {
      std::memset(line, 0, columns * sizeof(T));
      continue;
    }
    std::memset(line, 0, first * sizeof(T));
    std::memcpy(line + first, plane + y * width + left + first, (last - first) * sizeof(T));
    std::memset(line + last, 0, (columns - last) * sizeof(T));
  }
}

// Rows x row_lanes of a correlation with a k x k filter; window holds the input with its halo. Eight vectors at a time
// share each filter tap.
template <class T>
inline void correlate(const T* window, int64_t window_stride, const T* filter, int64_t k, int64_t rows,
                      int64_t row_lanes, T* out) {
  constexpr int kBatch = 8;
  const int64_t per_row = row_lanes / kLanes<T>, vectors = rows * per_row;
  for (int64_t first = 0; first < vectors; first += kBatch) {
    const T* at[kBatch];
    for (int index = 0; index < kBatch; ++index) {
      const int64_t vector = smaller(first + index, vectors - 1);
      at[index] = window + vector / per_row * window_stride + vector % per_row * kLanes<T>;
    }
    Vec<T> sum[kBatch];
    for (int index = 0; index < kBatch; ++index) sum[index] = broadcast(T(0));
    for (int64_t dy = 0; dy < k; ++dy) {
      for (int64_t dx = 0; dx < k; ++dx) {
        const Vec<T> tap = broadcast(filter[dy * k + dx]);
        const int64_t offset = dy * window_stride + dx;
        for (int index = 0; index < kBatch; ++index) sum[index] += tap * load(at[index] + offset);
      }
    }
    for (int index = 0; index < kBatch && first + index < vectors; ++index)
      store(out + (first + index) * kLanes<T>, sum[index]);
  }
}

template <class T>
struct GateScratch {
  GateScratch(Arena& arena, const GateSizes& sizes, const Blocks<T>& blocks)
      : window_stride(blocks.row_lanes + sizes.kernel_size),
        window(arena.take<T>((blocks.rows + sizes.kernel_size) * window_stride + kLanes<T>)),
        u(arena.take<T>(padded_rows(sizes.z_channels + sizes.channels) * blocks.lanes())),
        gates(arena.take<T>(padded_rows(3 * sizes.channels) * blocks.lanes())),
        plane(arena.take<T>(blocks.lanes())) {}

  int64_t window_stride;
  T *window, *u, *gates, *plane;
};

// u = depthwise * [z; h] on a block.
template <class T, class Call>
inline void depthwise_block(const Call& call, const Blocks<T>& blocks, int64_t batch, Block2d block,
                            const GateScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const int64_t k = sizes.kernel_size, pad = k / 2, lanes = blocks.lanes();
  for (int64_t channel = 0; channel < sizes.z_channels + sizes.channels; ++channel) {
    const T* plane = input_channel<T>(call, batch, channel);
    T* u = scratch.u + channel * lanes;
    if (call.depthwise == nullptr) {
      copy_window(plane, sizes.height, sizes.width, block.top, block.left, block.rows, blocks.row_lanes, u,
                  blocks.row_lanes);
      continue;
    }
    copy_window(plane, sizes.height, sizes.width, block.top - pad, block.left - pad, block.rows + k - 1,
                blocks.row_lanes + k - 1, scratch.window, scratch.window_stride);
    correlate(scratch.window, scratch.window_stride, call.depthwise + channel * k * k, k, block.rows, blocks.row_lanes,
              u);
  }
}

// The gates before activation: pointwise u + bias.
template <class T, class Call>
inline void gates_block(const Call& call, const Blocks<T>& blocks, int64_t batch, Block2d block,
                        const T* pointwise_panels, const GateScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const int64_t inputs = sizes.z_channels + sizes.channels, lanes = blocks.lanes(),
                used = block.rows * blocks.row_lanes;
  depthwise_block(call, blocks, batch, block, scratch);
  multiply<T, Start::kZero>(3 * sizes.channels, used, inputs, panels(pointwise_panels, inputs), scratch.u, lanes,
                            scratch.gates, lanes);
  if (call.bias == nullptr) return;
  for (int64_t row = 0; row < 3 * sizes.channels; ++row) {
    const Vec<T> shift = broadcast(call.bias[row]);
    for (int64_t lane = 0; lane < used; lane += kLanes<T>) {
      store(scratch.gates + row * lanes + lane, load(scratch.gates + row * lanes + lane) + shift);
    }
  }
}

template <class T>
struct GateActivations {
  Vec<T> i, g, o;
};

template <class T>
inline GateActivations<T> activate(const T* gates, int64_t channel, int64_t channels, int64_t lanes, int64_t lane) {
  return {sigmoid<T>(load(gates + channel * lanes + lane)), tanh<T>(load(gates + (channels + channel) * lanes + lane)),
          sigmoid<T>(load(gates + (2 * channels + channel) * lanes + lane))};
}

// Copies a block's valid part into a contiguous H x W plane.
template <class T>
inline void store_block(const T* tile, int64_t row_lanes, Block2d block, int64_t width, T* plane) {
  for (int64_t row = 0; row < block.rows; ++row) {
    std::memcpy(plane + (block.top + row) * width + block.left, tile + row * row_lanes, block.columns * sizeof(T));
  }
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
