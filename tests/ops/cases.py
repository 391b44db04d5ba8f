"""Random arguments for the operators, and ways to lay the same numbers out in memory."""

import importlib
from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor

import fastsam.ops

OPERATORS = ("double_attention", "self_attention", "separable_gates", "lstm_gates", "memory_gates", "norm_gate")
ATTENTIONS = ("double_attention", "self_attention")
OUTPUTS = {
    "double_attention": ("z",),
    "self_attention": ("z",),
    "separable_gates": ("h_hat", "m_new"),
    "lstm_gates": ("h", "c_new"),
    "memory_gates": ("h_hat", "m_new"),
    "norm_gate": ("gated",),
}

Arguments = dict[str, Any]


def public(operator: str) -> Callable[..., Any]:
    return _flat(getattr(fastsam.ops, operator))


def eager(operator: str) -> Callable[..., Any]:
    return _flat(getattr(importlib.import_module(f"fastsam.ops.{operator}.eager"), operator))


def registered(operator: str) -> Any:
    return getattr(torch.ops.fastsam, operator).default


def naive(operator: str) -> Callable[..., Any]:
    return _flat(getattr(oracle, operator))


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the weight and the bias of each norm as arguments, as the registered operators have them."""
    if function.__name__ not in ("lstm_gates", "memory_gates", "norm_gate"):
        return function

    def call(*values: Any, **arguments: Any) -> Any:
        for norm in ("norm", "recurrent_norm", "state_norm"):
            pair = arguments.pop(f"{norm}_weight", None), arguments.pop(f"{norm}_bias", None)
            if pair[0] is not None or pair[1] is not None:
                arguments[norm] = pair
        return function(*values, **arguments)

    return call


class _Draw:
    """Standard normal numbers that a float32 holds exactly, so that every dtype is tested on the same values."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.dtype)


def double_attention(
    batch: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (4, 3),
    *,
    out: int | None = None,
    keys: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Arguments with scores of order one; `keys` is D of the projected form, None for the folded form."""
    draw, rank, out = _Draw(seed, dtype), keys or channels, out or channels
    arguments = {
        "h": draw(batch, channels, *size),
        "m": draw(batch, channels, *size),
        "score_h": draw(rank, channels, scale=(channels * rank) ** -0.5),
        "score_m": draw(rank, channels, scale=(channels * rank) ** -0.5),
        "score_bias_h": draw(rank, scale=rank**-0.5),
        "score_bias_m": draw(rank, scale=rank**-0.5),
        "value_h": draw(out, channels, scale=channels**-0.5),
        "value_m": draw(out, channels, scale=channels**-0.5),
        "value_bias": draw(out),
    }
    if keys is not None:
        arguments["key_h"] = draw(keys, channels, scale=channels**-0.5)
        arguments["key_m"] = draw(keys, channels, scale=channels**-0.5)
    return arguments


def self_attention(**options: Any) -> Arguments:
    """The first source of `double_attention` with the same options."""
    arguments = double_attention(**options)
    names = {"h": "x", "score_h": "score", "score_bias_h": "score_bias", "value_h": "value", "value_bias": "value_bias"}
    names["key_h"] = "key"
    return {new: arguments[old] for old, new in names.items() if old in arguments}


def separable_gates(
    batch: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (4, 3),
    *,
    z: int | None = 5,
    kernel: int | None = 3,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Arguments with gates of order one; `z` is the channels of z, None for no z; `kernel` None for no depthwise."""
    draw, width = _Draw(seed, dtype), channels + (z or 0)
    return {
        "z": None if z is None else draw(batch, z, *size),
        "h": draw(batch, channels, *size),
        "m": draw(batch, channels, *size),
        "depthwise": None if kernel is None else draw(width, 1, kernel, kernel, scale=1 / kernel),
        "pointwise": draw(3 * channels, width, 1, 1, scale=width**-0.5),
        "bias": draw(3 * channels) if bias else None,
    }


def lstm_gates(
    batch: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (4, 3),
    *,
    forget_bias: float = 0.75,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **terms: Any,
) -> Arguments:
    """Arguments with gates of order one; terms: see `_add_terms`."""
    draw = _Draw(seed, dtype)
    gates = draw(batch, 4 * channels, *size, scale=2.0)
    arguments = {"gates": gates, "c": draw(batch, channels, *size), "forget_bias": forget_bias}
    return _add_terms(arguments, draw, 4, **terms)


def memory_gates(
    batch: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (4, 3),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **terms: Any,
) -> Arguments:
    """Arguments with gates of order one; terms: see `_add_terms`."""
    draw = _Draw(seed, dtype)
    gates = draw(batch, 3 * channels, *size, scale=2.0)
    return _add_terms({"gates": gates, "m": draw(batch, channels, *size)}, draw, 3, **terms)


def norm_gate(
    batch: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (4, 3),
    *,
    norm: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Arguments:
    """Arguments with a gate of order one; options: activation and scale."""
    draw = _Draw(seed, dtype)
    arguments = {"x": draw(batch, channels, *size, scale=2.0), "y": draw(batch, channels, *size), **options}
    return _add_terms(arguments, draw, 1, norm=norm)


def _add_terms(
    arguments: Arguments,
    draw: _Draw,
    rows: int,
    *,
    recurrent: bool = False,
    norm: str | None = None,
    recurrent_norm: str | None = None,
    state_norm: str | None = None,
) -> Arguments:
    """The same with a second term of so many gates, and norms with weights for each "channel" or "position"."""
    gates, (_, channels, *size) = next(iter(arguments.values())), list(arguments.values())[1].shape
    if recurrent or recurrent_norm is not None:
        arguments["recurrent"] = draw(*gates.shape)
    kinds = {"norm": (norm, rows), "recurrent_norm": (recurrent_norm, rows), "state_norm": (state_norm, 1)}
    for name, (kind, gates_of_norm) in kinds.items():
        if kind is not None:
            shape = (gates_of_norm * channels, *([] if kind == "channel" else size))
            arguments |= {f"{name}_weight": draw(*shape), f"{name}_bias": draw(*shape)}
    return arguments


def make(operator: str, **options: Any) -> Arguments:
    """Arguments of any operator."""
    return globals()[operator](**options)  # type: ignore[no-any-return]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "double_attention": ("double_attention", {}),
    "double_attention-keys": ("double_attention", {"keys": 2, "out": 4}),
    "self_attention": ("self_attention", {}),
    "self_attention-keys": ("self_attention", {"keys": 2, "out": 4}),
    "separable_gates": ("separable_gates", {}),
    "separable_gates-no_z-no_bias": ("separable_gates", {"z": None, "bias": False}),
    "separable_gates-no_depthwise": ("separable_gates", {"kernel": None, "z": 3}),
    "lstm_gates": ("lstm_gates", {}),
    "lstm_gates-recurrent": ("lstm_gates", {"recurrent": True}),
    "lstm_gates-norm": ("lstm_gates", {"norm": "channel"}),
    "lstm_gates-recurrent_norm": ("lstm_gates", {"recurrent_norm": "position"}),
    "lstm_gates-norms": ("lstm_gates", {"norm": "channel", "recurrent_norm": "channel"}),
    "lstm_gates-position_norms": ("lstm_gates", {"norm": "position", "recurrent_norm": "position"}),
    "memory_gates": ("memory_gates", {}),
    "memory_gates-recurrent": ("memory_gates", {"recurrent": True}),
    "memory_gates-recurrent_norm": ("memory_gates", {"recurrent_norm": "channel"}),
    "memory_gates-norms": ("memory_gates", {"norm": "channel", "recurrent_norm": "channel"}),
    "memory_gates-position_norms": ("memory_gates", {"norm": "position", "recurrent_norm": "position"}),
    "norm_gate": ("norm_gate", {"activation": "tanh"}),
    "norm_gate-norm": ("norm_gate", {"norm": "channel", "scale": 2.0}),
    "norm_gate-position_norm": ("norm_gate", {"norm": "position", "activation": "identity", "scale": -0.5}),
}
"""Every operator with and without its optional arguments: (operator, options) by a name for the test."""

STATE_NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm_gates-state_norm": ("lstm_gates", {"state_norm": "position"}),
    "lstm_gates-all_norms": ("lstm_gates", {name: "channel" for name in ("norm", "recurrent_norm", "state_norm")}),
    "memory_gates-state_norm": ("memory_gates", {"recurrent": True, "state_norm": "channel"}),
    "memory_gates-all_norms": ("memory_gates", {name: "position" for name in ("norm", "recurrent_norm", "state_norm")}),
}
"""Those of public functions that are two registered operators."""

PUBLIC_VARIANTS = {**VARIANTS, **STATE_NORMS}


def scale_scores(operator: str, arguments: Arguments, largest: float) -> Arguments:
    """The same arguments with each source's largest score, in absolute value, brought to `largest`."""
    scaled = dict(arguments)
    sources = [("x", "x", "")] if operator == "self_attention" else [("h", "h", "_h"), ("h", "m", "_m")]
    for asking, asked, suffix in sources:
        query = oracle.matrix(arguments[f"score{suffix}"], arguments[asking])
        query = query + arguments[f"score_bias{suffix}"][:, None, None]
        key = arguments.get(f"key{suffix}")
        columns = arguments[asked] if key is None else oracle.matrix(key, arguments[asked])
        energy = torch.bmm(query.flatten(2).transpose(1, 2), columns.flatten(2))
        for name in (f"score{suffix}", f"score_bias{suffix}"):
            scaled[name] = arguments[name] * (largest / energy.abs().max())
    return scaled


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.ndim >= 2 else tensor


def expanded_batch(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def expanded_row(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor)


def strided(tensor: Tensor) -> Tensor:
    """Every second element of a tensor twice as large in every dimension."""
    larger = tensor.new_full([2 * length for length in tensor.shape], 7.0)
    view = larger[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def embedded(tensor: Tensor, sentinel: float = 12345.0) -> Tensor:
    """A slice of a larger tensor that holds `sentinel` everywhere else; `tensor._base` is the larger one."""
    larger = tensor.new_full([length + 2 for length in tensor.shape], sentinel)
    view = larger[tuple(slice(1, -1) for _ in tensor.shape)]
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "transposed": transposed,
    "expanded_batch": expanded_batch,
    "expanded_row": expanded_row,
    "strided": strided,
    "embedded": embedded,
}


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of an operator as a tuple, also where there is one."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """Apply `function` to every tensor among the arguments."""
    return {
        name: function(argument) if isinstance(argument, Tensor) else argument for name, argument in arguments.items()
    }
