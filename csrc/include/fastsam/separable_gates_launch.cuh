// The host's part of separable_gates, the same for every platform: which way to multiply where, the workspace, and the
// launches.
#pragma once

#include "fastsam/separable_gates_channels.cuh"

namespace fastsam::cuda {

// Calls use() with a Product: the fastest that the device has for S and the wanted precision.
template <class S, class Use>
auto with_gate_product(const Launch& launch, Use use) {
  constexpr int kColumns = 64;
  using Device = DeviceType<S>;
  if constexpr (std::is_same_v<S, double>) {
    return use(FmaProduct<double, kColumns>());
  } else if constexpr (std::is_same_v<S, float>) {
    if (launch.precision != Precision::kTf32) return use(FmaProduct<float, kColumns>());
    return with_first_served<S>(launch, use, Tf32Product<kColumns>(), FmaProduct<float, kColumns>());
  } else if constexpr (std::is_same_v<S, float16>) {
    return with_first_served<S>(launch, use, HalfProduct<Device, 16, kColumns>(), HalfProduct<Device, 8, kColumns>(),
                                FmaProduct<float, kColumns>());
  } else {
    return with_first_served<S>(launch, use, HalfProduct<Device, 16, kColumns>(), FmaProduct<float, kColumns>());
  }
}

inline void check_filter(int64_t windows) {
  if (windows > 0) return;
  throw LaunchError("needs a smaller kernel size: a window and its filter must fit into " +
                    std::to_string(kGateSharedBytes / 1024) + " KiB of shared memory");
}

// How a platform sees the maps and weights of a call.
template <class Platform, class S>
MapView<DeviceType<S>> gate_map(const Platform& platform, const Map<const S>& map, int64_t channels,
                                const GateSizes& sizes, const char* name) {
  const int64_t last = (sizes.batch - 1) * map.stride_batch + (channels - 1) * map.stride_channel;
  return {platform.input(on_device(map.data), last + sizes.height * sizes.width, name), map.stride_batch,
          map.stride_channel};
}

template <class S, class Platform, class Call>
GateInputs<DeviceType<S>> gate_inputs(const Platform& platform, const Call& call) {
  const GateSizes& sizes = call.sizes;
  const int64_t inputs = input_channels(sizes), rows = kGates * sizes.channels;
  return {sizes,
          gate_map(platform, call.z, sizes.z_channels, sizes, "z"),
          gate_map(platform, call.h, sizes.channels, sizes, "h"),
          gate_map(platform, call.m, sizes.channels, sizes, "m"),
          platform.input(on_device(call.depthwise), inputs * sizes.kernel_size * sizes.kernel_size, "depthwise"),
          platform.input(on_device(call.pointwise), rows * inputs, "pointwise"),
          platform.input(on_device(call.bias), rows, "bias"),
          gate_alignment(call)};
}

// The parts of the workspace, one behind the other; without a start it only counts the bytes.
template <class T, class Operand>
class GateWorkspaceLayout {
 public:
  explicit GateWorkspaceLayout(const GateWorkspaceSizes& elements, void* start = nullptr)
      : elements_(elements), start_(static_cast<char*>(start)) {
    take(u_, elements.u);
    take(dgates_, elements.dgates);
    take(du_, elements.du);
    take(dpointwise_, elements.dpointwise);
  }

  int64_t bytes() const { return bytes_; }

  template <class Platform>
  GateWorkspace<T, Operand> view(const Platform& platform) const {
    return {platform.output(u_, elements_.u, "u"), platform.output(dgates_, elements_.dgates, "dgates"),
            platform.output(du_, elements_.du, "du"),
            platform.output(dpointwise_, elements_.dpointwise, "parts of dpointwise")};
  }

 private:
  template <class E>
  void take(E*& part, int64_t count) {
    if (start_ != nullptr && count > 0) part = reinterpret_cast<E*>(start_ + bytes_);
    bytes_ += shared_bytes<E>(count);
  }

  GateWorkspaceSizes elements_;
  char* start_;
  int64_t bytes_ = 0;
  Operand *u_ = nullptr, *dgates_ = nullptr;  // nullptr where they have no elements
  T *du_ = nullptr, *dpointwise_ = nullptr;
};

// Starts a kernel that makes gates with Product.
template <class Product, class Platform, class Kernel, class Inputs, class... Arguments>
void start_gates(const Platform& platform, const char* name, const GateSizes& sizes, Kernel kernel, const Inputs& in,
                 const Arguments&... arguments) {
  const GateLaunch gates = gate_launch<Product>(sizes);
  check_filter(gates.planes);
  platform.start(name, {dim3(grid_size(gates.blocks)), dim3(kProductThreads), gates.shared_bytes}, kernel, in,
                 gates.planes, arguments...);
}

template <class Product, class S, class Platform>
void start_forward(const Platform& platform, const SeparableGatesForward<S>& call, const Launch& launch) {
  const GateSizes& sizes = call.sizes;
  const int64_t count = sizes.channels * all_positions(sizes);
  const auto in = gate_inputs<S>(platform, call);
  const auto h_hat = platform.output(on_device(call.h_hat), count, "h_hat"),
             m_new = platform.output(on_device(call.m_new), count, "m_new");
  with_tile_size<Product>(sizes, launch.multiprocessors, [&](auto tiled) {
    start_gates<decltype(tiled)>(platform, "separable_gates_forward", sizes,
                                 separable_gates_forward_kernel<DeviceType<S>, decltype(tiled)>, in, h_hat, m_new);
  });
}

template <class Product, class S, class Platform>
void start_backward(const Platform& platform, const SeparableGatesBackward<S>& call, void* start,
                    const Launch& launch) {
  using Device = DeviceType<S>;
  using T = Wide<Device>;
  using Operand = typename Product::Operand;
  const GateSizes& sizes = call.sizes;
  const GateProducts products = gate_products<Product>(sizes, launch.multiprocessors);
  const GateChannels channels = gate_channels<T>(sizes, call.dbias != nullptr);
  check_filter(channels.warps);
  const int64_t inputs = input_channels(sizes), positions = all_positions(sizes), rows = kGates * sizes.channels;
  const auto in = gate_inputs<S>(platform, call);
  const auto workspace = GateWorkspaceLayout<T, Operand>(gate_workspace_sizes(sizes, products), start).view(platform);
  const GateInputGradients<Device> out = {platform.output(on_device(call.dz), sizes.z_channels * positions, "dz"),
                                          platform.output(on_device(call.dh), sizes.channels * positions, "dh")};
  if (positions > 0) {
    const GateOutputGradients<Device> upstream = {gate_map(platform, call.dh_hat, sizes.channels, sizes, "dh_hat"),
                                                  gate_map(platform, call.dm_new, sizes.channels, sizes, "dm_new")};
    const auto dm = platform.output(on_device(call.dm), sizes.channels * positions, "dm");
    with_tile_size<Product>(sizes, launch.multiprocessors, [&](auto tiled) {
      start_gates<decltype(tiled)>(platform, "separable_gates_backward_gates", sizes,
                                   separable_gates_backward_gates_kernel<Device, decltype(tiled)>, in, upstream, dm,
                                   workspace);
    });
    platform.start("separable_gates_backward_products",
                   {dim3(grid_size(products.blocks())), dim3(kProductThreads), product_shared_bytes<Product>()},
                   separable_gates_backward_products_kernel<Device, Product>, in, products, workspace, out);
  }
  const int64_t taps = inputs * sizes.kernel_size * sizes.kernel_size;
  const GateWeightGradients<Device> weights = {platform.output(on_device(call.ddepthwise), taps, "ddepthwise"),
                                               platform.output(on_device(call.dpointwise), rows * inputs, "dpointwise"),
                                               platform.output(on_device(call.dbias), rows, "dbias")};
  platform.start(
      "separable_gates_backward_channels",
      {dim3(grid_size(channels.blocks())), dim3(kChannelThreads), channel_shared_bytes<T>(sizes, channels.warps)},
      separable_gates_backward_channels_kernel<Device, Operand>, in, channels, products.parts, workspace, out, weights);
}

template <class S, class Platform>
void separable_gates_forward_on(const Platform& platform, const SeparableGatesForward<S>& call, const Launch& launch) {
  if (all_positions(call.sizes) == 0) return;
  described([&] { return describe("forward", call.sizes); }, launch,
            [&] {
              with_gate_product<S>(launch,
                                   [&](auto product) { start_forward<decltype(product)>(platform, call, launch); });
            });
}

template <class S>
int64_t separable_gates_backward_bytes(const SeparableGatesBackward<S>& call, const Launch& launch) {
  return with_gate_product<S>(launch, [&](auto product) {
    using Product = decltype(product);
    const GateProducts products = gate_products<Product>(call.sizes, launch.multiprocessors);
    using Layout = GateWorkspaceLayout<Compute<S>, typename Product::Operand>;
    return Layout(gate_workspace_sizes(call.sizes, products)).bytes();
  });
}

template <class S, class Platform>
void separable_gates_backward_on(const Platform& platform, const SeparableGatesBackward<S>& call, void* workspace,
                                 const Launch& launch) {
  described([&] { return describe("backward", call.sizes); }, launch,
            [&] {
              with_gate_product<S>(
                  launch, [&](auto product) { start_backward<decltype(product)>(platform, call, workspace, launch); });
            });
}

}  // namespace fastsam::cuda
