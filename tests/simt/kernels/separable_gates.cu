// The kernels of separable_gates, for every storage type and way to multiply.
#include "fastsam/separable_gates_channels.cuh"

#include <vector>

#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

// A map on the host: address, strides of batch and channel in elements.
template <class S>
struct HostMap {
  const S* data;
  int64_t stride_batch, stride_channel;
};

template <class S>
MapView<S> view(HostMap<S> map, int64_t channels, const GateSizes& sizes, const char* name) {
  const int64_t last = (sizes.batch - 1) * map.stride_batch + (channels - 1) * map.stride_channel;
  const int64_t count = map.data == nullptr ? 0 : last + sizes.height * sizes.width;
  return {simt::input(map.data, count, name), map.stride_batch, map.stride_channel};
}

template <class S>
struct HostGates {
  GateSizes sizes;
  HostMap<S> z, h, m;
  const Wide<S>*depthwise, *pointwise, *bias;

  GateInputs<S> views() const {
    const int64_t inputs = input_channels(sizes), taps = sizes.kernel_size * sizes.kernel_size;
    return {sizes,
            view(z, sizes.z_channels, sizes, "z"),
            view(h, sizes.channels, sizes, "h"),
            view(m, sizes.channels, sizes, "m"),
            simt::input(depthwise, inputs * taps, "depthwise"),
            simt::input(pointwise, 3 * sizes.channels * inputs, "pointwise"),
            simt::input(bias, 3 * sizes.channels, "bias")};
  }
};

simt::LaunchShape shape(int64_t blocks, int64_t shared_bytes, int threads = kProductThreads) {
  return {dim3(grid_size(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes};
}

template <class Product, class S>
const char* run_forward(const HostGates<S>& gates, S* h_hat, S* m_new, int multiprocessors) {
  return simt::run([&] {
    const int64_t count = gates.sizes.channels * all_positions(gates.sizes);
    with_tile_size<Product>(gates.sizes, multiprocessors, [&](auto tiled) {
      const GateLaunch launch = gate_launch<decltype(tiled)>(gates.sizes);
      simt::launch("separable_gates_forward", separable_gates_forward_kernel<S, decltype(tiled)>,
                   shape(launch.blocks, launch.shared_bytes), gates.views(), launch.planes,
                   simt::output(h_hat, count, "h_hat"), simt::output(m_new, count, "m_new"));
    });
  });
}

template <class S>
struct HostGradients {
  HostMap<S> dh_hat, dm_new;
  S *dz, *dh, *dm;
  Wide<S>*ddepthwise, *dpointwise, *dbias;
};

// All launches of the backward pass, with a workspace of NaN.
template <class Product, class S>
const char* run_backward(const HostGates<S>& gates, const HostGradients<S>& gradients, int multiprocessors) {
  using T = Wide<S>;
  using Operand = typename Product::Operand;
  return simt::run([&] {
    const GateSizes& sizes = gates.sizes;
    const int64_t inputs = input_channels(sizes), positions = all_positions(sizes), rows = 3 * sizes.channels;
    const GateProducts products = gate_products<Product>(sizes, multiprocessors);
    const GateChannels channels = gate_channels<T>(sizes, gradients.dbias != nullptr);
    const GateWorkspaceSizes elements = gate_workspace_sizes(sizes, products);
    std::vector<Operand> u(elements.u), dgates(elements.dgates);
    std::vector<T> du(elements.du), dpointwise(elements.dpointwise);
    const GateWorkspace<T, Operand> workspace = {
        simt::output(u.data(), elements.u, "u"), simt::output(dgates.data(), elements.dgates, "dgates"),
        simt::output(du.data(), elements.du, "du"),
        simt::output(dpointwise.data(), elements.dpointwise, "parts of dpointwise")};
    const GateInputGradients<S> out = {simt::output(gradients.dz, sizes.z_channels * positions, "dz"),
                                       simt::output(gradients.dh, sizes.channels * positions, "dh")};
    const GateOutputGradients<S> upstream = {view(gradients.dh_hat, sizes.channels, sizes, "dh_hat"),
                                             view(gradients.dm_new, sizes.channels, sizes, "dm_new")};
    const GateWeightGradients<T> weights = {
        simt::output(gradients.ddepthwise, inputs * sizes.kernel_size * sizes.kernel_size, "ddepthwise"),
        simt::output(gradients.dpointwise, rows * inputs, "dpointwise"), simt::output(gradients.dbias, rows, "dbias")};
    const GateInputs<S> in = gates.views();
    if (positions > 0) {
      const auto dm = simt::output(gradients.dm, sizes.channels * positions, "dm");
      with_tile_size<Product>(sizes, multiprocessors, [&](auto tiled) {
        const GateLaunch first = gate_launch<decltype(tiled)>(sizes);
        simt::launch("separable_gates_backward_gates", separable_gates_backward_gates_kernel<S, decltype(tiled)>,
                     shape(first.blocks, first.shared_bytes), in, first.planes, upstream, dm, workspace);
      });
      simt::launch("separable_gates_backward_products", separable_gates_backward_products_kernel<S, Product>,
                   shape(products.blocks(), product_shared_bytes<Product>()), in, products, workspace, out);
    }
    simt::launch("separable_gates_backward_channels", separable_gates_backward_channels_kernel<S, Operand>,
                 shape(channels.blocks(), channel_shared_bytes<T>(sizes, channels.warps), kChannelThreads), in,
                 channels, products.parts, workspace, out, weights);
  });
}

}  // namespace
}  // namespace fastsam::cuda

using namespace fastsam;
using namespace fastsam::cuda;

// What all entry points take first: maps with their strides, weights, sizes.
#define FASTSAM_GATE_PARAMETERS(S)                                                                              \
  const S *z, int64_t z_batch, int64_t z_channel, const S *h, int64_t h_batch, int64_t h_channel, const S *m,   \
      int64_t m_batch, int64_t m_channel, const Wide<S>*depthwise, const Wide<S>*pointwise, const Wide<S>*bias, \
      int64_t batch, int64_t channels, int64_t z_channels, int64_t height, int64_t width, int64_t kernel_size
#define FASTSAM_HOST_GATES(S)                                                                                    \
  HostGates<S> {                                                                                                 \
    {batch, channels, z_channels, height, width, kernel_size}, {z, z_batch, z_channel}, {h, h_batch, h_channel}, \
        {m, m_batch, m_channel}, depthwise, pointwise, bias                                                      \
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

#define FASTSAM_GATES(name, S, ...)                                                                                \
  extern "C" const char* forward_##name(FASTSAM_GATE_PARAMETERS(S), S* h_hat, S* m_new, int64_t multiprocessors) { \
    return run_forward<__VA_ARGS__>(FASTSAM_HOST_GATES(S), h_hat, m_new, static_cast<int>(multiprocessors));       \
  }                                                                                                                \
  extern "C" const char* backward_##name(FASTSAM_GATE_PARAMETERS(S), const S* dh_hat, int64_t dh_hat_batch,        \
                                         int64_t dh_hat_channel, const S* dm_new, int64_t dm_new_batch,            \
                                         int64_t dm_new_channel, S* dz, S* dh, S* dm, Wide<S>* ddepthwise,         \
                                         Wide<S>* dpointwise, Wide<S>* dbias, int64_t multiprocessors) {           \
    const HostGradients<S> gradients = {{dh_hat, dh_hat_batch, dh_hat_channel},                                    \
                                        {dm_new, dm_new_batch, dm_new_channel},                                    \
                                        dz,                                                                        \
                                        dh,                                                                        \
                                        dm,                                                                        \
                                        ddepthwise,                                                                \
                                        dpointwise,                                                                \
                                        dbias};                                                                    \
    return run_backward<__VA_ARGS__>(FASTSAM_HOST_GATES(S), gradients, static_cast<int>(multiprocessors));         \
  }

FASTSAM_GATES(float32, float, FmaProduct<float, 64>)
FASTSAM_GATES(half_8, __half, HalfProduct<__half, 8, 64>)
FASTSAM_GATES(half_16, __half, HalfProduct<__half, 16, 64>)
#ifndef __CUDACC__  // for devices csrc/cuda/separable_gates.cu compiles the others, which take nvcc minutes
FASTSAM_GATES(float64, double, FmaProduct<double, 64>)
FASTSAM_GATES(tf32, float, Tf32Product<64>)
FASTSAM_GATES(half, __half, FmaProduct<float, 64>)
FASTSAM_GATES(bfloat16, __nv_bfloat16, FmaProduct<float, 64>)
FASTSAM_GATES(bfloat16_16, __nv_bfloat16, HalfProduct<__nv_bfloat16, 16, 64>)
#endif
