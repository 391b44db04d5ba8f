"""Self-attention memories (SAM) that others published, as options and a state dict of `fastsam.SAM`."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.convert.comparison import Run, check_arithmetic
from fastsam.modules import _check
from fastsam.ops._check import Arguments

_OWNER = "SAM.from_module"


class PublishedSAM(NamedTuple):
    """`SAM(**options)` with this state dict computes what the published module does."""

    options: dict[str, Any]
    state_dict: dict[str, Tensor]


class _Convolution(NamedTuple):
    """A published convolution: what its outputs are, in equal parts, and its shape.

    A part is a convolution of `SAM`, one of its gates i, g and o, or a convolution after one of the attentions.
    C: channels of h and m; D: of query and keys; V: of the values; Z: of the fused attention; k: of the gates' kernel.
    """

    parts: tuple[str, ...]
    outputs: str
    inputs: str
    kernel: int | str = 1


class _Lineage(NamedTuple):
    """Modules with the same parameters and arithmetic; `scaled`: the scores are divided by sqrt(D)."""

    origin: str
    convolutions: dict[str, _Convolution]
    scaled: bool = False


_LINEAGES = (
    _Lineage(
        "hyona-yu/SA-convlstm and its forks",
        {
            "layer_q": _Convolution(("query",), "D", "C"),
            "layer_k": _Convolution(("key",), "D", "C"),
            "layer_k2": _Convolution(("memory_key",), "D", "C"),
            "layer_v": _Convolution(("value",), "V", "C"),
            "layer_v2": _Convolution(("memory_value",), "V", "C"),
            "layer_z": _Convolution(("fusion",), "Z", "2V"),
            "layer_m": _Convolution(("o", "g", "i"), "3C", "Z+C", "k"),
        },
    ),
    _Lineage(
        "johnjaejunlee95/SA_ConvLSTM",
        {
            "layer_qh": _Convolution(("query",), "D", "C"),
            "layer_kh": _Convolution(("key",), "D", "C"),
            "layer_vh": _Convolution(("value",), "V", "C"),
            "layer_km": _Convolution(("memory_key",), "D", "C"),
            "layer_vm": _Convolution(("memory_value",), "V", "C"),
            "layer_z": _Convolution(("fusion",), "Z", "2V"),
            "layer_m": _Convolution(("o", "g", "i"), "3C", "Z+C", "k"),
        },
    ),
    _Lineage(
        "tsugumi-sys/SA-ConvLSTM-Pytorch",
        {
            "query_h": _Convolution(("query",), "D", "C"),
            "key_h": _Convolution(("key",), "D", "C"),
            "value_h": _Convolution(("value",), "V", "C"),
            "z_h": _Convolution(("after value",), "V", "V"),
            "key_m": _Convolution(("memory_key",), "D", "C"),
            "value_m": _Convolution(("memory_value",), "V", "C"),
            "z_m": _Convolution(("after memory_value",), "V", "V"),
            "w_z": _Convolution(("fusion",), "Z", "2V"),
            "w": _Convolution(("i", "g", "o"), "3C", "Z+C", "k"),
        },
    ),
    _Lineage(
        "jerrywn121/TianChi_AIEarth",
        {
            "conv_h": _Convolution(("query", "key", "value"), "3D", "C"),
            "conv_m": _Convolution(("memory_key", "memory_value"), "2D", "C"),
            "conv_z": _Convolution(("fusion",), "Z", "2V"),
            "conv_output": _Convolution(("i", "g", "o"), "3C", "Z+C", "k"),
        },
        scaled=True,
    ),
)


def published_sam(module: Any) -> PublishedSAM:
    """A published SAM, or its state dict, as options and state dict of `fastsam.SAM`; its tensors are copies.

    A convolution after an attention goes into the values, because the attention weights of a position sum to 1.

    Raises:
        TypeError, ValueError: it is not of a known lineage, or a parameter does not fit the others.
    """
    state_dict = module.state_dict() if isinstance(module, nn.Module) else module
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{_OWNER}: module must be a torch.nn.Module or a state_dict, got {type(state_dict).__name__}")
    lineage = _recognised(state_dict, "the state_dict" if state_dict is module else type(module).__name__)
    sizes = _checked_sizes(state_dict, lineage)
    parts = _parts(state_dict, lineage)
    for value in ("value", "memory_value"):
        if f"after {value}.weight" in parts:
            parts = _with_values_composed(parts, value)
    is_dense = sizes["k"] > 1
    parts = _with_gates_stacked(parts, "gates" if is_dense else "pointwise")
    options = {
        "channels": sizes["C"],
        "attention_channels": sizes["D"],
        "kernel_size": sizes["k"] if is_dense else None,
        "value_channels": sizes["V"],
        "fusion_channels": sizes["Z"],
        "dense_gates": is_dense,
        "scale": sizes["D"] ** -0.5 if lineage.scaled else 1.0,
        "bias": "query.bias" in parts,
        "dtype": parts["query.weight"].dtype,
    }
    return PublishedSAM(options, {name: part.clone() for name, part in parts.items()})


def check_sam(module: nn.Module, sam: nn.Module) -> None:
    """Check on small random maps that a published module and the SAM made of it compute the same.

    Raises:
        ValueError: they do not, or the published module cannot be run.
    """
    shape = (2, next(sam.parameters()).shape[1], 3, 4)
    check_arithmetic(
        f"{_OWNER}: {type(module).__name__} has the parameters of a known SAM",
        Run(module),
        Run(sam),
        {"h": shape, "m": shape},
        ("h", "m"),
        suspects="the order of its gates, and at how it brings the attended values back into maps",
        otherwise="; its state_dict converts without this check",
    )


def sam_origin(names: Iterable[str]) -> str | None:
    """Who published the SAM whose state_dict has just these names; None where it is not known here."""
    lineage = _lineage(set(names))
    return None if lineage is None else lineage.origin


def listed(names: Iterable[str], most: int = 24) -> str:
    """The names for a message, which may be very many."""
    names = [*names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _lineage(names: set[str]) -> _Lineage | None:
    for lineage in _LINEAGES:
        weights = {f"{name}.weight" for name in lineage.convolutions}
        biases = {f"{name}.bias" for name in lineage.convolutions}
        if names in (weights, weights | biases):
            return lineage
    return None


def _recognised(state_dict: Mapping[str, Tensor], what: str) -> _Lineage:
    lineage = _lineage(set(state_dict))
    if lineage is None:
        known = (f"\n  {lineage.origin}: {', '.join(lineage.convolutions)}" for lineage in _LINEAGES)
        raise ValueError(
            f"{_OWNER}: {what} is no SAM that is known here. It holds {listed(state_dict) or 'no parameters'}; known "
            f"are, each with weights, and biases for all or none:{''.join(known)}"
        )
    return lineage


def _checked_sizes(state_dict: Mapping[str, Tensor], lineage: _Lineage) -> dict[str, int]:
    """The sizes C, D, V, Z and k, after the check that all parameters have the shapes they make."""
    check = Arguments(_OWNER)
    for name, convolution in lineage.convolutions.items():
        weight = state_dict[f"{name}.weight"]
        _check.tensor(_OWNER, f"{name}.weight", weight, convolution.outputs, convolution.inputs, "k", "k")
        for part, letter in (("query", "D"), ("value", "V"), ("fusion", "Z")):
            if part in convolution.parts:
                check.bind(**{letter: weight.shape[0] // len(convolution.parts)})
        if "query" in convolution.parts:
            check.bind(C=weight.shape[1])
    c, d, v, z = (check.sizes[letter] for letter in "CDVZ")
    check.bind(**{"3C": 3 * c, "2D": 2 * d, "3D": 3 * d, "2V": 2 * v, "Z+C": z + c})
    for name, (_, outputs, inputs, kernel) in lineage.convolutions.items():
        check.tensor(f"{name}.weight", state_dict[f"{name}.weight"], outputs, inputs, kernel, kernel)
        if kernel == "k" and check.sizes["k"] % 2 == 0:
            shape = tuple(state_dict[f"{name}.weight"].shape)
            raise ValueError(f"{_OWNER}: {name}.weight must have shape ({outputs}, {inputs}, k, k), k odd, got {shape}")
        if f"{name}.bias" in state_dict:
            check.tensor(f"{name}.bias", state_dict[f"{name}.bias"], outputs)
    return check.sizes


def _parts(state_dict: Mapping[str, Tensor], lineage: _Lineage) -> dict[str, Tensor]:
    """Weights and biases of all parts of the published convolutions, by the parts' names."""
    parts: dict[str, Tensor] = {}
    for name, convolution in lineage.convolutions.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state_dict:
                outputs = state_dict[f"{name}.{kind}"].detach().chunk(len(convolution.parts))
                parts |= {f"{part}.{kind}": of for part, of in zip(convolution.parts, outputs, strict=True)}
    return parts


def _with_values_composed(parts: dict[str, Tensor], value: str) -> dict[str, Tensor]:
    """With `value` and the convolution after its attention made one."""
    kept = {name: part for name, part in parts.items() if not name.startswith(f"after {value}.")}
    weight = kept[f"{value}.weight"]
    arithmetic = torch.promote_types(weight.dtype, torch.float32)
    outer = parts[f"after {value}.weight"].flatten(1).to(arithmetic)
    kept[f"{value}.weight"] = (outer @ weight.flatten(1).to(arithmetic))[:, :, None, None].to(weight.dtype)
    if f"{value}.bias" in kept:
        bias = outer @ kept[f"{value}.bias"].to(arithmetic) + parts[f"after {value}.bias"].to(arithmetic)
        kept[f"{value}.bias"] = bias.to(weight.dtype)
    return kept


def _with_gates_stacked(parts: dict[str, Tensor], convolution: str) -> dict[str, Tensor]:
    """With the gates as one convolution of that name, order i, g, o."""
    kept = {name: part for name, part in parts.items() if name.partition(".")[0] not in ("i", "g", "o")}
    for kind in ("weight", "bias"):
        if f"i.{kind}" in parts:
            kept[f"{convolution}.{kind}"] = torch.cat([parts[f"{gate}.{kind}"] for gate in "igo"])
    return kept
