// What the kernels of the LSTM gates, which serve lstm_gates, memory_gates and norm_gate, share: how the work is cut
// up, and the terms whose sum the gates are, normalised or not.
#pragma once

#include <type_traits>

#include "fastsam/launch.cuh"
#include "fastsam/lstm_lanes.cuh"
#include "fastsam/lstm_updates.cuh"
#include "fastsam/warp.cuh"

namespace fastsam::cuda {

// How the weights of the normalised terms lie: there is none, one a channel, or one a channel and position.
enum class NormWeights { kNone, kChannel, kPosition };

template <class Call>
NormWeights norm_weights(const Call& call) {
  if (call.terms[0].weight == nullptr && call.terms[1].weight == nullptr) return NormWeights::kNone;
  return call.weights_have_positions ? NormWeights::kPosition : NormWeights::kChannel;
}

constexpr int kLstmWarps = 8;
constexpr int kLstmThreads = kLstmWarps * kWarp;

// Warps that keep the memory of a multiprocessor busy.
constexpr int64_t kLstmWarpsToFill = 32;

// A warp takes a chunk of the positions of one row, a block takes kLstmWarps chunks of one sample. Rows are the
// channels of a map.
struct LstmSplit {
  int64_t samples;
  int64_t rows;
  int64_t positions;
  int64_t chunk;    // positions
  unsigned chunks;  // of a row
  unsigned blocks;  // of a sample
};

#ifndef __CUDACC_RTC__  // the host's part

inline LstmSplit lstm_split(int64_t samples, int64_t rows, int64_t positions, int width, int multiprocessors) {
  const int64_t step = width * kWarp, steps = ceil_div(positions, step);
  const int64_t wanted = parts_to_fill(kLstmWarpsToFill * multiprocessors, samples * rows, steps, 1);
  const int64_t chunk = ceil_div(steps, wanted) * step;
  const int64_t chunks = positions > 0 ? ceil_div(positions, chunk) : 1;
  return {
      samples, rows, positions, chunk, static_cast<unsigned>(chunks), grid_size(ceil_div(rows * chunks, kLstmWarps))};
}

inline LaunchShape lstm_shape(const LstmSplit& split) {
  return {dim3(grid_size(split.samples * split.blocks)), dim3(kLstmThreads)};
}

#endif

// Where a warp works. Warps beyond the last chunk have no positions, and a row that they can look at.
struct LstmPlace {
  int64_t sample;
  int64_t row;
  int chunk;
  int64_t begin, end;  // positions
  bool valid;
};

__device__ __forceinline__ LstmPlace lstm_place(const LstmSplit& split) {
  const unsigned unit = blockIdx.x % split.blocks * kLstmWarps + threadIdx.x / kWarp;
  const int64_t row = unit / split.chunks;
  const int chunk = static_cast<int>(unit % split.chunks);
  const int64_t begin = chunk * split.chunk, end = min(begin + split.chunk, split.positions);
  const bool valid = row < split.rows;
  return {blockIdx.x / split.blocks, valid ? row : 0, chunk, valid ? begin : 0, valid ? end : 0, valid};
}

// A (B, rows, positions) map.
template <class T>
struct LstmMap {
  Global<const T> data;
  int64_t stride_batch;
  int64_t stride_row;

  __device__ __forceinline__ Global<const T> row(int64_t sample, int64_t row) const {
    return data + (sample * stride_batch + row * stride_row);
  }
};

// x has the channels of the state once for each gate; the gates of a channel are `channels` rows apart.
template <class T>
struct LstmDeviceTerm {
  LstmMap<T> x;
  Global<const T> weight, bias;  // nullptr where the term is not normalised
};

template <class T>
struct LstmInputs {
  int64_t channels;
  int64_t positions;
  LstmDeviceTerm<T> terms[kLstmTerms];
  LstmMap<T> c;
  UpdateRule<Wide<T>> rule;
};

template <class W>
struct LstmStatistics {
  W mean[kLstmTerms], rstd[kLstmTerms];
};

// The terms at the gates of one channel of one sample.
template <Update kUpdate, class T, int V, NormWeights kWeights>
class LstmGates {
  using W = Wide<T>;

 public:
  static constexpr int kGates = kGatesOf<kUpdate>;

  __device__ __forceinline__ LstmGates(const LstmInputs<T>& in, int64_t sample, int64_t channel,
                                       const LstmStatistics<W>& statistics)
      : in_(in), sample_(sample), channel_(channel), statistics_(statistics) {
    if constexpr (kWeights == NormWeights::kChannel) {
#pragma unroll
      for (int term = 0; term < kLstmTerms; ++term) {
        if (!normalised(term)) continue;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          weight_[term][gate] = widen(in.terms[term].weight[row(gate)]);
          bias_[term][gate] = widen(in.terms[term].bias[row(gate)]);
        }
      }
    }
  }

  __device__ __forceinline__ bool normalised(int term) const {
    return kWeights != NormWeights::kNone && in_.terms[term].weight != nullptr;
  }

  // x - mean of a normalised term.
  __device__ __forceinline__ Lanes<W, V> centred(int term, int gate, int64_t at) const {
    Lanes<W, V> x = input(term, gate, at);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] -= statistics_.mean[term];
    return x;
  }

  __device__ __forceinline__ Lanes<W, V> weight(int term, int gate, int64_t at) const {
    return parameter(in_.terms[term].weight, weight_[term][gate], gate, at);
  }

  // What becomes of the state `c` with the sums of the terms as gates.
  __device__ __forceinline__ GateUpdate<kUpdate, W, V> update(const Lanes<W, V>& c, int64_t at) const {
    Lanes<W, V> a[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) a[gate] = sum(gate, at);
    return {a, c, in_.rule};
  }

 private:
  // The sum of the terms.
  __device__ __forceinline__ Lanes<W, V> sum(int gate, int64_t at) const {
    const Lanes<W, V> first = output(0, gate, at);
    return in_.terms[1].x.data == nullptr ? first : first + output(1, gate, at);
  }

  __device__ __forceinline__ int64_t row(int gate) const { return gate * in_.channels + channel_; }

  __device__ __forceinline__ Lanes<W, V> input(int term, int gate, int64_t at) const {
    return load_lanes<T, V>(in_.terms[term].x.row(sample_, row(gate)) + at);
  }

  __device__ __forceinline__ Lanes<W, V> parameter(Global<const T> of_term, W of_channel, int gate, int64_t at) const {
    if constexpr (kWeights == NormWeights::kPosition) {
      return load_lanes<T, V>(of_term + (row(gate) * in_.positions + at));
    } else {
      Lanes<W, V> lanes;
#pragma unroll
      for (int i = 0; i < V; ++i) lanes[i] = of_channel;
      return lanes;
    }
  }

  __device__ __forceinline__ Lanes<W, V> output(int term, int gate, int64_t at) const {
    if (!normalised(term)) return input(term, gate, at);
    Lanes<W, V> x = centred(term, gate, at);
    const Lanes<W, V> weight = this->weight(term, gate, at);
    const Lanes<W, V> bias = parameter(in_.terms[term].bias, bias_[term][gate], gate, at);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = x[i] * statistics_.rstd[term] * weight[i] + bias[i];
    return x;
  }

  const LstmInputs<T>& in_;
  const int64_t sample_, channel_;
  const LstmStatistics<W> statistics_;
  W weight_[kLstmTerms][kGates] = {}, bias_[kLstmTerms][kGates] = {};
};

#ifndef __CUDACC_RTC__  // the host's part

// use() with the update, or with the kind of weights, as a constant.
template <class Use>
void with_update(Update update, const Use& use) {
  switch (update) {
    case Update::kLstm:
      return use(std::integral_constant<Update, Update::kLstm>());
    case Update::kMemory:
      return use(std::integral_constant<Update, Update::kMemory>());
    case Update::kProduct:
      return use(std::integral_constant<Update, Update::kProduct>());
  }
}

template <class Use>
void with_norm_weights(NormWeights weights, const Use& use) {
  switch (weights) {
    case NormWeights::kNone:
      return use(std::integral_constant<NormWeights, NormWeights::kNone>());
    case NormWeights::kChannel:
      return use(std::integral_constant<NormWeights, NormWeights::kChannel>());
    case NormWeights::kPosition:
      return use(std::integral_constant<NormWeights, NormWeights::kPosition>());
  }
}

// How kernels see the maps of a call: where the channels of every map lie side by side, a sample is one row, so that
// vectors fit whatever the positions are; and where all addresses and strides allow it, kernels go by vectors of
// `widest` elements.
template <class S>
class LstmLayout {
 public:
  template <class Call>
  LstmLayout(const Call& call, int widest)
      : widest_(widest),
        batch_(call.batch),
        channels_(call.channels),
        gates_(gates_of(call.update)),
        positions_(call.positions),
        folded_(norm_weights(call) != NormWeights::kChannel) {
    for (const LstmTerm<S>& term : call.terms) {
      add(term.x, gates_ * channels_);
      add(term.weight);
      add(term.bias);
    }
    add(call.c, channels_);
  }

  void add(const Map<const S>& map, int64_t rows) {
    if (map.data == nullptr) return;
    add(map.data);
    if (batch_ > 1) batch_strides_ |= map.stride_batch;
    if (rows > 1) row_strides_ |= map.stride_channel;
    if (rows > 1 && map.stride_channel != positions_) folded_ = false;
  }

  void add(const void* address) { addresses_ |= reinterpret_cast<uintptr_t>(address); }

  int64_t channels() const { return folded_ ? 1 : channels_; }
  int64_t rows() const { return gates_ * channels(); }  // of a term
  int64_t positions() const { return folded_ ? channels_ * positions_ : positions_; }

  // Elements of a vector.
  int width() const {
    const int64_t strides = batch_strides_ | positions() | (folded_ ? 0 : row_strides_);
    return addresses_ % 16 == 0 && strides % widest_ == 0 ? widest_ : 1;
  }

  template <class Platform>
  LstmMap<DeviceType<S>> map(const Platform& platform, const Map<const S>& map, int64_t rows, const char* name) const {
    if (map.data == nullptr) return {};
    const int64_t count = (batch_ - 1) * map.stride_batch + (rows - 1) * map.stride_channel + positions_;
    return {platform.input(on_device(map.data), batch_ * rows * positions_ > 0 ? count : 0, name), map.stride_batch,
            folded_ ? positions() : map.stride_channel};
  }

  template <class Call, class Platform>
  LstmInputs<DeviceType<S>> inputs(const Platform& platform, const Call& call) const {
    LstmInputs<DeviceType<S>> inputs = {
        channels(), positions(), {}, map(platform, call.c, channels_, "c"), {call.form, call.constant}};
    const int64_t rows = gates_ * channels_, weights = rows * (call.weights_have_positions ? positions_ : 1);
    for (int term = 0; term < kLstmTerms; ++term) {
      const LstmTerm<S>& from = call.terms[term];
      inputs.terms[term] = {map(platform, from.x, rows, "x"), platform.input(on_device(from.weight), weights, "weight"),
                            platform.input(on_device(from.bias), weights, "bias")};
    }
    return inputs;
  }

 private:
  int widest_;
  int64_t batch_, channels_, gates_, positions_;
  bool folded_;
  uintptr_t addresses_ = 0;
  int64_t batch_strides_ = 0, row_strides_ = 0;
};

#endif

}  // namespace fastsam::cuda
