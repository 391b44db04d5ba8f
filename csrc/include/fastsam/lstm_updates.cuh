// The arithmetic of each Update of params.h, forward and backward, at V positions of a channel. An update is made of
// the sums of the terms at its gates and of the state; members have the names of its equation.
#pragma once

#include "fastsam/lstm_lanes.cuh"
#include "fastsam/params.h"

namespace fastsam::cuda {

// gates_of as a constant: kernels must not call what is a function of the host.
template <Update kUpdate>
constexpr int kGatesOf = gates_of(kUpdate);

// What is the same for all of a call.
template <class W>
struct UpdateRule {
  Form form;
  W constant;
};

// h() and c_new are what goes out. gradients() takes those of both, gives da at the gates and returns dc.
template <Update kUpdate, class W, int V>
struct GateUpdate;

template <class W, int V>
struct GateUpdate<Update::kLstm, W, V> {
  using Numbers = Lanes<W, V>;

  __device__ __forceinline__ GateUpdate(const Numbers (&a)[4], const Numbers& state, const UpdateRule<W>& rule)
      : c(state),
        i(sigmoid(a[0])),
        f(sigmoid(a[1] + rule.constant)),
        g(hyperbolic_tangent(a[2])),
        o(sigmoid(a[3])),
        c_new(f * c + i * g),
        form(rule.form) {}

  __device__ __forceinline__ Numbers h() const {
    if (form == Form::kGate) return o;
    return o * hyperbolic_tangent(c_new);
  }

  __device__ __forceinline__ Numbers gradients(const Numbers& dh, const Numbers& dc_new, Numbers (&da)[4]) const {
    Numbers dcell = dc_new, d_o = dh;
    if (form == Form::kHidden) {
      const Numbers tanh_cell = hyperbolic_tangent(c_new);
      dcell = dcell + dh * o * (1 - tanh_cell * tanh_cell);
      d_o = dh * tanh_cell;
    }
    da[0] = dcell * g * i * (1 - i);
    da[1] = dcell * c * f * (1 - f);
    da[2] = dcell * i * (1 - g * g);
    da[3] = d_o * o * (1 - o);
    return dcell * f;
  }

  const Numbers c, i, f, g, o, c_new;
  const Form form;
};

template <class W, int V>
struct GateUpdate<Update::kMemory, W, V> {
  using Numbers = Lanes<W, V>;

  __device__ __forceinline__ GateUpdate(const Numbers (&a)[3], const Numbers& state, const UpdateRule<W>& rule)
      : c(state),
        i(sigmoid(a[0])),
        g(hyperbolic_tangent(a[1])),
        o(sigmoid(a[2])),
        c_new((1 - i) * c + i * g),
        form(rule.form) {}

  __device__ __forceinline__ Numbers h() const {
    if (form == Form::kGate) return o;
    return o * c_new;
  }

  __device__ __forceinline__ Numbers gradients(const Numbers& dh, const Numbers& dc_new, Numbers (&da)[3]) const {
    Numbers dcell = dc_new, d_o = dh;
    if (form == Form::kHidden) {
      dcell = dcell + dh * o;
      d_o = dh * c_new;
    }
    da[0] = dcell * (g - c) * i * (1 - i);
    da[1] = dcell * i * (1 - g * g);
    da[2] = d_o * o * (1 - o);
    return dcell * (1 - i);
  }

  const Numbers c, i, g, o, c_new;
  const Form form;
};

template <class W, int V>
struct GateUpdate<Update::kProduct, W, V> {
  using Numbers = Lanes<W, V>;

  __device__ __forceinline__ GateUpdate(const Numbers (&a)[1], const Numbers& state, const UpdateRule<W>& rule)
      : c(state), c_new(a[0]), rule(rule), act(activated(a[0], rule.form)) {}

  __device__ __forceinline__ Numbers h() const { return rule.constant * act * c; }

  __device__ __forceinline__ Numbers gradients(const Numbers& dh, const Numbers& dc_new, Numbers (&da)[1]) const {
    const Numbers dproduct = rule.constant * dh;
    da[0] = dproduct * c;
    if (rule.form == Form::kTanh) da[0] = da[0] * (1 - act * act);
    if (rule.form == Form::kSigmoid) da[0] = da[0] * act * (1 - act);
    da[0] = da[0] + dc_new;
    return dproduct * act;
  }

  static __device__ __forceinline__ Numbers activated(const Numbers& a, Form form) {
    if (form == Form::kTanh) return hyperbolic_tangent(a);
    if (form == Form::kSigmoid) return sigmoid(a);
    return a;
  }

  const Numbers c, c_new;
  const UpdateRule<W> rule;
  const Numbers act;
};

}  // namespace fastsam::cuda
