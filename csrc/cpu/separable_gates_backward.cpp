// Gradients of the separable gates. Two stages of independent tasks; sums over tasks in a fixed order:
//   1. groups of blocks: the gates computed again, their gradient, dm, the group's share of dpointwise and dbias, and
//      du = pointwise^T dgates;
//   2. channels: du correlated with the flipped depthwise filter gives dz or dh; ddepthwise.

#include "kernels_internal.h"
#include "separable_gates.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// About this many tasks keep any common number of cores busy; a constant, because it sets the order of the sums.
constexpr int64_t kTasks = 64;

template <class T>
struct ThreadScratch {
  ThreadScratch(Arena& arena, const GateSizes& sizes, const Blocks<T>& blocks)
      : gates(arena, sizes, blocks),
        u_rows(arena.take<T>(blocks.lanes() * padded_lanes<T>(sizes.z_channels + sizes.channels))),
        du(arena.take<T>((sizes.z_channels + sizes.channels) * blocks.lanes())),
        dh_hat(arena.take<T>(blocks.lanes())),
        dm_new(arena.take<T>(blocks.lanes())),
        filter(arena.take<T>(sizes.kernel_size * sizes.kernel_size)),
        plane_stride(padded_lanes<T>(sizes.width) + sizes.kernel_size),
        window(arena.take<T>((sizes.height + sizes.kernel_size) * plane_stride)),
        plane(arena.take<T>(sizes.height * padded_lanes<T>(sizes.width))) {}

  GateScratch<T> gates;
  T *u_rows, *du, *dh_hat, *dm_new, *filter;
  int64_t plane_stride;
  T *window, *plane;  // one channel of the map, with and without its halo
};

template <class S>
struct Layout {
  using T = Compute<S>;

  Layout(Arena& arena, const SeparableGatesBackward<S>& call, int threads) : blocks(call.sizes) {
    const GateSizes& sizes = call.sizes;
    const int64_t inputs = sizes.z_channels + sizes.channels;
    groups = smaller(blocks.count(), (kTasks + sizes.batch - 1) / sizes.batch);
    input_lanes = padded_lanes<T>(inputs);
    dpointwise_size = 3 * sizes.channels * input_lanes;
    dpointwise = arena.take<T>(sizes.batch * groups * dpointwise_size);
    dbias = arena.take<T>(sizes.batch * groups * 3 * sizes.channels);
    ddepthwise = arena.take<T>(sizes.batch * inputs * sizes.kernel_size * sizes.kernel_size);
    du = arena.take<T>(sizes.kernel_size == 0 ? 0 : sizes.batch * inputs * sizes.height * sizes.width);
    scratch_base = arena.size();
    ThreadScratch<T> first(arena, sizes, blocks);
    scratch_size = arena.size() - scratch_base;
    arena.take<char>(scratch_size * (threads - 1));
  }

  Blocks<T> blocks;
  int64_t groups, input_lanes, dpointwise_size, scratch_base, scratch_size;
  T *dpointwise, *dbias, *ddepthwise, *du;
};

template <class S>
inline S* gradient_channel(const SeparableGatesBackward<S>& call, int64_t batch, int64_t channel) {
  const GateSizes& sizes = call.sizes;
  const int64_t area = sizes.height * sizes.width;
  if (channel < sizes.z_channels) return call.dz + (batch * sizes.z_channels + channel) * area;
  return call.dh + (batch * sizes.channels + channel - sizes.z_channels) * area;
}

// Gates beyond the map come from whatever pixels lie there: infinite ones would make NaN of gradients that are 0.
template <class T>
void clear_beyond(Block2d block, int64_t row_lanes, T* tile) {
  if (block.columns == row_lanes) return;
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t lane = block.columns; lane < row_lanes; ++lane) tile[row * row_lanes + lane] = T(0);
  }
}

// The gates of a block become their gradients, in place; 0 in the lanes beyond the map. Writes dm.
template <class S, class T>
void gate_gradients(const SeparableGatesBackward<S>& call, const Blocks<T>& blocks, int64_t batch, Block2d block,
                    const ThreadScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const int64_t channels = sizes.channels, lanes = blocks.lanes(), row_lanes = blocks.row_lanes;
  const Vec<T> one = broadcast(T(1));
  T *gates = scratch.gates.gates, *memory = scratch.gates.plane;
  const auto load_channel = [&](const Map<const S>& map, int64_t channel, T* out) {
    copy_window(map.data + batch * map.stride_batch + channel * map.stride_channel, sizes.height, sizes.width,
                block.top, block.left, block.rows, block.columns, out, row_lanes);
    clear_beyond(block, row_lanes, out);
  };
  for (int64_t channel = 0; channel < channels; ++channel) {
    const GateChannel<T> activated(gates, call.bias, channel, channels, lanes);
    load_channel(call.m, channel, memory);
    load_channel(call.dh_hat, channel, scratch.dh_hat);
    load_channel(call.dm_new, channel, scratch.dm_new);
    for (int64_t lane = 0; lane < block.rows * row_lanes; lane += kLanes<T>) {
      const auto a = activated.at(lane);
      const Vec<T> m = load(memory + lane), dh_hat = load(scratch.dh_hat + lane);
      const Vec<T> m_new = (one - a.i) * m + a.i * a.g;
      const Vec<T> dm_new = load(scratch.dm_new + lane) + dh_hat * a.o;
      store(gates + channel * lanes + lane, dm_new * (a.g - m) * a.i * (one - a.i));
      store(gates + (channels + channel) * lanes + lane, dm_new * a.i * (one - a.g * a.g));
      store(gates + (2 * channels + channel) * lanes + lane, dh_hat * m_new * a.o * (one - a.o));
      store(memory + lane, dm_new * (one - a.i));
    }
    for (int64_t gate = 0; gate < 3; ++gate)
      clear_beyond(block, row_lanes, gates + (gate * channels + channel) * lanes);
    store_block(memory, row_lanes, block, sizes.width,
                call.dm + (batch * channels + channel) * sizes.height * sizes.width);
  }
}

template <class S, class T>
void block_task(const SeparableGatesBackward<S>& call, const Layout<S>& layout, int64_t batch, int64_t index,
                T* dpointwise, T* dbias, const ThreadScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const Blocks<T>& blocks = layout.blocks;
  const Block2d block = block_at(blocks, sizes, index);
  const int64_t inputs = sizes.z_channels + sizes.channels, outputs = 3 * sizes.channels, lanes = blocks.lanes();
  const int64_t used = block.rows * blocks.row_lanes, area = sizes.height * sizes.width;
  gates_block(call, blocks, batch, block, scratch.gates);
  gate_gradients(call, blocks, batch, block, scratch);
  const T* dgates = scratch.gates.gates;
  for (int64_t row = 0; row < outputs; ++row) {
    Vec<T> sum = broadcast(T(0));
    for (int64_t lane = 0; lane < used; lane += kLanes<T>) sum += load(dgates + row * lanes + lane);
    dbias[row] += sum_lanes<T>(sum);
  }
  transpose_tile(inputs, used, scratch.gates.u, lanes, scratch.u_rows, layout.input_lanes);
  multiply<T, Start::kAdd>(outputs, inputs, used, rows_of(dgates, lanes), scratch.u_rows, layout.input_lanes,
                           dpointwise, layout.input_lanes);
  multiply<T, Start::kZero>(inputs, used, outputs, columns_of(call.pointwise, inputs), dgates, lanes, scratch.du,
                            lanes);
  for (int64_t channel = 0; channel < inputs; ++channel) {
    const T* du = scratch.du + channel * lanes;
    if (call.depthwise == nullptr) {
      store_block(du, blocks.row_lanes, block, sizes.width, gradient_channel(call, batch, channel));
    } else {
      store_block(du, blocks.row_lanes, block, sizes.width, layout.du + (batch * inputs + channel) * area);
    }
  }
}

template <class S, class T>
void gate_stage(const SeparableGatesBackward<S>& call, const Layout<S>& layout, int64_t batch, int64_t group,
                const ThreadScratch<T>& scratch) {
  const int64_t task = batch * layout.groups + group, blocks = layout.blocks.count(), outputs = 3 * call.sizes.channels;
  T* dpointwise = layout.dpointwise + task * layout.dpointwise_size;
  T* dbias = layout.dbias + task * outputs;
  std::memset(dpointwise, 0, layout.dpointwise_size * sizeof(T));
  std::memset(dbias, 0, outputs * sizeof(T));
  for (int64_t index = blocks * group / layout.groups; index < blocks * (group + 1) / layout.groups; ++index) {
    block_task(call, layout, batch, index, dpointwise, dbias, scratch);
  }
}

// Sums over positions of du times the input shifted by dx = 0 ... Taps - 1, where window starts at dx = 0. The sums of
// several taps run side by side: one alone would wait for its own additions.
template <class T, int Taps>
void tap_gradients(int64_t height, int64_t width, const T* du, int64_t du_stride, const T* window,
                   int64_t window_stride, T* out) {
  Vec<T> sum[Taps];
  for (int tap = 0; tap < Taps; ++tap) sum[tap] = broadcast(T(0));
  for (int64_t row = 0; row < height; ++row) {
    const T *upstream = du + row * du_stride, *input = window + row * window_stride;
    int64_t lane = 0;
    for (; lane + kLanes<T> <= width; lane += kLanes<T>) {
      const Vec<T> gradient = load(upstream + lane);
      for (int tap = 0; tap < Taps; ++tap) sum[tap] += gradient * load(input + lane + tap);
    }
    if (lane == width) continue;
    const Vec<T> gradient = load(upstream + lane);
    for (int tap = 0; tap < Taps; ++tap) sum[tap] += gradient * load_part(input + lane + tap, width - lane);
  }
  for (int tap = 0; tap < Taps; ++tap) out[tap] = sum_lanes<T>(sum[tap]);
}

// ddepthwise[dy, dx] = sum over positions of du times the input shifted by (dy, dx).
template <class T>
void filter_gradient(int64_t k, int64_t height, int64_t width, const T* du, int64_t du_stride, const T* window,
                     int64_t window_stride, T* out) {
  for (int64_t dy = 0; dy < k; ++dy) {
    for (int64_t dx = 0; dx < k;) {
      const T* input = window + dy * window_stride + dx;
      T* tap = out + dy * k + dx;
      if (k - dx >= 5) {
        tap_gradients<T, 5>(height, width, du, du_stride, input, window_stride, tap);
        dx += 5;
      } else if (k - dx >= 3) {
        tap_gradients<T, 3>(height, width, du, du_stride, input, window_stride, tap);
        dx += 3;
      } else {
        tap_gradients<T, 1>(height, width, du, du_stride, input, window_stride, tap);
        dx += 1;
      }
    }
  }
}

template <class S, class T>
void depthwise_stage(const SeparableGatesBackward<S>& call, const Layout<S>& layout, int64_t batch, int64_t channel,
                     const ThreadScratch<T>& scratch) {
  const GateSizes& sizes = call.sizes;
  const int64_t inputs = sizes.z_channels + sizes.channels, k = sizes.kernel_size, pad = k / 2,
                row_lanes = padded_lanes<T>(sizes.width);
  const int64_t height = sizes.height, width = sizes.width;
  const T* du = layout.du + (batch * inputs + channel) * height * width;
  const T* filter = call.depthwise + channel * k * k;
  for (int64_t tap = 0; tap < k * k; ++tap) scratch.filter[tap] = filter[k * k - 1 - tap];
  copy_window(du, height, width, -pad, -pad, height + k - 1, row_lanes + k - 1, scratch.window, scratch.plane_stride);
  correlate(scratch.window, scratch.plane_stride, scratch.filter, k, height, row_lanes, scratch.plane);
  store_block(scratch.plane, row_lanes, {0, 0, height, width}, width, gradient_channel(call, batch, channel));

  copy_tile(height, width, du, width, scratch.plane, row_lanes);
  copy_window(input_channel(sizes, call.z, call.h, batch, channel), height, width, -pad, -pad, height + k - 1,
              row_lanes + k - 1, scratch.window, scratch.plane_stride);
  filter_gradient(k, height, width, scratch.plane, row_lanes, scratch.window, scratch.plane_stride,
                  layout.ddepthwise + (batch * inputs + channel) * k * k);
}

}  // namespace

template <class S>
void separable_gates_backward(const SeparableGatesBackward<S>& call, int threads) {
  threads = useful_threads(threads, gate_work(call.sizes));
  Arena measure;
  Layout<S>(measure, call, threads);
  const Workspace workspace(measure.size());
  Arena arena(workspace.data());
  const Layout<S> layout(arena, call, threads);
  const GateSizes& sizes = call.sizes;
  const int64_t inputs = sizes.z_channels + sizes.channels, outputs = 3 * sizes.channels,
                gate_tasks = sizes.batch * layout.groups;
  const int64_t taps = sizes.kernel_size * sizes.kernel_size,
                depthwise_tasks = call.depthwise == nullptr ? 0 : sizes.batch * inputs;
#pragma omp parallel num_threads(threads)
  {
    Arena own(workspace.data() + layout.scratch_base + thread_index() * layout.scratch_size);
    const ThreadScratch<Compute<S>> scratch(own, sizes, layout.blocks);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < gate_tasks; ++task)
      gate_stage(call, layout, task / layout.groups, task % layout.groups, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < depthwise_tasks; ++task)
      depthwise_stage(call, layout, task / inputs, task % inputs, scratch);
    reduce(gate_tasks, layout.dpointwise_size, layout.dpointwise);
    reduce(gate_tasks, outputs, layout.dbias);
    if (call.depthwise != nullptr) reduce(sizes.batch, inputs * taps, layout.ddepthwise);
  }
  store_tile(outputs, inputs, layout.dpointwise, layout.input_lanes, call.dpointwise, inputs);
  if (call.dbias != nullptr) copy_lanes(layout.dbias, outputs, call.dbias);
  if (call.depthwise != nullptr) copy_lanes(layout.ddepthwise, inputs * taps, call.ddepthwise);
}

template void separable_gates_backward<float>(const SeparableGatesBackward<float>&, int);
template void separable_gates_backward<double>(const SeparableGatesBackward<double>&, int);
template void separable_gates_backward<bfloat16>(const SeparableGatesBackward<bfloat16>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
