"""`lstm_gates`: the gate arithmetic of a ConvLSTM cell."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._check import Arguments, real_number
from fastsam.ops.lstm_gates import eager, native
from fastsam.ops.lstm_gates._term import Term, new_statistics, terms_of


def implementation(backend: str) -> Any:
    """The module with `forward` and `backward` of a back end; only the back end triton imports Triton."""
    if backend == "triton":
        return importlib.import_module("fastsam.ops.lstm_gates.triton")
    return eager if backend == "eager" else native


def lstm_gates(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    *,
    recurrent: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    recurrent_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The state update of a ConvLSTM cell (SA-ConvLSTM paper, equation 1) from its convolutions.

        i, f, g, o = N(gates; norm) + N(recurrent; recurrent_norm)
        c_new = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g)        h = sigmoid(o) tanh(c_new)

    N is the identity where its norm is None. Otherwise it normalises over all channels and positions of a sample,
    N(x) = (x - mean) / sqrt(variance + eps) * weight + bias with the biased variance: GroupNorm(1, 4C) or
    LayerNorm((4C, H, W)).

    Args:
        gates: (B, 4C, H, W), order i, f, g, o: the convolution of the input, or the sum of both.
        c: cell state, (B, C, H, W).
        forget_bias: added to f.
        recurrent: the convolution of the hidden state, (B, 4C, H, W); None where gates holds all.
        norm: weight and bias that normalise gates, each (4C,) or (4C, H, W); None for none.
        recurrent_norm: weight and bias that normalise recurrent, of the same shape as those of norm; None for none.
        eps: added to the variances, positive.

    Returns:
        h and c_new, both (B, C, H, W), contiguous.

    Raises:
        TypeError: an argument is of the wrong type, not floating-point, or of another dtype than c.
        ValueError: a shape, device or number does not fit, or there is a recurrent_norm without recurrent.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    norms = (*_pair("norm", norm), *_pair("recurrent_norm", recurrent_norm))
    arguments = (gates, c, forget_bias, recurrent, *norms, eps)
    if isinstance(gates, Tensor) and _dispatch.autocast_enabled(gates):
        return _dispatch.without_autocast(_lstm_gates, *arguments)
    return _lstm_gates(*arguments)


def _lstm_gates(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(*arguments)
    gates, c, forget_bias, recurrent, *norms, eps = arguments
    tensors = (gates, c, recurrent, *norms)
    if _dispatch.needs_registered_operator(tensors) and backends.selected() != "eager":
        return torch.ops.fastsam.lstm_gates(*arguments)[:2]
    backend = _dispatch.choose("lstm_gates", gates)
    if backend == "eager":
        pairs = [None if weight is None else (weight, bias) for weight, bias in (norms[:2], norms[2:])]
        options = {"recurrent": recurrent, "norm": pairs[0], "recurrent_norm": pairs[1], "eps": eps}
        return eager.lstm_gates(gates, c, forget_bias, **options)
    if _dispatch.wants_gradient(tensors):
        return _LSTMGates.apply(backend, *arguments)
    return implementation(backend).forward(terms_of(gates, recurrent, *norms), c, forget_bias, eps)[:2]


def _pair(name: str, norm: Any) -> Sequence[Any]:
    """Weight and bias of a norm, twice None for none."""
    if norm is None:
        return (None, None)
    if not isinstance(norm, (tuple, list)):
        raise TypeError(f"lstm_gates: {name} must be a pair (weight, bias) or None, got {type(norm).__name__}")
    if len(norm) != 2:
        raise ValueError(f"lstm_gates: {name} must be a pair (weight, bias), got {len(norm)} values")
    if norm[0] is None:
        raise TypeError(f"lstm_gates: {name}[0] must be a torch.Tensor, got NoneType")
    return norm


def _check(
    gates: Any,
    c: Any,
    forget_bias: Any,
    recurrent: Any,
    norm_weight: Any,
    norm_bias: Any,
    recurrent_norm_weight: Any,
    recurrent_norm_bias: Any,
    eps: Any,
) -> None:
    check = Arguments("lstm_gates")
    check.tensor("c", c, "B", "C", "H", "W")
    check.bind(**{"4C": 4 * c.shape[1]})
    check.tensor("gates", gates, "B", "4C", "H", "W")
    if recurrent is not None:
        check.tensor("recurrent", recurrent, "B", "4C", "H", "W")
    elif recurrent_norm_weight is not None:
        raise ValueError("lstm_gates: recurrent_norm normalises recurrent, which is None; give both or neither")
    _check_norms(check, norm=(norm_weight, norm_bias), recurrent_norm=(recurrent_norm_weight, recurrent_norm_bias))
    real_number("lstm_gates", "forget_bias", forget_bias)
    real_number("lstm_gates", "eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"lstm_gates: eps must be positive and finite, got {eps}")


def _check_norms(check: Arguments, **norms: tuple[Any, Any]) -> None:
    """The first weight has one of two shapes, which all others must have."""
    dims: tuple[str, ...] = ()
    for name, values in norms.items():
        for index, value in enumerate(values if values[0] is not None else ()):
            dims = dims or _dims_of_norm(f"{name}[{index}]", value)
            check.tensor(f"{name}[{index}]", value, *dims)


def _dims_of_norm(name: str, weight: Any) -> tuple[str, ...]:
    count = weight.ndim if isinstance(weight, Tensor) else 1
    if count not in (1, 3):
        raise ValueError(
            f"lstm_gates: {name} must have 1 dimension (4C,) or 3 dimensions (4C, H, W), "
            f"got shape {tuple(weight.shape)}"
        )
    return ("4C", "H", "W")[:count]


class _LSTMGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        gates, c, ctx.forget_bias, recurrent, *norms, eps = arguments
        ctx.implementation = implementation(backend)
        terms = terms_of(gates, recurrent, *norms)
        h, c_new, statistics = ctx.implementation.forward(terms, c, ctx.forget_bias, eps)
        ctx.save_for_backward(gates, c, recurrent, *norms, statistics)
        return h, c_new

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc_new: Tensor) -> Any:
        gates, c, *others, statistics = ctx.saved_tensors
        upstream = dh.detach(), dc_new.detach()
        terms, dc = ctx.implementation.backward(*upstream, terms_of(gates, *others), c, ctx.forget_bias, statistics)
        gradients = _flat_gradients(terms, dc)
        dgates, dc, *rest = _dispatch.first_derivative_only("lstm_gates", gradients, [dh, dc_new, gates, c, *others])
        return (None, dgates, dc, None, *rest, None)


def _flat_gradients(terms: Sequence[Term], dc: Tensor) -> list[Any]:
    """In the order of the arguments: gates, c, recurrent, and the norms' weights and biases."""
    (dgates, *norm), (drecurrent, *recurrent_norm) = (*terms, (None, None, None))[:2]
    return [dgates, dc, drecurrent, *norm, *recurrent_norm]


# The dispatcher leaves out arguments that equal their default.
def _implementation(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    recurrent: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    recurrent_norm_weight: Tensor | None = None,
    recurrent_norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (recurrent, norm_weight, norm_bias, recurrent_norm_weight, recurrent_norm_bias)
    _check(gates, c, forget_bias, *tensors, eps)
    terms = terms_of(gates, *tensors)
    return _module(gates).forward(terms, c, forget_bias, eps)


def _module(gates: Tensor) -> Any:
    return implementation(backends.choose("lstm_gates", gates))


def _fake(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    recurrent: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    recurrent_norm_weight: Tensor | None = None,
    recurrent_norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    count = (norm_weight is not None) + (recurrent_norm_weight is not None)
    return c.new_empty(c.shape), c.new_empty(c.shape), new_statistics(gates, count)


def _backward_implementation(
    dh: Tensor, dc_new: Tensor, gates: Tensor, c: Tensor, forget_bias: float, *others: Any
) -> list[Tensor]:
    *tensors, statistics = others
    terms, dc = _module(gates).backward(dh, dc_new, terms_of(gates, *tensors), c, forget_bias, statistics)
    dgates, dc, drecurrent, *norms = _flat_gradients(terms, dc)
    if drecurrent is dgates:  # the outputs of an operator must not share memory
        drecurrent = torch.clone(dgates)
    return [gradient for gradient in (dgates, dc, drecurrent, *norms) if gradient is not None]


def _backward_fake(
    dh: Tensor, dc_new: Tensor, gates: Tensor, c: Tensor, forget_bias: float, *others: Any
) -> list[Tensor]:
    return _dispatch.empty_gradients([gates, c, *others[:-1]])


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    gates, c, ctx.forget_bias, *tensors, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(gates, c, *tensors, output[2])


def _backward(ctx: Any, dh: Tensor, dc_new: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gates, c, *others = ctx.saved_tensors
    gradients = iter(torch.ops.fastsam.lstm_gates_backward(dh, dc_new, gates, c, ctx.forget_bias, *others))
    dgates, dc, *rest = (None if tensor is None else next(gradients) for tensor in (gates, c, *others[:-1]))
    return (dgates, dc, None, *rest, None)


_FIRST = "Tensor gates, Tensor c, float forget_bias"
_OPTIONAL = ("recurrent", "norm_weight", "norm_bias", "recurrent_norm_weight", "recurrent_norm_bias")

_dispatch.register(
    "lstm_gates",
    f"({_FIRST}=0.0, {', '.join(f'Tensor? {name}=None' for name in _OPTIONAL)}, float eps=1e-05) "
    "-> (Tensor h, Tensor c_new, Tensor statistics)",
    f"(Tensor dh, Tensor dc_new, {_FIRST}, {', '.join(f'Tensor? {name}' for name in _OPTIONAL)}, Tensor statistics) "
    "-> Tensor[]",
    implementation=_implementation,
    fake=_fake,
    backward_implementation=_backward_implementation,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
