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
constexpr int64_t kBlockLanes = 192, kBlockWidth = 96;

template <class T>
struct Blocks {
  explicit Blocks(const GateSizes& sizes)
      : row_lanes(padded_lanes<T>(smaller(sizes.width, kBlockWidth))),
        down((sizes.height * row_lanes + kBlockLanes - 1) / kBlockLanes),
        rows((sizes.height + down - 1) / down),
        across((sizes.width + kBlockWidth - 1) / kBlockWidth) {
    down = (sizes.height + rows - 1) / rows;
  }

  int64_t count() const { return down * across; }
  int64_t lanes() const { return rows * row_lanes; }

  int64_t row_lanes, down, rows, across;
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
template <class S>
inline const S* input_channel(const GateSizes& sizes, const Map<const S>& z, const Map<const S>& h, int64_t batch,
                              int64_t channel) {
  if (channel < sizes.z_channels) return z.data + batch * z.stride_batch + channel * z.stride_channel;
  return h.data + batch * h.stride_batch + (channel - sizes.z_channels) * h.stride_channel;
}

// Sets at least `count` lanes to 0, and up to a vector more.
template <class T>
inline void clear_over(T* lane, int64_t count) {
  for (int64_t index = 0; index < count; index += kLanes<T>) store(lane + index, broadcast(T(0)));
}

// Copies rows x columns from (top, left) of a height x width plane, 0 outside of it. Rows come in order and may spill
// zeros into the start of the next one; `out` has room for a vector more than the rows.
template <class S, class T>
inline void copy_window(const S* plane, int64_t height, int64_t width, int64_t top, int64_t left, int64_t rows,
                        int64_t columns, T* out, int64_t out_stride) {
  const int64_t first = left < 0 ? -left : 0, last = smaller(columns, width - left);
  for (int64_t row = 0; row < rows; ++row) {
    T* line = out + row * out_stride;
    const int64_t y = top + row;
    if (y < 0 || y >= height || last <= first) {
      clear_over(line, columns);
      continue;
    }
    clear_over(line, first);
    copy_lanes(plane + y * width + left + first, last - first, line + first);
    clear_over(line + last, columns - last);
  }
}

// Rows x Vectors of a correlation with a k x k filter: each tap is read once for all of them.
template <class T, int Rows, int Vectors>
inline void correlate_block(const T* window, int64_t window_stride, const T* filter, int64_t k, T* out,
                            int64_t row_lanes) {
  Vec<T> sum[Rows][Vectors];
  for (int row = 0; row < Rows; ++row) {
    for (int vector = 0; vector < Vectors; ++vector) sum[row][vector] = broadcast(T(0));
  }
  for (int64_t dy = 0; dy < k; ++dy) {
    const T* line = window + dy * window_stride;
    for (int64_t dx = 0; dx < k; ++dx) {
      const Vec<T> tap = broadcast(filter[dy * k + dx]);
      for (int row = 0; row < Rows; ++row) {
        for (int vector = 0; vector < Vectors; ++vector)
          sum[row][vector] += tap * load(line + dx + row * window_stride + vector * kLanes<T>);
      }
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int vector = 0; vector < Vectors; ++vector)
      store(out + row * row_lanes + vector * kLanes<T>, sum[row][vector]);
  }
}

// Rows x row_lanes of a correlation with a k x k filter; window holds the input with its halo.
template <class T>
inline void correlate(const T* window, int64_t window_stride, const T* filter, int64_t k, int64_t rows,
                      int64_t row_lanes, T* out) {
  for (int64_t lane = 0; lane < row_lanes;) {
    const bool wide = lane + 2 * kLanes<T> <= row_lanes;
    const auto block = wide ? correlate_block<T, 4, 2> : correlate_block<T, 4, 1>;
    const auto line = wide ? correlate_block<T, 1, 2> : correlate_block<T, 1, 1>;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
      block(window + row * window_stride + lane, window_stride, filter, k, out + row * row_lanes + lane, row_lanes);
    for (; row < rows; ++row)
      line(window + row * window_stride + lane, window_stride, filter, k, out + row * row_lanes + lane, row_lanes);
    lane += wide ? 2 * kLanes<T> : kLanes<T>;
  }
}

template <class T>
struct GateScratch {
  GateScratch(Arena& arena, const GateSizes& sizes, const Blocks<T>& blocks)
      : window_stride(blocks.row_lanes + sizes.kernel_size),
        window(arena.take<T>((blocks.rows + sizes.kernel_size) * window_stride + kLanes<T>)),
        u(arena.take<T>((sizes.z_channels + sizes.channels) * blocks.lanes())),
        gates(arena.take<T>(3 * sizes.channels * blocks.lanes())),
        plane(arena.take<T>(blocks.lanes())) {}

  int64_t window_stride;
  T *window, *u, *gates, *plane;
};

// u = depthwise * [z; h] on a block.
template <class Call, class T>
inline void depthwise_block(const Call& call, const Blocks<T>& blocks, int64_t batch, Block2d block,
                            const GateScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const int64_t k = sizes.kernel_size, pad = k / 2, lanes = blocks.lanes();
  for (int64_t channel = 0; channel < sizes.z_channels + sizes.channels; ++channel) {
    const auto* plane = input_channel(sizes, call.z, call.h, batch, channel);
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

// The gates of a block before bias and activation: pointwise u.
template <class Call, class T>
inline void gates_block(const Call& call, const Blocks<T>& blocks, int64_t batch, Block2d block,
                        const GateScratch<T>& scratch) {
  const int64_t inputs = call.sizes.z_channels + call.sizes.channels, lanes = blocks.lanes();
  depthwise_block(call, blocks, batch, block, scratch);
  multiply<T, Start::kZero>(3 * call.sizes.channels, block.rows * blocks.row_lanes, inputs,
                            rows_of(call.pointwise, inputs), scratch.u, lanes, scratch.gates, lanes);
}

template <class T>
struct GateActivations {
  Vec<T> i, g, o;
};

// The activated gates of one channel of a block.
template <class T>
struct GateChannel {
  GateChannel(const T* gates, const T* bias, int64_t channel, int64_t channels, int64_t lanes) {
    for (int gate = 0; gate < 3; ++gate) {
      row[gate] = gates + (gate * channels + channel) * lanes;
      shift[gate] = broadcast(bias == nullptr ? T(0) : bias[gate * channels + channel]);
    }
  }

  GateActivations<T> at(int64_t lane) const {
    return {sigmoid<T>(load(row[0] + lane) + shift[0]), tanh<T>(load(row[1] + lane) + shift[1]),
            sigmoid<T>(load(row[2] + lane) + shift[2])};
  }

  const T* row[3];
  Vec<T> shift[3];
};

// Copies a block's valid part into a contiguous H x W plane.
template <class T, class S>
inline void store_block(const T* tile, int64_t row_lanes, Block2d block, int64_t width, S* plane) {
  store_tile(block.rows, block.columns, tile, row_lanes, plane + block.top * width + block.left, width);
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
