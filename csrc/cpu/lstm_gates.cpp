// c_new = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c_new). Equations:
// fastsam/ops/lstm_gates/eager.py. Bound by memory: each value is read and written once, activations are recomputed.

#include "kernels_internal.h"
#include "tile.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// A position costs about this many multiply-adds: five exponentials with their divisions, and its memory.
constexpr int64_t kWork = 50;

template <class T>
struct Activations {
  Vec<T> i, f, g, o;
};

template <class T>
inline Activations<T> activate(Vec<T> i, Vec<T> f, Vec<T> g, Vec<T> o, Vec<T> forget_bias) {
  return {sigmoid<T>(i), sigmoid<T>(f + forget_bias), tanh<T>(g), sigmoid<T>(o)};
}

template <class T>
inline void store_part(T* address, int64_t count, Vec<T> value) {
  std::memcpy(address, &value, count * sizeof(T));
}

// Calls `step(offset, count)` for each vector of a channel's positions.
template <class T, class Step>
inline void for_each_vector(int64_t positions, Step step) {
  int64_t position = 0;
  for (; position + kLanes<T> <= positions; position += kLanes<T>) step(position, kLanes<T>);
  if (position < positions) step(position, positions - position);
}

}  // namespace

template <class T>
void lstm_gates_forward(const LstmGatesForward<T>& call, int threads) {
  const int64_t channels = call.channels, positions = call.positions;
  const Vec<T> forget_bias = broadcast(call.forget_bias);
  threads = useful_threads(threads, call.batch * channels * positions * kWork);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < call.batch * channels; ++task) {
    const int64_t batch = task / channels, channel = task % channels, gate = channels * call.gates.stride_channel;
    const T* gates = call.gates.data + batch * call.gates.stride_batch + channel * call.gates.stride_channel;
    const T* c = call.c.data + batch * call.c.stride_batch + channel * call.c.stride_channel;
    T* h = call.h + task * positions;
    T* c_new = call.c_new + task * positions;
    for_each_vector<T>(positions, [&](int64_t at, int64_t count) {
      const auto a =
          activate<T>(load_part(gates + at, count), load_part(gates + gate + at, count),
                      load_part(gates + 2 * gate + at, count), load_part(gates + 3 * gate + at, count), forget_bias);
      const Vec<T> cell = a.f * load_part(c + at, count) + a.i * a.g;
      store_part<T>(c_new + at, count, cell);
      store_part<T>(h + at, count, a.o * tanh<T>(cell));
    });
  }
}

template <class T>
void lstm_gates_backward(const LstmGatesBackward<T>& call, int threads) {
  const int64_t channels = call.channels, positions = call.positions;
  const Vec<T> forget_bias = broadcast(call.forget_bias), one = broadcast(T(1));
  threads = useful_threads(threads, call.batch * channels * positions * kWork);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < call.batch * channels; ++task) {
    const int64_t batch = task / channels, channel = task % channels, gate = channels * call.gates.stride_channel;
    const T* gates = call.gates.data + batch * call.gates.stride_batch + channel * call.gates.stride_channel;
    const T* c = call.c.data + batch * call.c.stride_batch + channel * call.c.stride_channel;
    const T* dh = call.dh.data + batch * call.dh.stride_batch + channel * call.dh.stride_channel;
    const T* dc_new = call.dc_new.data + batch * call.dc_new.stride_batch + channel * call.dc_new.stride_channel;
    T* dgates = call.dgates + (batch * 4 * channels + channel) * positions;
    T* dc = call.dc + task * positions;
    const int64_t dgate = channels * positions;
    for_each_vector<T>(positions, [&](int64_t at, int64_t count) {
      const auto a =
          activate<T>(load_part(gates + at, count), load_part(gates + gate + at, count),
                      load_part(gates + 2 * gate + at, count), load_part(gates + 3 * gate + at, count), forget_bias);
      const Vec<T> cell = load_part(c + at, count), dhidden = load_part(dh + at, count);
      const Vec<T> tanh_cell = tanh<T>(a.f * cell + a.i * a.g);
      const Vec<T> dcell = load_part(dc_new + at, count) + dhidden * a.o * (one - tanh_cell * tanh_cell);
      store_part<T>(dgates + at, count, dcell * a.g * a.i * (one - a.i));
      store_part<T>(dgates + dgate + at, count, dcell * cell * a.f * (one - a.f));
      store_part<T>(dgates + 2 * dgate + at, count, dcell * a.i * (one - a.g * a.g));
      store_part<T>(dgates + 3 * dgate + at, count, dhidden * tanh_cell * a.o * (one - a.o));
      store_part<T>(dc + at, count, dcell * a.f);
    });
  }
}

template void lstm_gates_forward<float>(const LstmGatesForward<float>&, int);
template void lstm_gates_forward<double>(const LstmGatesForward<double>&, int);
template void lstm_gates_backward<float>(const LstmGatesBackward<float>&, int);
template void lstm_gates_backward<double>(const LstmGatesBackward<double>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
