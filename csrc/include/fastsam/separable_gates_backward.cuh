// Gradients of the separable gates in three launches, the last of which also sums up the weights' gradients.
//
//   1. gates      the gates again, tile by tile as in the forward pass: dm, and in the workspace u and dgates
//   2. products   du = pointwise^T dgates; dpointwise = dgates u^T, in partial sums over parts of the positions
//   3. channels   the warps of a block for each channel of [z; h] share the tiles of all samples: dz or dh = du
//                 correlated with the flipped filter, and ddepthwise; other blocks add the parts of dpointwise and sum
//                 dgates up to dbias
//
// Maps of the workspace are (channels, B * N): products do not see where a sample ends. All sums are in a fixed order.
#pragma once

#include "fastsam/separable_gates.cuh"

namespace fastsam::cuda {

template <class S>
struct GateOutputGradients {
  MapView<S> h_hat, m_new;
};

// What goes from launch to launch. Operand is that of the product: gradients in half precision are stored as such.
template <class T, class Operand>
struct GateWorkspace {
  Global<Operand> u;       // (inputs, B * N)
  Global<Operand> dgates;  // (3C, B * N)
  Global<T> du;            // (inputs, B * N), where there is a depthwise filter
  Global<T> dpointwise;    // (parts, 3C, inputs)
};

struct GateWorkspaceSizes {
  int64_t u, dgates, du, dpointwise;  // elements
};

template <class S>
struct GateInputGradients {
  Global<S> dz, dh;
};

__host__ __device__ inline int64_t all_positions(const GateSizes& sizes) {
  return sizes.batch * sizes.height * sizes.width;
}

template <class S, class Product>
__device__ __forceinline__ void backward_tile(const GateInputs<S>& in, int planes,
                                              const GateOutputGradients<S>& upstream, Global<S> dm,
                                              const GateWorkspace<Wide<S>, typename Product::Operand>& workspace) {
  using T = Wide<S>;
  using Operand = typename Product::Operand;
  GateBlock<S, Product> block(in, planes);
  const GatePlace& place = block.place();
  const int64_t area = in.sizes.height * in.sizes.width, all = all_positions(in.sizes);
  T sum[kGates][Product::kPairs];
  block.multiply(sum, [&](int first, Shared<Operand> u) {
    if (place.first_channel == 0) block.store_u(first, u, workspace.u);
  });
  block.for_each_pair([&](int pair, int64_t channel, int64_t y, int64_t x) {
    const int64_t position = y * in.sizes.width + x, at = place.batch * area + position;
    const ActivatedGates<T> a = activate(in, sum, pair, place.batch, channel, position);
    const T dh_hat = at_map(upstream.h_hat, place.batch, channel, position);
    const T dm_new = at_map(upstream.m_new, place.batch, channel, position) + dh_hat * a.o;
    const T dgate[kGates] = {dm_new * (a.g - a.m) * a.i * (T(1) - a.i), dm_new * a.i * (T(1) - a.g * a.g),
                             dh_hat * a.m_new * a.o * (T(1) - a.o)};
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      workspace.dgates[(gate * in.sizes.channels + channel) * all + at] = narrow<Operand>(dgate[gate]);
    dm[(place.batch * in.sizes.channels + channel) * area + position] = narrow<S>(dm_new * (T(1) - a.i));
  });
}

template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, kBlocksAtOnce<Wide<S>>)
    separable_gates_backward_gates_kernel(GateInputs<S> in, int planes, GateOutputGradients<S> upstream, Global<S> dm,
                                          GateWorkspace<Wide<S>, typename Product::Operand> workspace) {
  if constexpr (served_here<S, Product>()) {
    backward_tile<S, Product>(in, planes, upstream, dm, workspace);
  } else {
    __trap();
  }
}

// Blocks of the second launch: first the parts of dpointwise, tile by tile, then du.
struct GateProducts {
  int64_t parts, positions_a_part;
  int64_t row_tiles, column_tiles;      // of dpointwise
  int64_t input_tiles, position_tiles;  // of du

  __host__ __device__ int64_t weight_blocks() const { return parts * row_tiles * column_tiles; }
  __host__ __device__ int64_t blocks() const { return weight_blocks() + input_tiles * position_tiles; }
};

constexpr int kInputParts = 2;  // rows of a tile of du, over 32

// As many parts as give every multiprocessor two blocks.
template <class Product>
GateProducts gate_products(const GateSizes& sizes, int multiprocessors) {
  const int64_t rows = kGates * sizes.channels, inputs = input_channels(sizes), positions = all_positions(sizes);
  const int64_t row_tiles = ceil_div(rows, kGates * kPartRows), column_tiles = ceil_div(inputs, Product::kColumns);
  const int64_t wanted =
      parts_to_fill(2 * static_cast<int64_t>(multiprocessors), row_tiles * column_tiles, positions, 4 * kProductDepth);
  const int64_t positions_a_part = ceil_div(ceil_div(positions, wanted), kProductDepth) * kProductDepth;
  const int64_t parts = positions == 0 ? 0 : ceil_div(positions, positions_a_part);
  return {parts,
          positions_a_part,
          row_tiles,
          column_tiles,
          ceil_div(inputs, kInputParts * kPartRows),
          ceil_div(positions, Product::kColumns)};
}

template <class Product>
constexpr int64_t product_shared_bytes() {
  return shared_bytes<typename Product::Operand>(2 * Product::template kSizeA<kGates>) +
         shared_bytes<typename Product::Operand>(2 * Product::kSizeB);
}

// sum = A B over `chunks` chunks, of which each is on its way while the one before is multiplied: source_a(chunk, row,
// k) and source_b(chunk, column, k) are where the elements are, start_a() and start_b() say what is aligned.
template <class Product, int Parts, Along along, class SourceA, class SourceB>
__device__ __forceinline__ void multiply_chunks(int64_t chunks, bool aligned_a, SourceA source_a, bool aligned_b,
                                                SourceB source_b,
                                                typename Product::Accumulator (&sum)[Parts][Product::kPairs]) {
  using Operand = typename Product::Operand;
  SharedArena arena;
  const Shared<Operand> all_a = arena.take<Operand>(2 * Product::template kSizeA<Parts>, "A");
  const Shared<Operand> all_b = arena.take<Operand>(2 * Product::kSizeB, "B");
  clear(sum);
  for (int64_t chunk = -1; chunk < chunks; ++chunk) {
    const Shared<Operand> a = all_a + (chunk & 1) * Product::template kSizeA<Parts>,
                          b = all_b + (chunk & 1) * Product::kSizeB;
    if (chunk >= 0) {
      cp_async_wait<0>();
      finish_a<Product, Parts, along>(a);
      finish_b<Product, along>(b);
      __syncthreads();
    }
    if (chunk + 1 < chunks) {
      start_a<Product, Parts, along>(all_a + ((chunk + 1) & 1) * Product::template kSizeA<Parts>, aligned_a,
                                     [&](int row, int k) { return source_a(chunk + 1, row, k); });
      start_b<Product, along>(all_b + ((chunk + 1) & 1) * Product::kSizeB, aligned_b,
                              [&](int column, int k) { return source_b(chunk + 1, column, k); });
      cp_async_commit();
    }
    if (chunk >= 0) Product::template multiply<along, along>(a, b, sum);
  }
}

// Elements of the workspace; parts == 0 where there is no position.
inline GateWorkspaceSizes gate_workspace_sizes(const GateSizes& sizes, const GateProducts& products) {
  const int64_t inputs = input_channels(sizes), positions = all_positions(sizes), rows = kGates * sizes.channels;
  return {inputs * positions, rows * positions, sizes.kernel_size == 0 ? 0 : inputs * positions,
          products.parts * rows * inputs};
}

// dpointwise[row, input] over one part of the positions.
template <class S, class Product>
__device__ __forceinline__ void dpointwise_tile(const GateSizes& sizes, const GateProducts& products, int64_t block,
                                                GateWorkspace<Wide<S>, typename Product::Operand> workspace) {
  using T = Wide<S>;
  using Operand = typename Product::Operand;
  const int64_t inputs = input_channels(sizes), rows = kGates * sizes.channels, all = all_positions(sizes);
  const int64_t part = block / (products.row_tiles * products.column_tiles),
                first_row = block / products.column_tiles % products.row_tiles * (kGates * kPartRows),
                first_input = block % products.column_tiles * Product::kColumns,
                end = min(all, (part + 1) * products.positions_a_part);
  const int64_t start = part * products.positions_a_part;
  const bool aligned = all % kCopiedAtOnce == 0;
  T sum[kGates][Product::kPairs];
  multiply_chunks<Product, kGates, Along::kDepth>(
      ceil_div(end - start, kProductDepth), aligned,
      [&](int64_t chunk, int row, int k) {
        const int64_t position = start + chunk * kProductDepth + k;
        return Source<Operand>{workspace.dgates + ((first_row + row) * all + position),
                               first_row + row < rows && position < end};
      },
      aligned,
      [&](int64_t chunk, int column, int k) {
        const int64_t position = start + chunk * kProductDepth + k;
        return Source<Operand>{workspace.u + ((first_input + column) * all + position),
                               first_input + column < inputs && position < end};
      },
      sum);
#pragma unroll
  for (int group = 0; group < kGates; ++group) {
#pragma unroll
    for (int pair = 0; pair < Product::kPairs; ++pair) {
      const int64_t row = first_row + group * kPartRows + Product::row(pair),
                    input = first_input + Product::column(pair);
      if (row < rows && input < inputs) workspace.dpointwise[(part * rows + row) * inputs + input] = sum[group][pair];
    }
  }
}

// Where the gradient of channel `channel` of [z; h] of a sample goes.
template <class S>
__device__ __forceinline__ Global<S> input_gradient_plane(const GateSizes& sizes, const GateInputGradients<S>& out,
                                                          int64_t batch, int64_t channel) {
  const int64_t area = sizes.height * sizes.width;
  if (channel < sizes.z_channels) return out.dz + (batch * sizes.z_channels + channel) * area;
  return out.dh + (batch * sizes.channels + channel - sizes.z_channels) * area;
}

// du[input, position]: into the workspace, or, without a depthwise filter, to where dz and dh go.
template <class S, class Product>
__device__ __forceinline__ void du_tile(const GateInputs<S>& in, const GateProducts& products, int64_t block,
                                        GateWorkspace<Wide<S>, typename Product::Operand> workspace,
                                        const GateInputGradients<S>& out) {
  using T = Wide<S>;
  using Operand = typename Product::Operand;
  const int64_t inputs = input_channels(in.sizes), rows = kGates * in.sizes.channels, all = all_positions(in.sizes);
  const int64_t first_input = block % products.input_tiles * (kInputParts * kPartRows),
                first_position = block / products.input_tiles * Product::kColumns,
                area = in.sizes.height * in.sizes.width, first_batch = first_position / area,
                first_in_sample = first_position % area;
  T sum[kInputParts][Product::kPairs];
  multiply_chunks<Product, kInputParts, Along::kOther>(
      ceil_div(rows, kProductDepth), in.aligned.pointwise,
      [&](int64_t chunk, int input, int k) {
        const int64_t row = chunk * kProductDepth + k;
        return Source<S>{in.pointwise + (row * inputs + first_input + input),
                         first_input + input < inputs && row < rows};
      },
      all % kCopiedAtOnce == 0,
      [&](int64_t chunk, int column, int k) {
        const int64_t row = chunk * kProductDepth + k, position = first_position + column;
        return Source<Operand>{workspace.dgates + (row * all + position), row < rows && position < all};
      },
      sum);
#pragma unroll
  for (int group = 0; group < kInputParts; ++group) {
#pragma unroll
    for (int pair = 0; pair < Product::kPairs; ++pair) {
      const int64_t input = first_input + group * kPartRows + Product::row(pair),
                    position = first_position + Product::column(pair);
      if (input >= inputs || position >= all) continue;
      if (in.sizes.kernel_size != 0) {
        workspace.du[input * all + position] = sum[group][pair];
      } else {
        int64_t batch = first_batch, in_sample = first_in_sample + Product::column(pair);
        for (; in_sample >= area; in_sample -= area) ++batch;
        input_gradient_plane(in.sizes, out, batch, input)[in_sample] = narrow<S>(sum[group][pair]);
      }
    }
  }
}

template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, kBlocksAtOnce<Wide<S>>)
    separable_gates_backward_products_kernel(GateInputs<S> in, GateProducts products,
                                             GateWorkspace<Wide<S>, typename Product::Operand> workspace,
                                             GateInputGradients<S> out) {
  if constexpr (served_here<S, Product>()) {
    const int64_t weight_blocks = products.weight_blocks();
    if (blockIdx.x < weight_blocks) {
      dpointwise_tile<S, Product>(in.sizes, products, blockIdx.x, workspace);
    } else {
      du_tile<S, Product>(in, products, blockIdx.x - weight_blocks, workspace, out);
    }
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
