// The parameter structs of params.h from what Python hands over: the fields as one flat tuple of numbers in the order
// of the struct. Address 0 is nullptr. Tensors are kept alive and checked by the caller.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "fastsam/params.h"

namespace fastsam {

// Reads a flat tuple, one field after the other.
class Fields {
 public:
  explicit Fields(const pybind11::tuple& values) : values_(values) {}

  template <class... Values>
  void read(Values&... values) {
    (read_one(values), ...);
  }

  void done() const {
    if (next_ != values_.size()) throw std::invalid_argument("too many fields for this call");
  }

 private:
  pybind11::handle next() {
    if (next_ >= values_.size()) throw std::invalid_argument("too few fields for this call");
    return PyTuple_GET_ITEM(values_.ptr(), next_++);
  }

  void read_one(int64_t& value) { value = next().cast<int64_t>(); }
  void read_one(int& value) { value = next().cast<int>(); }
  void read_one(float& value) { value = static_cast<float>(next().cast<double>()); }
  void read_one(double& value) { value = next().cast<double>(); }
  void read_one(Update& value) { value = static_cast<Update>(next().cast<int64_t>()); }
  void read_one(Form& value) { value = static_cast<Form>(next().cast<int64_t>()); }

  template <class T>
  void read_one(T*& address) {
    address = reinterpret_cast<T*>(next().cast<intptr_t>());
  }

  template <class T>
  void read_one(Map<T>& map) {
    read(map.data, map.stride_batch, map.stride_channel);
  }

  const pybind11::tuple& values_;
  pybind11::size_t next_ = 0;
};

template <class Call>
void read_attention_inputs(Fields& fields, Call& call) {
  AttentionSizes& sizes = call.sizes;
  fields.read(sizes.batch, sizes.channels, sizes.value_channels, sizes.positions);
  fields.read(sizes.windows.across, sizes.windows.down, sizes.windows.width, call.source_count);
  if (call.source_count < 1 || call.source_count > kMaxSources)
    throw std::invalid_argument("one or two sources are served");
  for (int s = 0; s < call.source_count; ++s) {
    auto& source = call.sources[s];
    fields.read(source.x, source.query_channels, source.score, source.score_bias, source.value, source.key);
  }
}

template <class S>
void read_call(Fields& fields, AttentionForward<S>& call) {
  read_attention_inputs(fields, call);
  fields.read(call.value_bias, call.z);
  for (int s = 0; s < call.source_count; ++s) fields.read(call.r[s]);
  for (int s = 0; s < call.source_count; ++s) fields.read(call.lse[s]);
  for (int s = 0; s < call.source_count; ++s) fields.read(call.shift[s]);
}

template <class S>
void read_call(Fields& fields, AttentionGatesForward<S>& call) {
  read_call(fields, call.attention);
  fields.read(call.m, call.pointwise, call.bias, call.h_hat, call.m_new);
}

template <class S>
void read_call(Fields& fields, AttentionBackward<S>& call) {
  read_attention_inputs(fields, call);
  fields.read(call.dz);
  for (int s = 0; s < call.source_count; ++s) fields.read(call.r[s]);
  for (int s = 0; s < call.source_count; ++s) fields.read(call.lse[s]);
  for (int s = 0; s < call.source_count; ++s) fields.read(call.shift[s]);
  for (int s = 0; s < call.source_count; ++s) {
    AttentionGradients<S>& out = call.gradients[s];
    fields.read(out.x, out.score, out.score_bias, out.value, out.key);
  }
  fields.read(call.dvalue_bias);
}

template <class Call>
void read_gate_inputs(Fields& fields, Call& call) {
  GateSizes& sizes = call.sizes;
  fields.read(sizes.batch, sizes.channels, sizes.z_channels, sizes.height, sizes.width, sizes.kernel_size);
  fields.read(call.z, call.h, call.m, call.depthwise, call.pointwise, call.bias);
}

template <class S, class W>
void read_call(Fields& fields, SeparableGatesForward<S, W>& call) {
  read_gate_inputs(fields, call);
  fields.read(call.h_hat, call.m_new);
}

template <class S, class W>
void read_call(Fields& fields, SeparableGatesBackward<S, W>& call) {
  read_gate_inputs(fields, call);
  fields.read(call.dh_hat, call.dm_new, call.dz, call.dh, call.dm, call.ddepthwise, call.dpointwise, call.dbias);
}

template <class Call>
void read_lstm_inputs(Fields& fields, Call& call) {
  fields.read(call.batch, call.channels, call.positions, call.weights_have_positions, call.update, call.form);
  for (auto& term : call.terms) fields.read(term.x, term.weight, term.bias);
  fields.read(call.c, call.constant);
}

template <class S, class W>
void read_call(Fields& fields, LstmGatesForward<S, W>& call) {
  read_lstm_inputs(fields, call);
  fields.read(call.eps, call.h, call.c_new, call.statistics[0], call.statistics[1]);
}

template <class S, class W>
void read_call(Fields& fields, LstmGatesBackward<S, W>& call) {
  read_lstm_inputs(fields, call);
  fields.read(call.dh, call.dc_new, call.statistics[0], call.statistics[1]);
  for (auto& out : call.gradients) fields.read(out.x, out.weight, out.bias);
  fields.read(call.dc);
}

template <class Call>
Call call_from(const pybind11::tuple& values) {
  Fields fields(values);
  Call call{};
  read_call(fields, call);
  fields.done();
  return call;
}

}  // namespace fastsam
