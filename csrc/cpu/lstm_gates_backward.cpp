// Gradients of lstm_gates, memory_gates and norm_gate. da is the gradient of the sum of the terms. Three stages of
// independent tasks, for a few samples at a time; without norms the first is all:
//   1. channels of the state: activations computed again, da (stored where the gradient of the first term will be), dc,
//      and for each gate and normalised term the sums of da w and da w (x - mean);
//   2. terms: the means that a norm's gradient subtracts, of dy = da w and of dy y, y = (x - mean) rstd;
//   3. channels of the terms, sample by sample: dx = rstd (dy - mean(dy) - y mean(dy y)), dweight and dbias.

#include "kernels_internal.h"
#include "lstm_gates.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// Vectors that are summed before their sum is added to a double.
constexpr int64_t kSumVectors = 64;

// Over a channel of a sample. Weights of one a channel are left out of da w.
struct ChannelSums {
  double dy[kLstmTerms], dy_centred[kLstmTerms];
};

// The part rstd (mean(dy) + y mean(dy y)) of a sample's gradient as x slope + offset.
struct Correction {
  double slope, offset;
};

template <class S, Update update>
struct Scratch {
  Scratch(Arena& arena, const LstmGatesBackward<S>& call, int64_t samples)
      : sums(arena.take<ChannelSums>(samples * gates_of(update) * call.channels)),
        corrections(arena.take<Correction>(samples * kLstmTerms)) {}

  ChannelSums* sums;        // (samples, G C)
  Correction* corrections;  // (samples, terms)
};

template <class T, Update update>
struct VectorSums {
  Vec<T> dy[kLstmTerms][gates_of(update)] = {}, dy_centred[kLstmTerms][gates_of(update)] = {};
};

template <class S, Update update, NormWeights weights>
inline void add_to_sums(const Gates<S, update, weights>& gates, const Vec<Compute<S>>* da, int64_t at, int64_t count,
                        VectorSums<Compute<S>, update>& sums) {
  using T = Compute<S>;
  for (int term = 0; term < kLstmTerms; ++term) {
    if (!gates.normalised(term)) continue;
    for (int gate = 0; gate < gates_of(update); ++gate) {
      Vec<T> dy = da[gate];
      if (weights == NormWeights::kPosition) dy *= gates.load_weight(term, gate, at, count);
      sums.dy[term][gate] += dy;
      sums.dy_centred[term][gate] += dy * gates.load_centred(term, gate, at, count);
    }
  }
}

template <class T, Update update>
void flush(const VectorSums<T, update>& from, int64_t channels, ChannelSums* sums) {
  for (int gate = 0; gate < gates_of(update); ++gate) {
    for (int term = 0; term < kLstmTerms; ++term) {
      sums[gate * channels].dy[term] += sum_lanes<T>(from.dy[term][gate]);
      sums[gate * channels].dy_centred[term] += sum_lanes<T>(from.dy_centred[term][gate]);
    }
  }
}

// Stage 1. `sums` are those of the channel's first gate.
template <class S, Update update, NormWeights weights>
FASTSAM_FLATTEN void activation_gradients(const LstmGatesBackward<S>& call, int64_t batch, int64_t channel,
                                          ChannelSums* sums) {
  using T = Compute<S>;
  constexpr int kGates = gates_of(update);
  const Gates<S, update, weights> gates(call, batch, channel);
  const Vec<T> constant = broadcast(call.constant);
  const Form form = call.form;
  const auto channel_of = [&](const Map<const S>& map) {
    return map.data + batch * map.stride_batch + channel * map.stride_channel;
  };
  const bool keeps_state = update != Update::kProduct || call.dc_new.data != nullptr;
  const S *c = channel_of(call.c), *dh = channel_of(call.dh);
  const S* dc_new = keeps_state ? channel_of(call.dc_new) : nullptr;
  const int64_t gate_size = call.channels * call.positions,
                out = (batch * kGates * call.channels + channel) * call.positions;
  S* dc = call.dc + (batch * call.channels + channel) * call.positions;
  S* dx = call.gradients[0].x + out;
  S* copy = call.gradients[1].x == nullptr || gates.normalised(1) ? nullptr : call.gradients[1].x + out;
  constexpr bool any_norm = weights != NormWeights::kNone;
  for (int gate = 0; any_norm && gate < kGates; ++gate) sums[gate * call.channels] = {};
  const int64_t step = any_norm ? kSumVectors * kLanes<T> : call.positions;
  for (int64_t start = 0; start < call.positions; start += step) {
    VectorSums<T, update> vector_sums;
    for_each_vector<T>(smaller(step, call.positions - start), [&](int64_t offset, int64_t count) {
      const int64_t at = start + offset;
      const auto a = [&](int gate) { return gates.load(gate, at, count); };
      const Vec<T> dcell = keeps_state ? load_part(dc_new + at, count) : broadcast(T(0));
      UpdateGradients<T, update> gradients =
          UpdateOf<T, update>::backward(a, load_part(c + at, count), form, constant, load_part(dh + at, count), dcell);
      store_part(dc + at, count, gradients.c);
      for (int gate = 0; gate < kGates; ++gate) store_part(dx + gate * gate_size + at, count, gradients.a[gate]);
      if (copy != nullptr) {
        for (int gate = 0; gate < kGates; ++gate) {
          store_part(copy + gate * gate_size + at, count, gradients.a[gate]);
        }
      }
      if constexpr (any_norm && !std::is_same_v<S, T>) {
        // Sums of what is stored: what cancels between them and da does, however much rstd magnifies the rest.
        for (int gate = 0; gate < kGates; ++gate) gradients.a[gate] = load_part(dx + gate * gate_size + at, count);
      }
      add_to_sums(gates, gradients.a, at, count, vector_sums);
    });
    if (any_norm) flush(vector_sums, call.channels, sums);
  }
}

// Stage 2. `sums` are those of the sample's first channel.
template <class S, Update update, NormWeights weights>
Correction correction(const LstmGatesBackward<S>& call, int term, int64_t batch, const ChannelSums* sums) {
  const int64_t rows = gates_of(update) * call.channels;
  double dy = 0, dy_centred = 0;
  for (int64_t channel = 0; channel < rows; ++channel) {
    const double weight = weights == NormWeights::kChannel ? call.terms[term].weight[channel] : 1;
    dy += weight * sums[channel].dy[term];
    dy_centred += weight * sums[channel].dy_centred[term];
  }
  const double count = static_cast<double>(rows * call.positions);
  const double mean = call.statistics[term][2 * batch], rstd = call.statistics[term][2 * batch + 1];
  const double slope = rstd * rstd * rstd * dy_centred / count;
  return {slope, rstd * dy / count - mean * slope};
}

// Stage 3 for a channel of one sample: dx from da, which may lie in the same memory; adds to the channel's dweight and
// dbias.
template <class S, Update update, NormWeights weights>
FASTSAM_FLATTEN void norm_gradients(const LstmGatesBackward<S>& call, int term, int64_t batch, int64_t channel,
                                    const S* da, const ChannelSums& sums, Correction correction) {
  using T = Compute<S>;
  const LstmTerm<S>& input = call.terms[term];
  const LstmTermGradients<S>& gradients = call.gradients[term];
  const S* x = input.x.data + batch * input.x.stride_batch + channel * input.x.stride_channel;
  S* dx = gradients.x + (batch * gates_of(update) * call.channels + channel) * call.positions;
  const T mean = call.statistics[term][2 * batch], rstd = call.statistics[term][2 * batch + 1];
  const Vec<T> slope = broadcast(static_cast<T>(correction.slope)),
               offset = broadcast(static_cast<T>(correction.offset));
  if (weights == NormWeights::kChannel) {
    const Vec<T> scale = broadcast(rstd * input.weight[channel]);
    for_each_vector<T>(call.positions, [&](int64_t at, int64_t count) {
      store_part(dx + at, count, load_part(da + at, count) * scale - (load_part(x + at, count) * slope + offset));
    });
    gradients.weight[channel] += static_cast<T>(sums.dy_centred[term] * rstd);
    gradients.bias[channel] += static_cast<T>(sums.dy[term]);
    return;
  }
  const T* weight = input.weight + channel * call.positions;
  T* dweight = gradients.weight + channel * call.positions;
  T* dbias = gradients.bias + channel * call.positions;
  for_each_vector<T>(call.positions, [&](int64_t at, int64_t count) {
    const Vec<T> dsum = load_part(da + at, count), input_at = load_part(x + at, count);
    const Vec<T> scaled = dsum * broadcast(rstd);
    store_part(dx + at, count, scaled * load_part(weight + at, count) - (input_at * slope + offset));
    store_part(dweight + at, count, load_part(dweight + at, count) + scaled * (input_at - broadcast(mean)));
    store_part(dbias + at, count, load_part(dbias + at, count) + dsum);
  });
}

// Sets the channel's dweight and dbias to 0.
template <class S, NormWeights weights>
void clear_channel(const LstmGatesBackward<S>& call, int64_t channel) {
  const int64_t row = weights == NormWeights::kPosition ? call.positions : 1;
  for (int term = 0; term < kLstmTerms; ++term) {
    if (call.terms[term].weight == nullptr) continue;
    std::memset(call.gradients[term].weight + channel * row, 0, row * sizeof(Compute<S>));
    std::memset(call.gradients[term].bias + channel * row, 0, row * sizeof(Compute<S>));
  }
}

// The second term first: the first one's gradient takes the place of da.
template <class S, Update update, NormWeights weights>
void channel_gradients(const LstmGatesBackward<S>& call, int64_t first, int64_t samples, int64_t channel,
                       const Scratch<S, update>& scratch) {
  const int64_t rows = gates_of(update) * call.channels;
  for (int term = kLstmTerms - 1; term >= 0; --term) {
    if (call.terms[term].weight == nullptr) continue;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const S* da = call.gradients[0].x + ((first + sample) * rows + channel) * call.positions;
      norm_gradients<S, update, weights>(call, term, first + sample, channel, da, scratch.sums[sample * rows + channel],
                                         scratch.corrections[sample * kLstmTerms + term]);
    }
  }
}

template <class S, Update update, NormWeights weights>
void backward(const LstmGatesBackward<S>& call, int threads) {
  const int64_t channels = call.channels, rows = gates_of(update) * channels;
  threads = lstm_threads(call, threads);
  const int64_t at_once = samples_at_once(call, threads);
  const bool any_norm = weights != NormWeights::kNone;
  Arena measure;
  Scratch<S, update>(measure, call, any_norm ? at_once : 0);
  const Workspace workspace(measure.size());
  Arena arena(workspace.data());
  const Scratch<S, update> scratch(arena, call, any_norm ? at_once : 0);
#pragma omp parallel num_threads(threads)
  {
    if (any_norm) {
#pragma omp for schedule(static)
      for (int64_t channel = 0; channel < rows; ++channel) clear_channel<S, weights>(call, channel);
    }
    for (int64_t first = 0; first < call.batch; first += at_once) {
      const int64_t samples = smaller(at_once, call.batch - first);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < samples * channels; ++task) {
        const int64_t sample = task / channels, channel = task % channels;
        activation_gradients<S, update, weights>(call, first + sample, channel, scratch.sums + sample * rows + channel);
      }
      if (!any_norm) continue;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < samples * kLstmTerms; ++task) {
        const int64_t sample = task / kLstmTerms;
        const int term = static_cast<int>(task % kLstmTerms);
        if (call.terms[term].weight == nullptr) continue;
        scratch.corrections[task] =
            correction<S, update, weights>(call, term, first + sample, scratch.sums + sample * rows);
      }
#pragma omp for schedule(static)
      for (int64_t channel = 0; channel < rows; ++channel) {
        channel_gradients<S, update, weights>(call, first, samples, channel, scratch);
      }
    }
  }
}

template <class S, Update update>
void backward(const LstmGatesBackward<S>& call, int threads) {
  switch (norm_weights(call)) {
    case NormWeights::kNone:
      return backward<S, update, NormWeights::kNone>(call, threads);
    case NormWeights::kChannel:
      return backward<S, update, NormWeights::kChannel>(call, threads);
    case NormWeights::kPosition:
      return backward<S, update, NormWeights::kPosition>(call, threads);
  }
}

}  // namespace

template <class S>
void lstm_gates_backward(const LstmGatesBackward<S>& call, int threads) {
  switch (call.update) {
    case Update::kLstm:
      return backward<S, Update::kLstm>(call, threads);
    case Update::kMemory:
      return backward<S, Update::kMemory>(call, threads);
    case Update::kProduct:
      return backward<S, Update::kProduct>(call, threads);
  }
}

template void lstm_gates_backward<float>(const LstmGatesBackward<float>&, int);
template void lstm_gates_backward<double>(const LstmGatesBackward<double>&, int);
template void lstm_gates_backward<bfloat16>(const LstmGatesBackward<bfloat16>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
