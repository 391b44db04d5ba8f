// The forward pass of lstm_gates, memory_gates and norm_gate: h and c_new from gates that are sums of terms, each
// normalised or not. Three stages of independent tasks, for a few samples at a time:
//   1. channels of the terms: their moments;
//   2. terms: mean and 1 / sqrt(variance + eps) of the sample;
//   3. channels of the state: h and c_new.

#include <cmath>

#include "kernels_internal.h"
#include "lstm_gates.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// Positions whose moments are taken together: they stay in the first cache for the second look at them, and are few
// enough for a sum in float.
constexpr int64_t kMomentPositions = 512;

// The mean of some numbers and the sum of their squared distances from it.
struct Moments {
  double mean, squares;
};

// The sum of `term(at, count)` over the vectors of some positions; four sums, which need not wait for each other.
template <class T, class Term>
inline Vec<T> sum_vectors(int64_t positions, Term term) {
  constexpr int64_t lanes = kLanes<T>, step = 4 * lanes;
  Vec<T> sums[4] = {broadcast(T(0)), broadcast(T(0)), broadcast(T(0)), broadcast(T(0))};
  int64_t at = 0;
  for (; at + step <= positions; at += step) {
    for (int index = 0; index < 4; ++index) sums[index] += term(at + index * lanes, lanes);
  }
  for (; at < positions; at += lanes) sums[0] += term(at, smaller(lanes, positions - at));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
inline Vec<T> first_lanes(Vec<T> value, int64_t count) {
  if (count == kLanes<T>) return value;
  T lanes[kLanes<T>];
  store(lanes, value);
  return load_part(lanes, count);
}

template <class S>
inline Moments block_moments(const S* x, int64_t positions) {
  using T = Compute<S>;
  const Vec<T> sum = sum_vectors<T>(positions, [&](int64_t at, int64_t count) { return load_part(x + at, count); });
  const double mean = static_cast<double>(sum_lanes<T>(sum)) / positions;
  const Vec<T> centre = broadcast(static_cast<T>(mean));
  const Vec<T> squares = sum_vectors<T>(positions, [&](int64_t at, int64_t count) {
    const Vec<T> distance = first_lanes<T>(load_part(x + at, count) - centre, count);
    return distance * distance;
  });
  return {mean, static_cast<double>(sum_lanes<T>(squares))};
}

// The moments of a channel: those of its blocks, joined in their order (Chan, Golub, LeVeque 1983).
template <class S>
Moments channel_moments(const S* x, int64_t positions) {
  Moments all = block_moments(x, smaller(kMomentPositions, positions));
  for (int64_t done = kMomentPositions; done < positions; done += kMomentPositions) {
    const int64_t count = smaller(kMomentPositions, positions - done);
    const Moments block = block_moments(x + done, count);
    const double distance = block.mean - all.mean, share = static_cast<double>(count) / (done + count);
    all.mean += distance * share;
    all.squares += block.squares + distance * distance * share * done;
  }
  return all;
}

// Mean and 1 / sqrt(variance + eps) of a sample from the moments of its channels.
template <class T>
void sample_statistics(const Moments* channels, int64_t count, int64_t positions, double eps, T* statistics) {
  double mean = 0, squares = 0;
  for (int64_t channel = 0; channel < count; ++channel) mean += channels[channel].mean;
  mean /= count;
  for (int64_t channel = 0; channel < count; ++channel) {
    const double distance = channels[channel].mean - mean;
    squares += channels[channel].squares + positions * distance * distance;
  }
  statistics[0] = static_cast<T>(mean);
  statistics[1] = static_cast<T>(1 / std::sqrt(squares / (count * positions) + eps));
}

template <class S, Update update, NormWeights weights>
FASTSAM_FLATTEN void update_channel(const LstmGatesForward<S>& call, int64_t batch, int64_t channel) {
  using T = Compute<S>;
  const Gates<S, update, weights> gates(call, batch, channel);
  const Vec<T> constant = broadcast(call.constant);
  const Form form = call.form;
  const S* c = call.c.data + batch * call.c.stride_batch + channel * call.c.stride_channel;
  const int64_t out = (batch * call.channels + channel) * call.positions;
  S* h = call.h + out;
  S* c_new = update == Update::kProduct && call.c_new == nullptr ? nullptr : call.c_new + out;
  for_each_vector<T>(call.positions, [&](int64_t at, int64_t count) {
    const auto a = [&](int gate) { return gates.load(gate, at, count); };
    const Updated<T> updated = UpdateOf<T, update>::forward(a, load_part(c + at, count), form, constant);
    if (update != Update::kProduct || c_new != nullptr) store_part(c_new + at, count, updated.c_new);
    store_part(h + at, count, updated.h);
  });
}

template <class S, Update update, NormWeights weights>
void forward(const LstmGatesForward<S>& call, int threads) {
  const int64_t channels = call.channels, rows = gates_of(update) * channels, positions = call.positions;
  threads = lstm_threads(call, threads);
  const int64_t at_once = samples_at_once(call, threads);
  const bool any_norm = weights != NormWeights::kNone;
  const Workspace workspace(any_norm ? at_once * kLstmTerms * rows * static_cast<int64_t>(sizeof(Moments)) : 0);
  Moments* moments = reinterpret_cast<Moments*>(workspace.data());
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < call.batch; first += at_once) {
    const int64_t samples = smaller(at_once, call.batch - first);
    if (any_norm) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < samples * kLstmTerms * rows; ++task) {
        const LstmTerm<S>& term = call.terms[task / rows % kLstmTerms];
        const int64_t batch = first + task / (kLstmTerms * rows);
        if (term.weight == nullptr) continue;
        const S* x = term.x.data + batch * term.x.stride_batch + task % rows * term.x.stride_channel;
        moments[task] = channel_moments(x, positions);
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < samples * kLstmTerms; ++task) {
        const int64_t term = task % kLstmTerms, batch = first + task / kLstmTerms;
        if (call.terms[term].weight == nullptr) continue;
        sample_statistics(moments + task * rows, rows, positions, call.eps, call.statistics[term] + 2 * batch);
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < samples * channels; ++task) {
      update_channel<S, update, weights>(call, first + task / channels, task % channels);
    }
  }
}

template <class S, Update update>
void forward(const LstmGatesForward<S>& call, int threads) {
  switch (norm_weights(call)) {
    case NormWeights::kNone:
      return forward<S, update, NormWeights::kNone>(call, threads);
    case NormWeights::kChannel:
      return forward<S, update, NormWeights::kChannel>(call, threads);
    case NormWeights::kPosition:
      return forward<S, update, NormWeights::kPosition>(call, threads);
  }
}

}  // namespace

template <class S>
void lstm_gates_forward(const LstmGatesForward<S>& call, int threads) {
  switch (call.update) {
    case Update::kLstm:
      return forward<S, Update::kLstm>(call, threads);
    case Update::kMemory:
      return forward<S, Update::kMemory>(call, threads);
    case Update::kProduct:
      return forward<S, Update::kProduct>(call, threads);
  }
}

template void lstm_gates_forward<float>(const LstmGatesForward<float>&, int);
template void lstm_gates_forward<double>(const LstmGatesForward<double>&, int);
template void lstm_gates_forward<bfloat16>(const LstmGatesForward<bfloat16>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
