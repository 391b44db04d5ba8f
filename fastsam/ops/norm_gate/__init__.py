"""`norm_gate`: a map times the activation of another one, which may be normalised."""

from typing import Any

from torch import Tensor

from fastsam.ops import _dispatch
from fastsam.ops._check import real_number
from fastsam.ops._gates.operator import Call, Operator, joined, pair
from fastsam.ops._gates.update import Update
from fastsam.ops.norm_gate import eager


def norm_gate(
    x: Tensor,
    y: Tensor,
    activation: str = "sigmoid",
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """A gated map: scale activation(N(x)) y.

    N is the identity where norm is None. Otherwise it normalises over all channels and positions of a sample,
    N(x) = (x - mean) / sqrt(variance + eps) * weight + bias with the biased variance: GroupNorm(1, C) or
    LayerNorm((C, H, W)). With "sigmoid" and a scale of 2 it is the gate of CMS-LSTM's context embedding (equation 1
    with the norm of its published code).

    Args:
        x: the gate before its norm and activation, (B, C, H, W).
        y: what it gates, of the shape of x.
        activation: "sigmoid", "tanh" or "identity".
        norm: weight and bias that normalise x, both (C,) or both (C, H, W); None for none.
        scale: a factor.
        eps: added to the variance, positive.

    Returns:
        (B, C, H, W), contiguous.

    Raises:
        TypeError: an argument is of the wrong type, not floating-point, or of another dtype than y.
        ValueError: a shape, device, number or activation does not fit.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    arguments = (x, y, activation, *pair("norm_gate", "norm", norm), scale, eps)
    if isinstance(x, Tensor) and _dispatch.autocast_enabled(x):
        return _dispatch.without_autocast(_norm_gate, *arguments)
    return _norm_gate(*arguments)


def _norm_gate(*arguments: Any) -> Tensor:
    call = _call(*arguments)
    OPERATOR.check(call)
    x, y, activation, weight, bias, scale, eps = arguments
    real_number("norm_gate", "scale", scale)
    route = OPERATOR.route(call.tensors)
    if route == "eager":
        return eager.norm_gate(x, y, activation, norm=joined(weight, bias), scale=scale, eps=eps)
    return OPERATOR.run(route, call, arguments)[0]


def norm_of_state(state: Tensor, gate: Tensor, activation: str, norm: tuple[Any, ...], eps: float, route: str) -> Any:
    """activation(N(state)) gate, and N(state): what follows gates whose new state has a norm, on their route."""
    arguments = (state, gate, activation, *norm, 1.0, eps, True)
    return OPERATOR.run(route, _call(*arguments), arguments)


def _call(
    x: Tensor,
    y: Tensor,
    activation: str = "sigmoid",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    keep_state: bool = False,
) -> Call:
    if not isinstance(activation, str):
        raise TypeError(f"norm_gate: activation must be a string, got {type(activation).__name__}")
    if activation not in eager.ACTIVATIONS:
        raise ValueError(f"norm_gate: activation must be one of {', '.join(eager.ACTIVATIONS)}, got {activation!r}")
    update = Update("product", activation, scale, keep_state)
    return Call(update, eps, x, y, norm_weight=norm_weight, norm_bias=norm_bias)


OPERATOR = Operator(
    "norm_gate",
    "C",
    "x",
    "y",
    (
        "Tensor x",
        "Tensor y",
        'str activation="sigmoid"',
        "Tensor? norm_weight=None",
        "Tensor? norm_bias=None",
        "float scale=1.0",
        "float eps=1e-05",
        "bool keep_state=False",
    ),
    _call,
)
