// separable_gates on CUDA devices: which way to multiply where, and the launches.

#include <cstdint>
#include <string>

#include "fastsam/cuda_kernels.h"
#include "fastsam/launch.cuh"
#include "fastsam/separable_gates_channels.cuh"

namespace fastsam::cuda {
namespace {

// Calls use() with a Product: the fastest that the device has for S and the wanted precision.
template <class S, class Use>
auto with_product(const Launch& launch, Use use) {
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

template <class S>
MapView<DeviceType<S>> view(const Map<const S>& map) {
  return {on_device(map.data), map.stride_batch, map.stride_channel};
}

template <class Call>
auto inputs_of(const Call& call) {
  using View = decltype(view(call.h));
  using Device = std::remove_const_t<std::remove_pointer_t<decltype(View::data)>>;
  return GateInputs<Device>{call.sizes,
                            view(call.z),
                            view(call.h),
                            view(call.m),
                            on_device(call.depthwise),
                            on_device(call.pointwise),
                            on_device(call.bias),
                            gate_alignment(call)};
}

void check_filter(int64_t windows) {
  if (windows > 0) return;
  throw LaunchError("needs a smaller kernel size: a window and its filter must fit into " +
                    std::to_string(kGateSharedBytes / 1024) + " KiB of shared memory");
}

// The parts of the workspace, one behind the other.
template <class T, class Operand>
struct WorkspaceLayout {
  explicit WorkspaceLayout(const GateWorkspaceSizes& elements, void* start = nullptr)
      : next(static_cast<char*>(start)) {
    parts.u = take<Operand>(elements.u);
    parts.dgates = take<Operand>(elements.dgates);
    parts.du = take<T>(elements.du);
    parts.dpointwise = take<T>(elements.dpointwise);
  }

  template <class E>
  E* take(int64_t count) {
    E* const taken = next == nullptr ? nullptr : reinterpret_cast<E*>(next + bytes);
    bytes += shared_bytes<E>(count);
    return taken;
  }

  char* next;
  int64_t bytes = 0;
  GateWorkspace<T, Operand> parts;
};

// Launches a kernel that makes gates with Product.
template <class Product, class Kernel, class Inputs, class... Arguments>
void launch_gates(const GateSizes& sizes, const Launch& launch, Kernel kernel, const Inputs& in,
                  const Arguments&... arguments) {
  const GateLaunch gates = gate_launch<Product>(sizes);
  check_filter(gates.planes);
  launch_kernel(launch, {dim3(grid_size(gates.blocks)), dim3(kProductThreads), gates.shared_bytes}, kernel, in,
                gates.planes, arguments...);
}

template <class S, class Product>
void launch_forward(const SeparableGatesForward<S>& call, const Launch& launch) {
  with_tile_size<Product>(call.sizes, launch.multiprocessors, [&](auto tiled) {
    launch_gates<decltype(tiled)>(call.sizes, launch, separable_gates_forward_kernel<DeviceType<S>, decltype(tiled)>,
                                  inputs_of(call), on_device(call.h_hat), on_device(call.m_new));
  });
}

template <class S, class Product>
void launch_backward(const SeparableGatesBackward<S>& call, void* workspace, const Launch& launch) {
  using Operand = typename Product::Operand;
  using Device = DeviceType<S>;
  const GateSizes& sizes = call.sizes;
  const GateProducts products = gate_products<Product>(sizes, launch.multiprocessors);
  const GateChannels channels = gate_channels<Compute<S>>(sizes, call.dbias != nullptr);
  check_filter(channels.warps);
  const auto in = inputs_of(call);
  const GateInputGradients<Device> out = {on_device(call.dz), on_device(call.dh)};
  const WorkspaceLayout<Compute<S>, Operand> layout(gate_workspace_sizes(sizes, products), workspace);
  if (all_positions(sizes) > 0) {
    with_tile_size<Product>(sizes, launch.multiprocessors, [&](auto tiled) {
      launch_gates<decltype(tiled)>(sizes, launch, separable_gates_backward_gates_kernel<Device, decltype(tiled)>, in,
                                    GateOutputGradients<Device>{view(call.dh_hat), view(call.dm_new)},
                                    on_device(call.dm), layout.parts);
    });
    launch_kernel(launch, {dim3(grid_size(products.blocks())), dim3(kProductThreads), product_shared_bytes<Product>()},
                  separable_gates_backward_products_kernel<Device, Product>, in, products, layout.parts, out);
  }
  launch_kernel(
      launch,
      {dim3(grid_size(channels.blocks())), dim3(kChannelThreads),
       channel_shared_bytes<Compute<S>>(sizes, channels.warps)},
      separable_gates_backward_channels_kernel<Device, Operand>, in, channels, products.parts, layout.parts, out,
      GateWeightGradients<Device>{on_device(call.ddepthwise), on_device(call.dpointwise), on_device(call.dbias)});
}

}  // namespace

template <class S>
void separable_gates_forward(const SeparableGatesForward<S>& call, const Launch& launch) {
  if (all_positions(call.sizes) == 0) return;
  described(
      [&] { return describe("forward", call.sizes); }, launch,
      [&] { with_product<S>(launch, [&](auto product) { launch_forward<S, decltype(product)>(call, launch); }); });
}

template <class S>
int64_t separable_gates_backward_workspace(const SeparableGatesBackward<S>& call, const Launch& launch) {
  return with_product<S>(launch, [&](auto product) {
    using Product = decltype(product);
    const GateProducts products = gate_products<Product>(call.sizes, launch.multiprocessors);
    return WorkspaceLayout<Compute<S>, typename Product::Operand>(gate_workspace_sizes(call.sizes, products)).bytes;
  });
}

template <class S>
void separable_gates_backward(const SeparableGatesBackward<S>& call, void* workspace, const Launch& launch) {
  described([&] { return describe("backward", call.sizes); }, launch,
            [&] {
              with_product<S>(launch,
                              [&](auto product) { launch_backward<S, decltype(product)>(call, workspace, launch); });
            });
}

#define FASTSAM_INSTANTIATE(S)                                                                             \
  template void separable_gates_forward<S>(const SeparableGatesForward<S>&, const Launch&);                \
  template int64_t separable_gates_backward_workspace<S>(const SeparableGatesBackward<S>&, const Launch&); \
  template void separable_gates_backward<S>(const SeparableGatesBackward<S>&, void*, const Launch&);

FASTSAM_INSTANTIATE(float)
FASTSAM_INSTANTIATE(double)
FASTSAM_INSTANTIATE(float16)
FASTSAM_INSTANTIATE(bfloat16)

}  // namespace fastsam::cuda
