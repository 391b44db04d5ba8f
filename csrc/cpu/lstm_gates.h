// What the two passes of lstm_gates, memory_gates and norm_gate share: their terms, normalised or not. Equations:
// fastsam/ops/_gates/update.py. Bound by memory: activations are recomputed, normalised maps are never stored.
#pragma once

#include "lstm_updates.h"
#include "tile.h"

// Inlines whatever the function calls: calls in a loop over vectors keep the constants out of the registers.
#if defined(_MSC_VER)
#define FASTSAM_FLATTEN
#else
#define FASTSAM_FLATTEN __attribute__((flatten))
#endif

namespace fastsam {
namespace FASTSAM_ISA {

// How the weights of the normalised terms lie: there is none, one a channel, or one a channel and position.
enum class NormWeights { kNone, kChannel, kPosition };

// A position costs about this many multiply-adds, exponentials with their divisions and its memory; and this many more
// for each normalised term.
constexpr int64_t work_of(Update update) { return 10 * gates_of(update) + 10; }
constexpr int64_t norm_work_of(Update update) { return 6 * gates_of(update); }

template <class Call>
inline NormWeights norm_weights(const Call& call) {
  if (call.terms[0].weight == nullptr && call.terms[1].weight == nullptr) return NormWeights::kNone;
  return call.weights_have_positions ? NormWeights::kPosition : NormWeights::kChannel;
}

template <class Call>
inline int lstm_threads(const Call& call, int threads) {
  int64_t work = work_of(call.update);
  for (const auto& term : call.terms) work += term.weight == nullptr ? 0 : norm_work_of(call.update);
  return useful_threads(threads, call.batch * call.channels * call.positions * work);
}

// Samples that go through the passes together: one a thread, so that what a pass has read is still in the thread's
// cache when the next one reads it. Without norms there is one pass.
template <class Call>
inline int64_t samples_at_once(const Call& call, int threads) {
  return norm_weights(call) == NormWeights::kNone ? call.batch : smaller(call.batch, threads);
}

// Calls `step(offset, count)` for each vector of a channel's positions.
template <class T, class Step>
inline void for_each_vector(int64_t positions, Step step) {
  int64_t position = 0;
  for (; position + kLanes<T> <= positions; position += kLanes<T>) step(position, kLanes<T>);
  if (position < positions) step(position, positions - position);
}

// The terms at the gates of one channel of one sample.
template <class S, Update update, NormWeights weights>
class Gates {
  using T = Compute<S>;
  static constexpr int kGates = gates_of(update);

 public:
  template <class Call>
  Gates(const Call& call, int64_t batch, int64_t channel) {
    const int64_t row = weights == NormWeights::kPosition ? call.positions : 1;
    weight_gate_ = call.channels * row;
    for (int term = 0; term < kLstmTerms; ++term) {
      const LstmTerm<S>& from = call.terms[term];
      gate_[term] = call.channels * from.x.stride_channel;
      x_[term] = from.x.data;
      if (x_[term] != nullptr) x_[term] += batch * from.x.stride_batch + channel * from.x.stride_channel;
      weight_[term] = from.weight;
      if (from.weight == nullptr) continue;
      weight_[term] += channel * row;
      bias_[term] = from.bias + channel * row;
      mean_[term] = call.statistics[term][2 * batch];
      rstd_[term] = call.statistics[term][2 * batch + 1];
      if (weights == NormWeights::kChannel) scale_and_shift(term);
    }
  }

  bool normalised(int term) const { return weights != NormWeights::kNone && weight_[term] != nullptr; }

  // The sum of the terms.
  Vec<T> load(int gate, int64_t at, int64_t count) const {
    const Vec<T> first = load_term(0, gate, at, count);
    return x_[1] == nullptr ? first : first + load_term(1, gate, at, count);
  }

  // x - mean
  Vec<T> load_centred(int term, int gate, int64_t at, int64_t count) const {
    return load_part(x_[term] + gate * gate_[term] + at, count) - broadcast(mean_[term]);
  }

  // Weights per position.
  Vec<T> load_weight(int term, int gate, int64_t at, int64_t count) const {
    return load_part(weight_[term] + gate * weight_gate_ + at, count);
  }

 private:
  void scale_and_shift(int term) {
    for (int gate = 0; gate < kGates; ++gate) {
      const T scale = rstd_[term] * weight_[term][gate * weight_gate_];
      scale_[term][gate] = broadcast(scale);
      const double shift = bias_[term][gate * weight_gate_] - static_cast<double>(mean_[term]) * scale;
      shift_[term][gate] = broadcast(static_cast<T>(shift));
    }
  }

  Vec<T> load_term(int term, int gate, int64_t at, int64_t count) const {
    if (!normalised(term)) return load_part(x_[term] + gate * gate_[term] + at, count);
    if (weights == NormWeights::kChannel) {
      return load_part(x_[term] + gate * gate_[term] + at, count) * scale_[term][gate] + shift_[term][gate];
    }
    return load_centred(term, gate, at, count) * broadcast(rstd_[term]) * load_weight(term, gate, at, count) +
           load_part(bias_[term] + gate * weight_gate_ + at, count);
  }

  const S* x_[kLstmTerms];
  int64_t gate_[kLstmTerms];  // distance from gate to gate
  const T *weight_[kLstmTerms], *bias_[kLstmTerms];
  int64_t weight_gate_;
  T mean_[kLstmTerms], rstd_[kLstmTerms];
  Vec<T> scale_[kLstmTerms][kGates], shift_[kLstmTerms][kGates];
};

}  // namespace FASTSAM_ISA
}  // namespace fastsam
