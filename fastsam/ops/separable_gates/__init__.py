"""`separable_gates`: the gated memory update of SAM with depthwise-separable gates."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._check import Arguments
from fastsam.ops.separable_gates import eager, native


def implementation(backend: str) -> Any:
    """The module with `forward` and `backward` of a back end; only the back end triton imports Triton."""
    if backend == "triton":
        return importlib.import_module("fastsam.ops.separable_gates.triton")
    return eager if backend == "eager" else native


def separable_gates(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Memory updating and output of SAM (SA-ConvLSTM paper, equations 8 and 9).

        u = depthwise * [z; h]        [i; g; o] = pointwise u + bias
        m_new = (1 - sigmoid(i)) m + sigmoid(i) tanh(g)        h_hat = sigmoid(o) m_new

    Args:
        z: aggregated feature, (B, Cz, H, W), or None for gates on h alone (Cz = 0).
        h: hidden state, (B, C, H, W).
        m: memory, (B, C, H, W).
        depthwise: one k x k filter a channel of [z; h], (Cz + C, 1, k, k) with odd k, zero padding k // 2; None for
            1x1 gates.
        pointwise: (3C, Cz + C, 1, 1), gate order i, g, o.
        bias: (3C,) or None.

    Returns:
        h_hat and m_new, both (B, C, H, W), contiguous.

    Raises:
        TypeError: an argument is no tensor, not floating-point, or of another dtype than h.
        ValueError: a shape or device does not fit, or k is even.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    arguments = (z, h, m, depthwise, pointwise, bias)
    if isinstance(h, Tensor) and _dispatch.autocast_enabled(h):
        return _dispatch.without_autocast(_separable_gates, *arguments)
    return _separable_gates(*arguments)


def _separable_gates(*arguments: Any) -> tuple[Tensor, Tensor]:
    check_arguments(*arguments)
    if _dispatch.needs_registered_operator(arguments) and backends.selected() != "eager":
        return torch.ops.fastsam.separable_gates(*arguments)
    backend = _dispatch.choose("separable_gates", arguments[1])
    if backend == "eager":
        return eager.separable_gates(*arguments)
    if _dispatch.wants_gradient(arguments):
        return _SeparableGates.apply(backend, *arguments)
    return implementation(backend).forward(*arguments)


def check_arguments(z: Any, h: Any, m: Any, depthwise: Any, pointwise: Any, bias: Any) -> None:
    check = Arguments("separable_gates")
    check.tensor("h", h, "B", "C", "H", "W")
    check.tensor("m", m, "B", "C", "H", "W")
    if z is not None:
        check.tensor("z", z, "B", "Cz", "H", "W")
    channels = h.shape[1]
    check.bind(**{"Cz+C": channels + (0 if z is None else z.shape[1]), "3C": 3 * channels})
    if depthwise is not None:
        check.tensor("depthwise", depthwise, "Cz+C", 1, "k", "k")
        if depthwise.shape[-1] % 2 == 0:
            raise ValueError(
                f"separable_gates: depthwise must have an odd kernel size k, so that the map keeps its size, "
                f"got shape {tuple(depthwise.shape)}"
            )
    check.tensor("pointwise", pointwise, "3C", "Cz+C", 1, 1)
    if bias is not None:
        check.tensor("bias", bias, "3C")


class _SeparableGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.implementation = implementation(backend)
        ctx.save_for_backward(*arguments)
        return ctx.implementation.forward(*arguments)

    @staticmethod
    def backward(ctx: Any, dh_hat: Tensor, dm_new: Tensor) -> Any:
        saved = ctx.saved_tensors
        gradients = ctx.implementation.backward(dh_hat.detach(), dm_new.detach(), *saved)
        return (None, *_dispatch.first_derivative_only("separable_gates", gradients, [dh_hat, dm_new, *saved]))


def _module(h: Tensor) -> Any:
    return implementation(backends.choose("separable_gates", h))


def _implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
    check_arguments(*arguments)
    return _module(arguments[1]).forward(*arguments)


def _fake(z: Tensor | None, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape)


def _backward_implementation(dh_hat: Tensor, dm_new: Tensor, *saved: Any) -> list[Tensor]:
    gradients = _module(dh_hat).backward(dh_hat, dm_new, *saved)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(dh_hat: Tensor, dm_new: Tensor, *saved: Any) -> list[Tensor]:
    return _dispatch.empty_gradients(saved)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dh_hat: Tensor, dm_new: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(torch.ops.fastsam.separable_gates_backward(dh_hat, dm_new, *ctx.saved_tensors))
    return tuple(None if tensor is None else next(gradients) for tensor in ctx.saved_tensors)


_ARGUMENTS = "Tensor? z, Tensor h, Tensor m, Tensor? depthwise, Tensor pointwise, Tensor? bias"

_dispatch.register(
    "separable_gates",
    f"({_ARGUMENTS}) -> (Tensor h_hat, Tensor m_new)",
    f"(Tensor dh_hat, Tensor dm_new, {_ARGUMENTS}) -> Tensor[]",
    implementation=_implementation,
    fake=_fake,
    backward_implementation=_backward_implementation,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
