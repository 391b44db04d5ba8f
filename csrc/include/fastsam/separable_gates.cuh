// The separable gates: u = depthwise * [z; h], the gates i, g, o = pointwise u + bias, m' = (1 - sigmoid(i)) m +
// sigmoid(i) tanh(g) and h^ = sigmoid(o) m' in one launch.
//
// A block makes all three gates of 32 channels on a tile of 8 x 8 or 8 x 4 positions: i, g and o of a channel and
// position are sums of the same thread. It goes through the channels of [z; h] in chunks of 16: windows with their halo
// and the weights go to shared memory, then u, then a product on top. u is made again for each group of 32 channels: 2
// k^2 operations beside 192 of the product.
#pragma once

#include <type_traits>

#include "fastsam/activations.cuh"
#include "fastsam/block_product.cuh"
#include "fastsam/launch.cuh"
#include "fastsam/planes.cuh"

namespace fastsam::cuda {

constexpr int kGates = 3;

// A (B, C, N) map in device memory.
template <class S>
struct MapView {
  Global<const S> data;
  int64_t stride_batch;
  int64_t stride_channel;
};

// Which maps and weights of 16 bits a launch can copy several elements at a time: those in which all rows and planes
// start at multiples of as many. Other types are copied one by one, whatever this says.
struct GateAlignment {
  bool maps, depthwise, pointwise;
};

template <class S>
struct GateInputs {
  GateSizes sizes;
  MapView<S> z, h, m;
  Global<const S> depthwise, pointwise, bias;
  GateAlignment aligned;
};

__host__ __device__ inline int64_t input_channels(const GateSizes& sizes) { return sizes.z_channels + sizes.channels; }
__host__ __device__ inline int64_t tile_count(const GateSizes& sizes, int tile_height) {
  return ceil_div(sizes.width, kTileWidth) * ceil_div(sizes.height, tile_height);
}

#ifndef __CUDACC_RTC__

// The operator and its shapes, for error messages.
inline std::string describe(const char* direction, const GateSizes& sizes) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return std::string("separable_gates ") + direction + " (batch " + number(sizes.batch) + ", channels " +
         number(sizes.channels) + ", z channels " + number(sizes.z_channels) + ", map " + number(sizes.height) + " x " +
         number(sizes.width) + ", kernel size " + number(sizes.kernel_size) + ")";
}

#endif

// Which tile of which sample, and which group of 32 channels a block has. Groups come first: they share inputs.
struct GatePlace {
  int64_t batch;
  int top, left, first_channel;
};

__device__ __forceinline__ GatePlace gate_place(const GateSizes& sizes, int tile_height) {
  const int64_t groups = ceil_div(sizes.channels, kPartRows), tiles = tile_count(sizes, tile_height),
                across = ceil_div(sizes.width, kTileWidth), tile = blockIdx.x / groups % tiles;
  return {static_cast<int64_t>(blockIdx.x) / groups / tiles, static_cast<int>(tile / across * tile_height),
          static_cast<int>(tile % across * kTileWidth), static_cast<int>(blockIdx.x % groups * kPartRows)};
}

template <class Call>
GateAlignment gate_alignment(const Call& call) {
  const auto is_aligned = [](const auto& map) {
    return aligned_for_copies(map.data) && (map.stride_batch | map.stride_channel) % kCopiedAtOnce == 0;
  };
  const bool maps = is_aligned(call.h) && (call.sizes.z_channels == 0 || is_aligned(call.z));
  return {call.sizes.width % kCopiedAtOnce == 0 && maps, aligned_for_copies(call.depthwise),
          input_channels(call.sizes) % kCopiedAtOnce == 0 && aligned_for_copies(call.pointwise)};
}

// What windows and filters are kept as: as they are where a product has operands of 16 bits, else ready for arithmetic.
template <class Product>
using WindowElement = std::conditional_t<sizeof(typename Product::Operand) == 2, typename Product::Operand,
                                         typename Product::Accumulator>;

// Shared memory of a block: `planes` windows and their filters at a time.
template <class Product>
int64_t gate_shared_bytes(const GateSizes& sizes, int planes) {
  using E = WindowElement<Product>;
  const int64_t product = shared_bytes<typename Product::Operand>(2 * Product::template kSizeA<kGates>) +
                          shared_bytes<typename Product::Operand>(Product::kSizeB);
  if (sizes.kernel_size == 0) return product;
  const int k = static_cast<int>(sizes.kernel_size);
  return product + shared_bytes<E>(planes * window_shape<E>(Product::kColumns / kTileWidth, k).plane) +
         shared_bytes<E>(planes * k * k);
}

// How a kernel of gates is started. 48 KiB, which every card gives without asking; of the 32 KiB that float32 takes at
// k = 5 there is room for three blocks on a multiprocessor, two on capability 7.5. No planes: the filter is too large.
struct GateLaunch {
  int64_t blocks, shared_bytes;
  int planes;
};

constexpr int64_t kGateSharedBytes = 48 * 1024;

template <class Product>
GateLaunch gate_launch(const GateSizes& sizes) {
  const int planes =
      planes_that_fit(kGateSharedBytes, [&](int count) { return gate_shared_bytes<Product>(sizes, count); });
  const int64_t blocks =
      sizes.batch * tile_count(sizes, Product::kColumns / kTileWidth) * ceil_div(sizes.channels, kPartRows);
  return {blocks, gate_shared_bytes<Product>(sizes, planes), planes};
}

// Calls use() with `Product`, or with one for tiles of 8 x 4 instead of 8 x 8 if the device has more multiprocessors
// than there would be blocks.
template <class Product, class Use>
void with_tile_size(const GateSizes& sizes, int multiprocessors, Use use) {
  if (gate_launch<Product>(sizes).blocks < multiprocessors) {
    use(typename Product::template WithColumns<Product::kColumns / 2>());
  } else {
    use(Product());
  }
}

template <class S>
__device__ __forceinline__ Wide<S> at_map(const MapView<S>& map, int64_t batch, int64_t channel, int64_t position) {
  return widen(__ldg(map.data + (batch * map.stride_batch + channel * map.stride_channel + position)));
}

// Channel `channel` of [z; h], nullptr beyond the last one.
template <class S>
__device__ __forceinline__ Global<const S> input_plane(const GateInputs<S>& in, int64_t batch, int64_t channel) {
  if (channel < in.sizes.z_channels) {
    return in.z.data + (batch * in.z.stride_batch + channel * in.z.stride_channel);
  }
  const int64_t of_h = channel - in.sizes.z_channels;
  if (of_h >= in.sizes.channels) return nullptr;
  return in.h.data + (batch * in.h.stride_batch + of_h * in.h.stride_channel);
}

// Blocks of a multiprocessor at the same time, for which there are to be registers.
template <class T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 2 : 4;

// Makes the gates of a tile chunk by chunk.
template <class S, class Product>
class GateBlock {
 public:
  using T = Wide<S>;
  using Operand = typename Product::Operand;
  using E = WindowElement<Product>;
  static constexpr int kTileHeight = Product::kColumns / kTileWidth;

  __device__ __forceinline__ GateBlock(const GateInputs<S>& in, int planes)
      : in_(in),
        place_(gate_place(in.sizes, kTileHeight)),
        inputs_(static_cast<int>(input_channels(in.sizes))),
        k_(static_cast<int>(in.sizes.kernel_size)),
        planes_(planes) {
    SharedArena arena;
    a_ = arena.take<Operand>(2 * Product::template kSizeA<kGates>, "pointwise");
    b_ = arena.take<Operand>(Product::kSizeB, "u");
    if (k_ == 0) return;
    window_ = arena.take<E>(planes * window_shape<E>(kTileHeight, k_).plane, "windows");
    filter_ = arena.take<E>(planes * k_ * k_, "filters");
  }

  // The gates before bias and activation. after_chunk(first channel of [z; h], u of the chunk) may look at u.
  //
  // While a chunk is multiplied the next one is on its way: its weights to the other half of a_, its windows to where
  // those of this chunk, already filtered, were.
  template <class AfterChunk>
  __device__ __forceinline__ void multiply(T (&sum)[kGates][Product::kPairs], AfterChunk after_chunk) {
    clear(sum);
    start_windows(0);
    start_pointwise(0);
    for (int first = 0; first < inputs_; first += kProductDepth) {
      if (k_ == 0) {
        load_inputs(first);
      } else {
        filter_inputs(first);
      }
      start_pointwise(first + kProductDepth);
      Product::template multiply<Along::kDepth, Along::kOther>(pointwise(first), b_, sum);
      after_chunk(first, b_);
    }
  }

  // visit(pair, channel, y, x) for the pairs of this thread that are in the map.
  template <class Visit>
  __device__ __forceinline__ void for_each_pair(Visit visit) const {
#pragma unroll
    for (int pair = 0; pair < Product::kPairs; ++pair) {
      const int channel = place_.first_channel + Product::row(pair), column = Product::column(pair);
      const int y = place_.top + column / kTileWidth, x = place_.left + column % kTileWidth;
      if (channel < in_.sizes.channels && y < in_.sizes.height && x < in_.sizes.width) visit(pair, channel, y, x);
    }
  }

  // Writes a chunk of u to a (inputs, B * N) map.
  __device__ __forceinline__ void store_u(int first, Shared<Operand> u, Global<Operand> to) const {
    const int64_t area = in_.sizes.height * in_.sizes.width;
    for_each_operand<Product::kColumns, Along::kOther>([&](int column, int k) {
      const int64_t y = place_.top + column / kTileWidth, x = place_.left + column % kTileWidth;
      if (first + k >= inputs_ || y >= in_.sizes.height || x >= in_.sizes.width) return;
      to[((first + k) * in_.sizes.batch + place_.batch) * area + y * in_.sizes.width + x] =
          u[Product::template index_b<Along::kOther>(k, column)];
    });
  }

  __device__ __forceinline__ const GatePlace& place() const { return place_; }

 private:
  // Chunks take turns in two halves.
  __device__ __forceinline__ Shared<Operand> pointwise(int first) const {
    return a_ + first / kProductDepth % 2 * Product::template kSizeA<kGates>;
  }

  __device__ __forceinline__ void start_pointwise(int first) {
    if (first >= inputs_) return;
    start_a<Product, kGates, Along::kDepth>(pointwise(first), in_.aligned.pointwise, [&](int row, int k) {
      const int channel = place_.first_channel + row % kPartRows, input = first + k;
      const int64_t gate_row = row / kPartRows * in_.sizes.channels + channel;
      return Source<S>{in_.pointwise + (gate_row * inputs_ + input), channel < in_.sizes.channels && input < inputs_};
    });
    cp_async_commit();
  }

  __device__ __forceinline__ void load_inputs(int first) {
    if (first > 0) __syncthreads();
    start_b<Product, Along::kOther>(b_, in_.aligned.maps, [&](int column, int k) {
      const Global<const S> plane = input_plane(in_, place_.batch, first + k);
      const int y = place_.top + column / kTileWidth, x = place_.left + column % kTileWidth;
      const bool there = plane != nullptr && y < in_.sizes.height && x < in_.sizes.width;
      return Source<S>{plane + (y * in_.sizes.width + x), there};
    });
    cp_async_commit();
    cp_async_wait<0>();
    finish_a<Product, kGates, Along::kDepth>(pointwise(first));
    finish_b<Product, Along::kOther>(b_);
    __syncthreads();
  }

  // Windows and filters of the `planes_` channels from `first` on.
  __device__ __forceinline__ void start_windows(int first) {
    if (k_ == 0 || first >= (inputs_ + kProductDepth - 1) / kProductDepth * kProductDepth) return;
    const WindowShape shape = window_shape<E>(kTileHeight, k_);
    load_windows<S>(in_.aligned.maps, planes_, shape, static_cast<int>(in_.sizes.height),
                    static_cast<int>(in_.sizes.width), window_, [&](int i) {
                      return PlaneWindow<S>{input_plane(in_, place_.batch, first + i), place_.top - k_ / 2,
                                            place_.left - shape.halo};
                    });
    start_filters(first);
    cp_async_commit();
  }

  // The filters of `planes_` channels lie one behind the other.
  __device__ __forceinline__ void start_filters(int first) {
    const int count = planes_ * k_ * k_;
    const int64_t start = static_cast<int64_t>(first) * k_ * k_, left = static_cast<int64_t>(inputs_) * k_ * k_ - start;
    if constexpr (sizeof(E) == 2) {
      if (in_.aligned.depthwise && count % kCopiedAtOnce == 0) {
#pragma unroll 1
        for (int i = threadIdx.x * kCopiedAtOnce; i < count; i += kProductThreads * kCopiedAtOnce)
          copy_elements<S>(filter_ + i, in_.depthwise + (start + i),
                           static_cast<int>(max(min(left - i, int64_t{kCopiedAtOnce}), int64_t{0})));
        return;
      }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kProductThreads)
      copy_element<S>(filter_ + i, in_.depthwise + (start + i), i < left);
  }

  __device__ __forceinline__ void filter_inputs(int first) {
    const WindowShape shape = window_shape<E>(kTileHeight, k_);
    const int plane = threadIdx.x / kTileWidth, column = threadIdx.x % kTileWidth;
    for (int done = 0; done < kProductDepth; done += planes_) {
      cp_async_wait<0>();
      if (done == 0) finish_a<Product, kGates, Along::kDepth>(pointwise(first));
      __syncthreads();
      if (plane < planes_) {
        T u[kTileHeight];
        with_kernel_size(k_, [&](auto size) {
          correlate_column<decltype(size)::value>(k_, window_ + (plane * shape.plane + shape.unused(k_) + column),
                                                  shape.width, filter_ + plane * k_ * k_, u);
        });
#pragma unroll
        for (int row = 0; row < kTileHeight; ++row)
          b_[Product::template index_b<Along::kOther>(done + plane, row * kTileWidth + column)] =
              Product::operand(u[row]);
      }
      __syncthreads();
      start_windows(first + done + planes_);
    }
  }

  const GateInputs<S>& in_;
  GatePlace place_;
  int inputs_, k_, planes_;
  Shared<Operand> a_, b_;
  Shared<E> window_, filter_;
};

// The activated gates of one channel and position, and the new memory.
template <class T>
struct ActivatedGates {
  T i, g, o, m, m_new;
};

template <class T>
__device__ __forceinline__ ActivatedGates<T> activate(const T (&gate)[kGates], T m) {
  const T i = sigmoid(gate[0]), g = hyperbolic_tangent(gate[1]), o = sigmoid(gate[2]);
  return {i, g, o, m, (T(1) - i) * m + i * g};
}

template <class S, class T, int Pairs>
__device__ __forceinline__ ActivatedGates<T> activate(const GateInputs<S>& in, const T (&sum)[kGates][Pairs], int pair,
                                                      int64_t batch, int64_t channel, int64_t position) {
  T gate[kGates];
#pragma unroll
  for (int part = 0; part < kGates; ++part) {
    gate[part] = sum[part][pair];
    if (in.bias != nullptr) gate[part] += widen(__ldg(in.bias + (part * in.sizes.channels + channel)));
  }
  return activate(gate, at_map(in.m, batch, channel, position));
}

template <class S, class Product>
__device__ __forceinline__ void forward_tile(const GateInputs<S>& in, int planes, Global<S> h_hat, Global<S> m_new) {
  using T = Wide<S>;
  GateBlock<S, Product> block(in, planes);
  T sum[kGates][Product::kPairs];
  block.multiply(sum, [](int, Shared<typename Product::Operand>) {});
  const int64_t batch = block.place().batch;
  block.for_each_pair([&](int pair, int64_t channel, int64_t y, int64_t x) {
    const int64_t position = y * in.sizes.width + x;
    const ActivatedGates<T> gates = activate(in, sum, pair, batch, channel, position);
    const int64_t at = (batch * in.sizes.channels + channel) * in.sizes.height * in.sizes.width + position;
    m_new[at] = narrow<S>(gates.m_new);
    h_hat[at] = narrow<S>(gates.o * gates.m_new);
  });
}

template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, kBlocksAtOnce<Wide<S>>)
    separable_gates_forward_kernel(GateInputs<S> in, int planes, Global<S> h_hat, Global<S> m_new) {
  if constexpr (served_here<S, Product>()) {
    forward_tile<S, Product>(in, planes, h_hat, m_new);
  } else {
    __trap();
  }
}

}  // namespace fastsam::cuda
