// One pass over the map: depthwise filter, pointwise product, activations and memory update of a block in cache.

#include "kernels_internal.h"
#include "separable_gates.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

template <class S>
void block_task(const SeparableGatesForward<S>& call, const Blocks<Compute<S>>& blocks, int64_t batch, int64_t index,
                const GateScratch<Compute<S>>& scratch) {
  using T = Compute<S>;
  const GateSizes& sizes = call.sizes;
  const Block2d block = block_at(blocks, sizes, index);
  const int64_t channels = sizes.channels, lanes = blocks.lanes(), area = sizes.height * sizes.width;
  gates_block(call, blocks, batch, block, scratch);
  for (int64_t channel = 0; channel < channels; ++channel) {
    const S* memory = call.m.data + batch * call.m.stride_batch + channel * call.m.stride_channel;
    copy_window(memory, sizes.height, sizes.width, block.top, block.left, block.rows, blocks.row_lanes, scratch.plane,
                blocks.row_lanes);
    const GateChannel<T> gates(scratch.gates, call.bias, channel, channels, lanes);
    T* output = scratch.gates + channel * lanes;
    for (int64_t lane = 0; lane < block.rows * blocks.row_lanes; lane += kLanes<T>) {
      const auto a = gates.at(lane);
      const Vec<T> m_new = (broadcast(T(1)) - a.i) * load(scratch.plane + lane) + a.i * a.g;
      store(scratch.plane + lane, m_new);
      store(output + lane, a.o * m_new);
    }
    const int64_t plane = (batch * channels + channel) * area;
    store_block(scratch.plane, blocks.row_lanes, block, sizes.width, call.m_new + plane);
    store_block(output, blocks.row_lanes, block, sizes.width, call.h_hat + plane);
  }
}

}  // namespace

template <class S>
void separable_gates_forward(const SeparableGatesForward<S>& call, int threads) {
  using T = Compute<S>;
  threads = useful_threads(threads, gate_work(call.sizes));
  const Blocks<T> blocks(call.sizes);
  Arena measure;
  GateScratch<T>(measure, call.sizes, blocks);
  const Workspace workspace(measure.size() * threads);
  const int64_t count = blocks.count();
#pragma omp parallel num_threads(threads)
  {
    Arena own(workspace.data() + thread_index() * measure.size());
    const GateScratch<T> scratch(own, call.sizes, blocks);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < call.sizes.batch * count; ++task)
      block_task(call, blocks, task / count, task % count, scratch);
  }
}

template void separable_gates_forward<float>(const SeparableGatesForward<float>&, int);
template void separable_gates_forward<double>(const SeparableGatesForward<double>&, int);
template void separable_gates_forward<bfloat16>(const SeparableGatesForward<bfloat16>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
