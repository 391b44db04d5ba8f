// What becomes of the gates and of a state, and the gradients of that, on vectors of positions: the equations of
// `Update` in params.h. `a(gate)` loads a gate before its activation.
#pragma once

#include "simd.h"

namespace fastsam {
namespace FASTSAM_ISA {

template <class T>
struct Updated {
  Vec<T> h, c_new;
};

// With respect to the gates, before their activations, and to the state.
template <class T, Update update>
struct UpdateGradients {
  Vec<T> a[gates_of(update)], c;
};

template <class T, Update update>
struct UpdateOf;

template <class T>
struct UpdateOf<T, Update::kLstm> {
  template <class Gate>
  static Updated<T> forward(const Gate& a, Vec<T> c, Form form, Vec<T> forget_bias) {
    const Vec<T> i = sigmoid<T>(a(0)), f = sigmoid<T>(a(1) + forget_bias), g = tanh<T>(a(2)), o = sigmoid<T>(a(3));
    const Vec<T> c_new = f * c + i * g;
    return {form == Form::kGate ? o : o * tanh<T>(c_new), c_new};
  }

  template <class Gate>
  static UpdateGradients<T, Update::kLstm> backward(const Gate& a, Vec<T> c, Form form, Vec<T> forget_bias, Vec<T> dh,
                                                    Vec<T> dc_new) {
    const Vec<T> one = broadcast(T(1));
    const Vec<T> i = sigmoid<T>(a(0)), f = sigmoid<T>(a(1) + forget_bias), g = tanh<T>(a(2)), o = sigmoid<T>(a(3));
    Vec<T> dcell = dc_new, dgate = dh;
    if (form == Form::kHidden) {
      const Vec<T> tanh_cell = tanh<T>(f * c + i * g);
      dcell += dh * o * (one - tanh_cell * tanh_cell);
      dgate *= tanh_cell;
    }
    return {{dcell * g * i * (one - i), dcell * c * f * (one - f), dcell * i * (one - g * g), dgate * o * (one - o)},
            dcell * f};
  }
};

template <class T>
struct UpdateOf<T, Update::kMemory> {
  template <class Gate>
  static Updated<T> forward(const Gate& a, Vec<T> c, Form form, Vec<T>) {
    const Vec<T> i = sigmoid<T>(a(0)), g = tanh<T>(a(1)), o = sigmoid<T>(a(2));
    const Vec<T> c_new = (broadcast(T(1)) - i) * c + i * g;
    return {form == Form::kGate ? o : o * c_new, c_new};
  }

  template <class Gate>
  static UpdateGradients<T, Update::kMemory> backward(const Gate& a, Vec<T> c, Form form, Vec<T>, Vec<T> dh,
                                                      Vec<T> dc_new) {
    const Vec<T> one = broadcast(T(1));
    const Vec<T> i = sigmoid<T>(a(0)), g = tanh<T>(a(1)), o = sigmoid<T>(a(2));
    Vec<T> dcell = dc_new, dgate = dh;
    if (form == Form::kHidden) {
      dcell += dh * o;
      dgate *= (one - i) * c + i * g;
    }
    return {{dcell * (g - c) * i * (one - i), dcell * i * (one - g * g), dgate * o * (one - o)}, dcell * (one - i)};
  }
};

template <class T>
struct UpdateOf<T, Update::kProduct> {
  template <class Gate>
  static Updated<T> forward(const Gate& a, Vec<T> c, Form form, Vec<T> scale) {
    const Vec<T> x = a(0);
    const Vec<T> act = form == Form::kSigmoid ? sigmoid<T>(x) : form == Form::kTanh ? tanh<T>(x) : x;
    return {scale * act * c, x};
  }

  template <class Gate>
  static UpdateGradients<T, Update::kProduct> backward(const Gate& a, Vec<T> c, Form form, Vec<T> scale, Vec<T> dh,
                                                       Vec<T> dc_new) {
    const Vec<T> one = broadcast(T(1)), x = a(0);
    Vec<T> act = x, slope = one;
    if (form == Form::kSigmoid) {
      act = sigmoid<T>(x);
      slope = act * (one - act);
    } else if (form == Form::kTanh) {
      act = tanh<T>(x);
      slope = one - act * act;
    }
    const Vec<T> scaled = scale * dh;
    return {{scaled * c * slope + dc_new}, scaled * act};
  }
};

}  // namespace FASTSAM_ISA
}  // namespace fastsam
