"""`lstm_gates`: the gate arithmetic of a ConvLSTM cell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._check import Arguments, real_number
from fastsam.ops.lstm_gates import eager, native

_IMPLEMENTATIONS: dict[str, Any] = {"eager": eager, "cpu": native}


def lstm_gates(gates: Tensor, c: Tensor, forget_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """The state update of a ConvLSTM cell (SA-ConvLSTM paper, equation 1) from its summed convolutions.

        c_new = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g)        h = sigmoid(o) tanh(c_new)

    Args:
        gates: (B, 4C, H, W), order i, f, g, o.
        c: cell state, (B, C, H, W).
        forget_bias: added to f.

    Returns:
        h and c_new, both (B, C, H, W), contiguous.

    Raises:
        TypeError: an argument is of the wrong type, not floating-point, or c is of another dtype than gates.
        ValueError: a shape or device does not fit.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    if isinstance(gates, Tensor) and _dispatch.autocast_enabled(gates):
        return _dispatch.without_autocast(_lstm_gates, gates, c, forget_bias)
    return _lstm_gates(gates, c, forget_bias)


def _lstm_gates(gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    _check(gates, c, forget_bias)
    if _dispatch.needs_registered_operator((gates, c)) and backends.selected() != "eager":
        return torch.ops.fastsam.lstm_gates(gates, c, forget_bias)
    backend = _dispatch.choose("lstm_gates", gates)
    if backend == "eager":
        return eager.lstm_gates(gates, c, forget_bias)
    if _dispatch.wants_gradient((gates, c)):
        return _LSTMGates.apply(backend, gates, c, forget_bias)
    return _IMPLEMENTATIONS[backend].forward(gates, c, forget_bias)


def _check(gates: Any, c: Any, forget_bias: Any) -> None:
    check = Arguments("lstm_gates")
    check.tensor("c", c, "B", "C", "H", "W")
    check.bind(**{"4C": 4 * c.shape[1]})
    check.tensor("gates", gates, "B", "4C", "H", "W")
    real_number("lstm_gates", "forget_bias", forget_bias)


class _LSTMGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
        ctx.implementation = _IMPLEMENTATIONS[backend]
        ctx.save_for_backward(gates, c)
        ctx.forget_bias = forget_bias
        return ctx.implementation.forward(gates, c, forget_bias)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc_new: Tensor) -> Any:
        gates, c = ctx.saved_tensors
        gradients = ctx.implementation.backward(dh.detach(), dc_new.detach(), gates, c, ctx.forget_bias)
        return (None, *_dispatch.first_derivative_only("lstm_gates", gradients, [dh, dc_new, gates, c]), None)


def _module(gates: Tensor) -> Any:
    return _IMPLEMENTATIONS[backends.choose("lstm_gates", gates.device.type, gates.dtype)]


def _implementation(gates: Tensor, c: Tensor, forget_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    return _module(gates).forward(gates, c, forget_bias)


def _fake(gates: Tensor, c: Tensor, forget_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    return c.new_empty(c.shape), c.new_empty(c.shape)


def _backward_implementation(
    dh: Tensor, dc_new: Tensor, gates: Tensor, c: Tensor, forget_bias: float
) -> tuple[Tensor, Tensor]:
    return _module(gates).backward(dh, dc_new, gates, c, forget_bias)


def _backward_fake(dh: Tensor, dc_new: Tensor, gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    return gates.new_empty(gates.shape), c.new_empty(c.shape)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    gates, c, ctx.forget_bias = inputs
    ctx.save_for_backward(gates, c)


def _backward(ctx: Any, dh: Tensor, dc_new: Tensor) -> tuple[Tensor, Tensor, None]:
    dgates, dc = torch.ops.fastsam.lstm_gates_backward(dh, dc_new, *ctx.saved_tensors, ctx.forget_bias)
    return dgates, dc, None


_dispatch.register(
    "lstm_gates",
    "(Tensor gates, Tensor c, float forget_bias=0.0) -> (Tensor h, Tensor c_new)",
    "(Tensor dh, Tensor dc_new, Tensor gates, Tensor c, float forget_bias) -> (Tensor dgates, Tensor dc)",
    implementation=_implementation,
    fake=_fake,
    backward_implementation=_backward_implementation,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
