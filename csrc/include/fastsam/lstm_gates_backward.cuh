// The backward pass of lstm_gates, memory_gates and norm_gate. da is the gradient of the sum of the terms. Without
// norms one launch, with norms two, because the gradient of a norm needs sums over all of the sample:
//   1. activations computed again, dc, da (stored where the gradient of the first term will be), and for each chunk of
//      a channel the sums of dy = da w and dy (x - mean) of each normalised term;
//   2. lstm_norm_backward.cuh.
#pragma once

#include "fastsam/lstm_norm_backward.cuh"

namespace fastsam::cuda {

// What a thread has summed up: with weights of one a channel gate by gate, of da; else over the gates, of da w.
template <Update kUpdate, class W, NormWeights kWeights>
struct ThreadSums {
  static constexpr int kParts = kWeights == NormWeights::kChannel ? kGatesOf<kUpdate> : 1;
  TermSums<W> of[kLstmTerms][kParts] = {};
};

template <Update kUpdate, class T, int V, NormWeights kWeights>
__device__ __forceinline__ void add_to_sums(const LstmGates<kUpdate, T, V, kWeights>& gates, int gate, int64_t at,
                                            const Lanes<Wide<T>, V>& da, ThreadSums<kUpdate, Wide<T>, kWeights>& sums) {
  using W = Wide<T>;
#pragma unroll
  for (int term = 0; term < kLstmTerms; ++term) {
    if (!gates.normalised(term)) continue;
    const Lanes<W, V> centred = gates.centred(term, gate, at);
    TermSums<W>& to = sums.of[term][gate % ThreadSums<kUpdate, W, kWeights>::kParts];
    Lanes<W, V> dy = da;
    if constexpr (kWeights == NormWeights::kPosition) dy = da * gates.weight(term, gate, at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to.dy += dy[i];
      to.dy_centred += dy[i] * centred[i];
    }
  }
}

// Adds up the sums of the block's threads and writes them out.
template <Update kUpdate, class T, int V, NormWeights kWeights>
__device__ __forceinline__ void keep_sums(const LstmBackwardArguments<T>& call, const LstmPlace& place,
                                          const LstmGates<kUpdate, T, V, kWeights>& gates,
                                          const ThreadSums<kUpdate, Wide<T>, kWeights>& sums) {
  using W = Wide<T>;
  FASTSAM_SHARED(TermSums<W>, of_warps, kLstmWarps * kLstmTerms);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int term = 0; term < kLstmTerms; ++term) {
    if (!gates.normalised(term)) continue;
    TermSums<W> of_warp = {0, 0};
#pragma unroll
    for (int part = 0; part < ThreadSums<kUpdate, W, kWeights>::kParts; ++part) {
      const TermSums<W> sum = {sum_of_warp(sums.of[term][part].dy), sum_of_warp(sums.of[term][part].dy_centred)};
      if constexpr (kWeights == NormWeights::kChannel) {
        const int64_t row =
            ((term * call.split.samples + place.sample) * kGatesOf<kUpdate> + part) * call.in.channels + place.row;
        if (lane == 0 && place.valid) call.of_channels[row * call.split.chunks + place.chunk] = sum;
        const W weight = gates.weight(term, part, 0)[0];
        of_warp = {of_warp.dy + weight * sum.dy, of_warp.dy_centred + weight * sum.dy_centred};
      } else {
        of_warp = sum;
      }
    }
    if (lane == 0) of_warps[warp * kLstmTerms + term] = place.valid ? of_warp : TermSums<W>{0, 0};
  }
  __syncthreads();
  const int term = threadIdx.x;
  if (term >= kLstmTerms || !gates.normalised(term)) return;
  TermSums<W> of_block = {0, 0};
  for (int index = 0; index < kLstmWarps; ++index) {
    const TermSums<W> of_warp = of_warps[index * kLstmTerms + term];
    of_block = {of_block.dy + of_warp.dy, of_block.dy_centred + of_warp.dy_centred};
  }
  call.of_samples[static_cast<int64_t>(blockIdx.x) * kLstmTerms + term] = of_block;
}

// Blocks for whose registers a multiprocessor is to have room.
template <class T>
constexpr int kLstmBackwardBlocks = sizeof(Wide<T>) == 4 ? 2 : 1;

template <Update kUpdate, class T, int V, NormWeights kWeights>
__global__ void __launch_bounds__(kLstmThreads, kLstmBackwardBlocks<T>)
    lstm_gates_backward_kernel(LstmBackwardArguments<T> call) {
  using W = Wide<T>;
  constexpr int kGates = kGatesOf<kUpdate>;
  const LstmPlace place = lstm_place(call.split);
  const LstmGates<kUpdate, T, V, kWeights> gates(call.in, place.sample, place.row,
                                                 saved_statistics<T>(call.statistics, place.sample));
  const Global<const T> c = call.in.c.row(place.sample, place.row), dh = call.dh.row(place.sample, place.row),
                        dc_new = call.dc_new.row(place.sample, place.row);
  const int64_t channels = call.in.channels, positions = call.in.positions;
  const int64_t row = (place.sample * channels + place.row) * positions;
  const int64_t gate_rows = (place.sample * kGates * channels + place.row) * positions;
  const bool copy = call.dx[1] != nullptr && !gates.normalised(1);
  const bool has_dc_new = kUpdate != Update::kProduct || call.dc_new.data != nullptr;
  ThreadSums<kUpdate, W, kWeights> sums;
#pragma unroll 1  // more would cost the registers of other warps
  for (int64_t at = place.begin + threadIdx.x % kWarp * V; at < place.end; at += kWarp * V) {
    const GateUpdate<kUpdate, W, V> update = gates.update(load_lanes<T, V>(c + at), at);
    Lanes<W, V> da[kGates], of_c_new = {};
    if (has_dc_new) of_c_new = load_lanes<T, V>(dc_new + at);
    store_lanes<T, V>(call.dc + (row + at), update.gradients(load_lanes<T, V>(dh + at), of_c_new, da));
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t to = gate_rows + gate * channels * positions + at;
      store_lanes<T, V>(call.dx[0] + to, da[gate]);
      if (copy) store_lanes<T, V>(call.dx[1] + to, da[gate]);
      // The next launch takes the sums' mean off what is stored: of a sample of one number nothing may be left.
      add_to_sums(gates, gate, at, as_stored<T, V>(da[gate]), sums);
    }
  }
  if constexpr (kWeights != NormWeights::kNone) keep_sums(call, place, gates, sums);
}

#ifndef __CUDACC_RTC__

// The host's part, the same for every platform: DevicePlatform, or the one of the tests.

// Elements of a vector. Eight of 16 bits would take more registers than two blocks have.
template <class S>
constexpr int kLstmBackwardWidth = sizeof(S) == 8 ? 2 : 4;

template <class S>
struct LstmBackwardPlan {
  using Number = Wide<DeviceType<S>>;
  using Sums = TermSums<Number>;

  LstmBackwardPlan(const LstmGatesBackward<S>& call, const Launch& launch)
      : layout(call, kLstmBackwardWidth<S>), weights(norm_weights(call)) {
    layout.add(call.dh, call.channels);
    layout.add(call.dc_new, call.channels);
    layout.add(call.dc);
    for (const LstmTermGradients<S>& gradients : call.gradients) {
      layout.add(gradients.x);
      layout.add(gradients.weight);
      layout.add(gradients.bias);
    }
    const int64_t channels = layout.channels(), positions = layout.positions();
    split = lstm_split(call.batch, channels, positions, layout.width(), launch.multiprocessors);
    const int64_t groups = weights == NormWeights::kPosition || call.batch == 0 ? 1 : call.batch;
    norm_split = lstm_split(groups, layout.rows(), positions, layout.width(), launch.multiprocessors);
    if (weights == NormWeights::kNone) return;
    of_samples = call.batch * split.blocks * kLstmTerms;
    if (weights == NormWeights::kChannel) of_channels = kLstmTerms * call.batch * layout.rows() * split.chunks;
    if (weights == NormWeights::kPosition && call.batch > kSampleTile) {
      partial = kLstmTerms * 2 * layout.rows() * positions;
    }
  }

  int64_t workspace_bytes() const {
    return partial * static_cast<int64_t>(sizeof(Number)) +
           (of_samples + of_channels) * static_cast<int64_t>(sizeof(Sums));
  }

  LstmLayout<S> layout;
  NormWeights weights;
  LstmSplit split, norm_split;
  int64_t partial = 0;                      // numbers
  int64_t of_samples = 0, of_channels = 0;  // sums
};

template <class S>
int64_t lstm_backward_workspace(const LstmGatesBackward<S>& call, const Launch& launch) {
  return LstmBackwardPlan<S>(call, launch).workspace_bytes();
}

template <class S, class Platform>
LstmNormArguments<DeviceType<S>> lstm_backward_arguments(const LstmGatesBackward<S>& call, void* workspace,
                                                         const LstmBackwardPlan<S>& plan, const Platform& platform) {
  auto* const partial = static_cast<typename LstmBackwardPlan<S>::Number*>(workspace);  // first: it goes by vectors
  auto* const sums = reinterpret_cast<typename LstmBackwardPlan<S>::Sums*>(partial + plan.partial);
  const int64_t count = call.batch * call.channels * call.positions;
  const int64_t gates = gates_of(call.update);
  const int64_t weights = gates * call.channels * (call.weights_have_positions ? call.positions : 1);
  LstmNormArguments<DeviceType<S>> arguments = {
      {plan.layout.inputs(platform, call),
       plan.split,
       plan.layout.map(platform, call.dh, call.channels, "dh"),
       plan.layout.map(platform, call.dc_new, call.channels, "dc_new"),
       platform.output(on_device(call.dc), count, "dc"),
       {},
       {},
       platform.output(sums, plan.of_samples, "sums of samples"),
       platform.output(plan.of_channels > 0 ? sums + plan.of_samples : nullptr, plan.of_channels, "sums of channels")},
      plan.norm_split,
      {},
      {},
      platform.output(plan.partial > 0 ? partial : nullptr, plan.partial, "gradients of weights so far")};
  for (int term = 0; term < kLstmTerms; ++term) {
    const LstmTermGradients<S>& gradients = call.gradients[term];
    arguments.first.dx[term] = platform.output(on_device(gradients.x), gates * count, "dx");
    arguments.first.statistics[term] = platform.input(call.statistics[term], 2 * call.batch, "statistics");
    arguments.dweight[term] = platform.output(on_device(gradients.weight), weights, "dweight");
    arguments.dbias[term] = platform.output(on_device(gradients.bias), weights, "dbias");
  }
  return arguments;
}

template <class S, int V, class Platform>
void lstm_backward_by_vectors(const LstmGatesBackward<S>& call, void* workspace, const LstmBackwardPlan<S>& plan,
                              const Platform& platform) {
  using T = DeviceType<S>;
  const auto arguments = lstm_backward_arguments(call, workspace, plan, platform);
  with_norm_weights(plan.weights, [&](auto weights) {
    constexpr NormWeights kWeights = decltype(weights)::value;
    with_update(call.update, [&](auto update) {
      platform.start("lstm_gates_backward", lstm_shape(plan.split),
                     lstm_gates_backward_kernel<decltype(update)::value, T, V, kWeights>, arguments.first);
    });
    if constexpr (kWeights != NormWeights::kNone) {
      platform.start("lstm_norm_backward", lstm_shape(plan.norm_split), lstm_norm_backward_kernel<T, V, kWeights>,
                     arguments);
    }
  });
}

template <class S, class Platform>
void lstm_backward(const LstmGatesBackward<S>& call, void* workspace, const Launch& launch, const Platform& platform) {
  const LstmBackwardPlan<S> plan(call, launch);
  if (plan.layout.width() == 1) {
    lstm_backward_by_vectors<S, 1>(call, workspace, plan, platform);
  } else {
    lstm_backward_by_vectors<S, kLstmBackwardWidth<S>>(call, workspace, plan, platform);
  }
}

#endif

}  // namespace fastsam::cuda
