// The host's part of the attention's backward pass: its workspace, and its launches.
#pragma once

#include "fastsam/attention_attend.cuh"
#include "fastsam/attention_finish.cuh"
#include "fastsam/attention_launch.cuh"

namespace fastsam::cuda {

// The parts of the workspace, one behind the other; without a start it only counts the bytes.
template <class S, class Way>
class BackwardWorkspace {
 public:
  using Operand = typename Way::Operand;
  using T = typename Way::Accumulator;

  BackwardWorkspace(const AttentionBackward<S>& call, int64_t prepare_blocks, int64_t attend_blocks, void* start)
      : start_(static_cast<char*>(start)) {
    const AttentionSizes& sizes = call.sizes;
    const int64_t padded = sizes.batch * padded_positions(sizes.positions), depth = padded_depth(sizes.channels);
    for (int s = 0; s < call.source_count; ++s) {
      const AttentionSource<S>& source = call.sources[s];
      const int64_t d = source.query_channels, query_depth = padded_depth(d);
      const bool has_keys = source.key != nullptr;
      take(columns[s], padded * depth);
      take(query[s], padded * query_depth);
      take(dr[s], padded * depth);
      take(dquery[s], padded * query_depth);
      take(keys[s], has_keys ? padded * query_depth : 0);
      take(dkeys[s], has_keys ? padded * query_depth : 0);
      take(lse[s], padded);
      take(delta[s], padded);
      const bool is_finished = s == 0 || has_keys;
      take(dx[s], is_finished && !std::is_same_v<S, T> ? sizes.batch * sizes.channels * sizes.positions : 0);
      take(dvalue[s], prepare_blocks * sizes.value_channels * sizes.channels);
      take(dscore[s], attend_blocks * d * sizes.channels);
      take(dscore_bias[s], attend_blocks * d);
      take(dkey[s], has_keys ? attend_blocks * d * sizes.channels : 0);
    }
    take(dvalue_bias, prepare_blocks * sizes.value_channels);
  }

  // An array of the workspace.
  template <class E>
  struct Array {
    E* address = nullptr;  // nullptr where it has no elements
    int64_t count = 0;
  };

  int64_t bytes = 0;
  Array<Operand> columns[kMaxSources], query[kMaxSources], dr[kMaxSources], dquery[kMaxSources], keys[kMaxSources],
      dkeys[kMaxSources];
  Array<T> lse[kMaxSources], delta[kMaxSources], dx[kMaxSources], dvalue[kMaxSources], dscore[kMaxSources],
      dscore_bias[kMaxSources], dkey[kMaxSources], dvalue_bias;

 private:
  template <class E>
  void take(Array<E>& array, int64_t count) {
    array.count = count;
    if (start_ != nullptr && count > 0) array.address = reinterpret_cast<E*>(start_ + bytes);
    bytes += shared_bytes<E>(count);
  }

  char* start_;
};

template <class S>
int64_t attention_backward_bytes(const AttentionBackward<S>& call, const Launch& launch) {
  return with_backward_plan<S>(call, launch, [&](auto way, const auto& plan) {
    return BackwardWorkspace<S, decltype(way)>(call, plan.prepare_blocks, plan.attend_blocks, nullptr).bytes;
  });
}

// The inputs of the kernels, and the sums that the last one makes, as a platform sees them.
template <class S, class Way, class Platform>
class BackwardViews {
  using Device = DeviceType<S>;
  using T = typename Way::Accumulator;

 public:
  BackwardViews(const Platform& platform, const AttentionBackward<S>& call, const BackwardWorkspace<S, Way>& workspace,
                int64_t prepare_blocks, int64_t attend_blocks)
      : platform_(platform), call_(call), workspace_(workspace) {
    const AttentionSizes& sizes = call.sizes;
    in.sizes = sizes;
    in.grid = window_grid(sizes);
    in.source_count = call.source_count;
    in.vectors = has_vectors(call.dz, sizes);
    in.dz = column_map<S>(platform, call.dz, sizes.value_channels, sizes, "dz");
    in.dvalue_bias = array(workspace.dvalue_bias, "parts of dvalue_bias");
    add_sum(in.dvalue_bias, call.dvalue_bias, sizes.value_channels, prepare_blocks, "dvalue_bias");
    for (int s = 0; s < call.source_count; ++s) {
      view_source(s);
      const AttentionGradients<S>& out = call.gradients[s];
      const BackwardSpace<Way>& space = in.space[s];
      const int64_t d = call.sources[s].query_channels, channels = sizes.channels;
      add_sum(space.dvalue, out.value, sizes.value_channels * channels, prepare_blocks, "dvalue");
      add_sum(space.dscore, out.score, d * channels, attend_blocks, "dscore");
      add_sum(space.dscore_bias, out.score_bias, d, attend_blocks, "dscore_bias");
      if (out.key != nullptr) add_sum(space.dkey, out.key, d * channels, attend_blocks, "dkey");
    }
  }

  AttentionBackwardArguments<Device, Way> in = {};
  AttentionSums<T> sums = {};

 private:
  template <class Array>
  auto array(const Array& of, const char* name) const {
    return platform_.output(of.address, of.count, name);
  }

  void add_sum(Global<const T> parts, T* out, int64_t count, int64_t number, const char* name) {
    sums.sums[sums.number++] = {parts, platform_.output(out, count, name), count, number};
  }

  void view_source(int s) {
    const AttentionSizes& sizes = call_.sizes;
    const int64_t map_size = sizes.batch * sizes.channels * sizes.positions;
    in.vectors = in.vectors && has_vectors(call_.sources[s].x, sizes);
    in.sources[s] = source_view(platform_, call_.sources[s], sizes, s);
    in.r[s] = platform_.input(call_.r[s], map_size, "r");
    in.lse[s] = platform_.input(call_.lse[s], sizes.batch * sizes.positions, "lse");
    in.shift[s] = platform_.input(call_.shift[s], sizes.batch * sizes.channels, "shift");
    in.dx[s] = contiguous_map(platform_.output(on_device(call_.gradients[s].x), map_size, numbered(s, "dh", "dm")),
                              sizes.channels, sizes);
    BackwardSpace<Way>& space = in.space[s];
    space.columns = array(workspace_.columns[s], "columns");
    space.query = array(workspace_.query[s], "queries");
    space.dr = array(workspace_.dr[s], "dR");
    space.dquery = array(workspace_.dquery[s], "dquery");
    space.keys = array(workspace_.keys[s], "keys");
    space.dkeys = array(workspace_.dkeys[s], "dkeys");
    space.lse = array(workspace_.lse[s], "padded lse");
    space.delta = array(workspace_.delta[s], "delta");
    space.dx = {array(workspace_.dx[s], "unfinished dx"), in.dx[s].stride_batch, in.dx[s].stride_channel};
    if constexpr (std::is_same_v<S, T>) {
      if (s == 0 || call_.sources[s].key != nullptr) space.dx.data = in.dx[s].data;
    }
    space.dvalue = array(workspace_.dvalue[s], "parts of dvalue");
    space.dscore = array(workspace_.dscore[s], "parts of dscore");
    space.dscore_bias = array(workspace_.dscore_bias[s], "parts of dscore_bias");
    space.dkey = array(workspace_.dkey[s], "parts of dkey");
  }

  const Platform& platform_;
  const AttentionBackward<S>& call_;
  const BackwardWorkspace<S, Way>& workspace_;
};

template <class S, class Way, int KeyWarps, int Group, class Platform>
void launch_backward(const Platform& platform, const AttentionBackward<S>& call, void* start,
                     const BackwardPlan<S, Way, KeyWarps, Group>& plan) {
  using Device = DeviceType<S>;
  const BackwardWorkspace<S, Way> workspace(call, plan.prepare_blocks, plan.attend_blocks, start);
  const BackwardViews<S, Way, Platform> views(platform, call, workspace, plan.prepare_blocks, plan.attend_blocks);
  const dim3 threads(kAttentionThreads);
  platform.start("attention_backward_prepare",
                 {dim3(grid_size(plan.prepare_blocks * call.source_count)), threads, plan.prepare_bytes},
                 attention_backward_prepare_kernel<Device, Way, KeyWarps>, views.in);
  platform.start("attention_backward_attend",
                 {dim3(grid_size(2 * plan.attend_blocks * call.source_count)), threads, plan.attend_bytes},
                 attention_backward_attend_kernel<Device, Way, KeyWarps, Group>, views.in, plan.stages);
  int64_t map_blocks = plan.attend_blocks;
  if (call.source_count > 1 && call.sources[1].key != nullptr) map_blocks *= 2;
  platform.start("attention_backward_finish",
                 {dim3(grid_size(map_blocks + views.sums.blocks())), threads, plan.finish_bytes},
                 attention_backward_finish_kernel<Device, Way, KeyWarps>, views.in, views.sums, map_blocks);
}

template <class S, class Platform>
void attention_backward_on(const Platform& platform, const AttentionBackward<S>& call, void* workspace,
                           const Launch& launch) {
  with_backward_plan<S>(call, launch,
                        [&](auto, const auto& plan) { launch_backward(platform, call, workspace, plan); });
}

}  // namespace fastsam::cuda
