// The kernels of separable_gates, for every storage type and way to multiply. Fields are the members of the call in
// their order, as fastsam/ops/separable_gates/native.py gives them.
#include "fastsam/separable_gates_channels.cuh"

#include <vector>

#include "fields.h"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

// Whether everything is copied as if it were aligned, which the harness has to report where it is not.
bool all_taken_for_aligned = false;

template <class S>
MapView<DeviceType<S>> view(const Map<const S>& map, int64_t channels, const GateSizes& sizes, const char* name) {
  const int64_t last = (sizes.batch - 1) * map.stride_batch + (channels - 1) * map.stride_channel;
  const int64_t count = map.data == nullptr ? 0 : last + sizes.height * sizes.width;
  return {simt::input(on_device(map.data), count, name), map.stride_batch, map.stride_channel};
}

template <class Call>
void read_inputs(Fields& fields, Call& call) {
  GateSizes& sizes = call.sizes;
  fields.read(sizes.batch, sizes.channels, sizes.z_channels, sizes.height, sizes.width, sizes.kernel_size);
  fields.read(call.z, call.h, call.m, call.depthwise, call.pointwise, call.bias);
}

template <class S, class Call>
GateInputs<DeviceType<S>> inputs_of(const Call& call) {
  const GateSizes& sizes = call.sizes;
  const int64_t inputs = input_channels(sizes), taps = sizes.kernel_size * sizes.kernel_size;
  return {sizes,
          view(call.z, sizes.z_channels, sizes, "z"),
          view(call.h, sizes.channels, sizes, "h"),
          view(call.m, sizes.channels, sizes, "m"),
          simt::input(on_device(call.depthwise), inputs * taps, "depthwise"),
          simt::input(on_device(call.pointwise), 3 * sizes.channels * inputs, "pointwise"),
          simt::input(on_device(call.bias), 3 * sizes.channels, "bias"),
          all_taken_for_aligned ? GateAlignment{true, true, true} : gate_alignment(call)};
}

simt::LaunchShape shape(int64_t blocks, int64_t shared_bytes, int threads = kProductThreads) {
  return {dim3(grid_size(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes};
}

template <class S, class Product>
const char* run_forward(const int64_t* address, int multiprocessors) {
  return simt::run([&] {
    Fields fields(address);
    SeparableGatesForward<S> call = {};
    read_inputs(fields, call);
    fields.read(call.h_hat, call.m_new);
    const int64_t count = call.sizes.channels * all_positions(call.sizes);
    with_tile_size<Product>(call.sizes, multiprocessors, [&](auto tiled) {
      const GateLaunch launch = gate_launch<decltype(tiled)>(call.sizes);
      simt::launch("separable_gates_forward", separable_gates_forward_kernel<DeviceType<S>, decltype(tiled)>,
                   shape(launch.blocks, launch.shared_bytes), inputs_of<S>(call), launch.planes,
                   simt::output(on_device(call.h_hat), count, "h_hat"),
                   simt::output(on_device(call.m_new), count, "m_new"));
    });
  });
}

// All launches of the backward pass, with a workspace that is not initialised.
template <class S, class Product>
void launch_backward(const SeparableGatesBackward<S>& call, int multiprocessors) {
  using Device = DeviceType<S>;
  using T = Wide<Device>;
  using Operand = typename Product::Operand;
  const GateSizes& sizes = call.sizes;
  const int64_t inputs = input_channels(sizes), positions = all_positions(sizes), rows = 3 * sizes.channels;
  const GateProducts products = gate_products<Product>(sizes, multiprocessors);
  const GateChannels channels = gate_channels<T>(sizes, call.dbias != nullptr);
  const GateWorkspaceSizes elements = gate_workspace_sizes(sizes, products);
  std::vector<Operand> u(elements.u), dgates(elements.dgates);
  std::vector<T> du(elements.du), dpointwise(elements.dpointwise);
  const GateWorkspace<T, Operand> workspace = {
      simt::output(u.data(), elements.u, "u"), simt::output(dgates.data(), elements.dgates, "dgates"),
      simt::output(du.data(), elements.du, "du"),
      simt::output(dpointwise.data(), elements.dpointwise, "parts of dpointwise")};
  const GateInputGradients<Device> out = {simt::output(on_device(call.dz), sizes.z_channels * positions, "dz"),
                                          simt::output(on_device(call.dh), sizes.channels * positions, "dh")};
  const GateOutputGradients<Device> upstream = {view(call.dh_hat, sizes.channels, sizes, "dh_hat"),
                                                view(call.dm_new, sizes.channels, sizes, "dm_new")};
  const int64_t taps = inputs * sizes.kernel_size * sizes.kernel_size;
  const GateWeightGradients<Device> weights = {simt::output(on_device(call.ddepthwise), taps, "ddepthwise"),
                                               simt::output(on_device(call.dpointwise), rows * inputs, "dpointwise"),
                                               simt::output(on_device(call.dbias), rows, "dbias")};
  const GateInputs<Device> in = inputs_of<S>(call);
  if (positions > 0) {
    const auto dm = simt::output(on_device(call.dm), sizes.channels * positions, "dm");
    with_tile_size<Product>(sizes, multiprocessors, [&](auto tiled) {
      const GateLaunch first = gate_launch<decltype(tiled)>(sizes);
      simt::launch("separable_gates_backward_gates", separable_gates_backward_gates_kernel<Device, decltype(tiled)>,
                   shape(first.blocks, first.shared_bytes), in, first.planes, upstream, dm, workspace);
    });
    simt::launch("separable_gates_backward_products", separable_gates_backward_products_kernel<Device, Product>,
                 shape(products.blocks(), product_shared_bytes<Product>()), in, products, workspace, out);
  }
  simt::launch("separable_gates_backward_channels", separable_gates_backward_channels_kernel<Device, Operand>,
               shape(channels.blocks(), channel_shared_bytes<T>(sizes, channels.warps), kChannelThreads), in, channels,
               products.parts, workspace, out, weights);
}

template <class S, class Product>
const char* run_backward(const int64_t* address, int multiprocessors) {
  return simt::run([&] {
    Fields fields(address);
    SeparableGatesBackward<S> call = {};
    read_inputs(fields, call);
    fields.read(call.dh_hat, call.dm_new, call.dz, call.dh, call.dm, call.ddepthwise, call.dpointwise, call.dbias);
    launch_backward<S, Product>(call, multiprocessors);
  });
}

// How a call would be launched: blocks and shared bytes of the launches of the forward and backward pass, and how many
// warps of a channel's block have windows.
template <class Product>
const char* tell_launches(const GateSizes& sizes, int multiprocessors, int64_t* blocks, int64_t* bytes,
                          int64_t* warps) {
  using T = typename Product::Accumulator;
  const Launch launch = {0, nullptr, 86, multiprocessors, 99 * 1024, Precision::kFloat32};
  return simt::run([&] {
    described([&] { return describe("backward", sizes); }, launch,
              [&] {
                with_tile_size<Product>(sizes, multiprocessors, [&](auto tiled) {
                  const GateLaunch gates = gate_launch<decltype(tiled)>(sizes);
                  blocks[0] = grid_size(gates.blocks);
                  bytes[0] = gates.planes == 0 ? INT64_MAX : gates.shared_bytes;
                });
                blocks[1] = grid_size(gate_products<Product>(sizes, multiprocessors).blocks());
                bytes[1] = product_shared_bytes<Product>();
                const GateChannels channels = gate_channels<T>(sizes, true);
                blocks[2] = grid_size(channels.blocks());
                bytes[2] = channel_shared_bytes<T>(sizes, channels.warps);
                *warps = channels.warps;
              });
  });
}

}  // namespace
}  // namespace fastsam::cuda

using namespace fastsam;
using namespace fastsam::cuda;

#define FASTSAM_LAUNCHES(name, ...)                                                                                    \
  extern "C" const char* launches_##name(int64_t batch, int64_t channels, int64_t z_channels, int64_t height,          \
                                         int64_t width, int64_t kernel_size, int64_t multiprocessors, int64_t* blocks, \
                                         int64_t* bytes, int64_t* warps) {                                             \
    return tell_launches<__VA_ARGS__>({batch, channels, z_channels, height, width, kernel_size},                       \
                                      static_cast<int>(multiprocessors), blocks, bytes, warps);                        \
  }

FASTSAM_LAUNCHES(float32, FmaProduct<float, 64>)
FASTSAM_LAUNCHES(float64, FmaProduct<double, 64>)
FASTSAM_LAUNCHES(half_16, HalfProduct<__half, 16, 64>)

#define FASTSAM_GATES(name, ...)                                                           \
  extern "C" const char* forward_##name(const int64_t* fields, int64_t multiprocessors) {  \
    return run_forward<__VA_ARGS__>(fields, static_cast<int>(multiprocessors));            \
  }                                                                                        \
  extern "C" const char* backward_##name(const int64_t* fields, int64_t multiprocessors) { \
    return run_backward<__VA_ARGS__>(fields, static_cast<int>(multiprocessors));           \
  }

extern "C" const char* take_all_for_aligned(int64_t yes) {
  all_taken_for_aligned = yes != 0;
  return nullptr;
}

FASTSAM_GATES(float32, float, FmaProduct<float, 64>)
FASTSAM_GATES(half_8, float16, HalfProduct<__half, 8, 64>)
FASTSAM_GATES(half_16, float16, HalfProduct<__half, 16, 64>)
#ifndef __CUDACC__  // for devices csrc/cuda/separable_gates.cu compiles the others, which take nvcc minutes
FASTSAM_GATES(float64, double, FmaProduct<double, 64>)
FASTSAM_GATES(tf32, float, Tf32Product<64>)
FASTSAM_GATES(half, float16, FmaProduct<float, 64>)
FASTSAM_GATES(bfloat16, fastsam::bfloat16, FmaProduct<float, 64>)
FASTSAM_GATES(bfloat16_16, fastsam::bfloat16, HalfProduct<__nv_bfloat16, 16, 64>)
#endif
