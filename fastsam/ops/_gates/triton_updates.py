"""The arithmetic of each update in the Triton kernels, forward and backward: see `Update` in update.py.

KIND and FORM are those of the update, the gates `a` a tuple of tiles before their activations; all tiles are float32.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._triton.language import sigmoid, tanh


@triton.jit
def updated(a, c, constant, KIND: tl.constexpr, FORM: tl.constexpr):
    """h and c_new; s is the sigmoid:

        lstm     a = (i, f, g, o)  c_new = s(f + constant) c + s(i) tanh(g)  h = s(o) tanh(c_new)
        memory   a = (i, g, o)     c_new = (1 - s(i)) c + s(i) tanh(g)       h = s(o) c_new
        product  a = (a)           c_new = a                                 h = constant act(a) c

    FORM is the act of product; with the others "gate" stands for h = s(o).
    """
    if KIND == "lstm":
        c_new = sigmoid(a[1] + constant) * c + sigmoid(a[0]) * tanh(a[2])
        h = sigmoid(a[3]) if FORM == "gate" else sigmoid(a[3]) * tanh(c_new)
    elif KIND == "memory":
        i = sigmoid(a[0])
        c_new = (1.0 - i) * c + i * tanh(a[1])
        h = sigmoid(a[2]) if FORM == "gate" else sigmoid(a[2]) * c_new
    else:
        c_new = a[0]
        h = constant * _activated(a[0], FORM)[0] * c
    return h, c_new


@triton.jit
def gradients_of(a, c, dh, dc_new, constant, KIND: tl.constexpr, FORM: tl.constexpr):
    """The gradients of the gates before their activations, a tuple, and of c. The activations are made again.

        lstm     dc_new += dh s(o) (1 - tanh(c_new)^2)  dc = dc_new s(f + constant)   do = dh tanh(c_new) o (1 - o)
                 di = dc_new g i (1 - i)                df = dc_new c f (1 - f)       dg = dc_new i (1 - g^2)
        memory   dc_new += dh s(o)                      dc = dc_new (1 - i)           do = dh c_new o (1 - o)
                 di = dc_new (g - c) i (1 - i)                                        dg = dc_new i (1 - g^2)
        product  da = dc_new + constant dh c act'(a)    dc = constant dh act(a)

    On the right i, f, g, o are those after their activations. With FORM "gate" do = dh o (1 - o), and dh does not reach
    dc_new.
    """
    if KIND == "lstm":
        return _of_lstm(a, c, dh, dc_new, constant, FORM)
    elif KIND == "memory":
        return _of_memory(a, c, dh, dc_new, FORM)
    else:
        activated, slope = _activated(a[0], FORM)
        scaled = constant * dh
        return (dc_new + scaled * c * slope,), scaled * activated


@triton.jit
def _of_lstm(a, c, dh, dc_new, constant, FORM: tl.constexpr):
    i = sigmoid(a[0])
    f = sigmoid(a[1] + constant)
    g = tanh(a[2])
    o = sigmoid(a[3])
    if FORM == "hidden":
        tanh_c = tanh(f * c + i * g)
        dc_new += dh * o * (1.0 - tanh_c * tanh_c)
        dh *= tanh_c
    di = dc_new * g * i * (1.0 - i)
    df = dc_new * c * f * (1.0 - f)
    return (di, df, dc_new * i * (1.0 - g * g), dh * o * (1.0 - o)), dc_new * f


@triton.jit
def _of_memory(a, c, dh, dc_new, FORM: tl.constexpr):
    i = sigmoid(a[0])
    g = tanh(a[1])
    o = sigmoid(a[2])
    if FORM == "hidden":
        dc_new += dh * o
        dh *= (1.0 - i) * c + i * g
    return (dc_new * (g - c) * i * (1.0 - i), dc_new * i * (1.0 - g * g), dh * o * (1.0 - o)), dc_new * (1.0 - i)


@triton.jit
def _activated(a, FORM: tl.constexpr):
    """act(a) of the update product, and its derivative there."""
    if FORM == "tanh":
        activated = tanh(a)
        slope = 1.0 - activated * activated
    elif FORM == "sigmoid":
        activated = sigmoid(a)
        slope = activated * (1.0 - activated)
    else:
        activated = a
        slope = 1.0
    return activated, slope
