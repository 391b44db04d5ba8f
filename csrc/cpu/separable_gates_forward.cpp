// One pass over the map: depthwise filter, pointwise product, activations and memory update of a block in cache.

#include "kernels_internal.h"
#include "separable_gates.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

template <class T>
struct Layout {
  Layout(Arena& arena, const SeparableGatesForward<T>& call, int threads) : blocks(call.sizes) {
    const GateSizes& sizes = call.sizes;
    pointwise = arena.take<T>(padded_rows(3 * sizes.channels) * (sizes.z_channels + sizes.channels));
    scratch_base = arena.size();
    GateScratch<T> first(arena, sizes, blocks);
    scratch_size = arena.size() - scratch_base;
    arena.take<char>(scratch_size * (threads - 1));
  }

  Blocks<T> blocks;
  int64_t scratch_base, scratch_size;
  T* pointwise;
};

template <class T>
void block_task(const SeparableGatesForward<T>& call, const Layout<T>& layout, int64_t batch, int64_t index,
                const GateScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const Blocks<T>& blocks = layout.blocks;
  const Block2d block = block_at(blocks, sizes, index);
  const int64_t channels = sizes.channels, lanes = blocks.lanes(), area = sizes.height * sizes.width;
  gates_block(call, blocks, batch, block, layout.pointwise, scratch);
  for (int64_t channel = 0; channel < channels; ++channel) {
    const T* memory = call.m.data + batch * call.m.stride_batch + channel * call.m.stride_channel;
    copy_window(memory, sizes.height, sizes.width, block.top, block.left, block.rows, blocks.row_lanes, scratch.plane,
                blocks.row_lanes);
    T* output = scratch.gates + channel * lanes;
    for (int64_t lane = 0; lane < block.rows * blocks.row_lanes; lane += kLanes<T>) {
      const auto a = activate(scratch.gates, channel, channels, lanes, lane);
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

template <class T>
void separable_gates_forward(const SeparableGatesForward<T>& call, int threads) {
  threads = useful_threads(threads, gate_work(call.sizes));
  Arena measure;
  Layout<T>(measure, call, threads);
  const Block memory(measure.size());
  Arena arena(memory.data());
  const Layout<T> layout(arena, call, threads);
  const int64_t inputs = call.sizes.z_channels + call.sizes.channels;
  pack_panels(3 * call.sizes.channels, inputs, call.pointwise, inputs, 1, layout.pointwise);
  const int64_t blocks = layout.blocks.count();
#pragma omp parallel num_threads(threads)
  {
    Arena own(memory.data() + layout.scratch_base + thread_index() * layout.scratch_size);
    const GateScratch<T> scratch(own, call.sizes, layout.blocks);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < call.sizes.batch * blocks; ++task)
      block_task(call, layout, task / blocks, task % blocks, scratch);
  }
}

template void separable_gates_forward<float>(const SeparableGatesForward<float>&, int);
template void separable_gates_forward<double>(const SeparableGatesForward<double>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
