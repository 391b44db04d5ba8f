"""Whole SA-ConvLSTM cells that others published, as cells of this package."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.convert.comparison import Run, check_arithmetic
from fastsam.convert.published import listed, sam_origin
from fastsam.modules.attention import SAM
from fastsam.modules.published_cell import PublishedSAConvLSTMCell
from fastsam.ops._check import Arguments

_OWNER = "sa_convlstm_cell"

_Maps = tuple[Any, ...]


def _step_with_hcm(cell: nn.Module, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> _Maps:
    output, (h, c, m) = cell(x, (h, c, m))
    return output, h, c, m


def _step_with_chm(cell: nn.Module, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> _Maps:
    output, (c, h, m) = cell(x, (c, h, m))
    return output, h, c, m


def _step_to_hcm(cell: nn.Module, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> _Maps:
    h, c, m = cell(x, [h, c, m])
    return h, h, c, m


def _step_from_maps(cell: nn.Module, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> _Maps:
    h, c, m, *_ = cell(x, h, c, m)
    return h, h, c, m


def _step_in_attributes(cell: Any, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> _Maps:
    cell.hidden_state, cell.cell_state, cell.memory_state = h, c, m
    output = cell(x)
    return output, cell.hidden_state, cell.cell_state, cell.memory_state


class _Lineage(NamedTuple):
    """Cells with the same parameters and arithmetic.

    conv, norm, sam: names of the submodules; an empty one is not there. sam_origin: whose SAM it is. gates: the order
    of the convolution's outputs. step: from x, h, c and m to the output and the new h, c and m. peepholes: names of
    w_i, w_f and w_o.
    """

    origin: str
    conv: str
    norm: str
    sam: str
    sam_origin: str
    gates: str
    step: Callable[..., _Maps]
    peepholes: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = (*filter(None, (self.conv, self.norm)), *self.peepholes, self.sam)
        return f"{self.origin}: {', '.join(names)}"


_HYONA_YU, _TSUGUMI = "hyona-yu/SA-convlstm and its forks", "tsugumi-sys/SA-ConvLSTM-Pytorch"
_JOHNJAEJUNLEE, _JERRYWN = "johnjaejunlee95/SA_ConvLSTM", "jerrywn121/TianChi_AIEarth"
_W, _EARLIER_W = ("W_ci", "W_cf", "W_co"), ("convlstm_cell.W_ci", "convlstm_cell.W_cf", "convlstm_cell.W_co")

_LINEAGES = (
    _Lineage(_HYONA_YU, "conv2d.0", "conv2d.1", "attention_layer", _HYONA_YU, "ifog", _step_with_hcm),
    _Lineage("CaiCandong/sa_convLSTM", "conv.0", "conv.1", "attention_layer", _HYONA_YU, "ifog", _step_to_hcm),
    _Lineage(_JOHNJAEJUNLEE, "conv2d.0", "conv2d.1", "attention_layer", _JOHNJAEJUNLEE, "ifgo", _step_with_chm),
    _Lineage(_JERRYWN, "conv", "", "sa", _JERRYWN, "ifog", _step_in_attributes),
    _Lineage(_TSUGUMI, "conv", "", "attention_memory", _TSUGUMI, "ifgo", _step_from_maps, _W),
    _Lineage(
        f"{_TSUGUMI} (earlier)",
        *("convlstm_cell.conv", "", "attention_memory", _TSUGUMI, "ifgo", _step_from_maps, _EARLIER_W),
    ),
)


def sa_convlstm_cell(module: nn.Module) -> PublishedSAConvLSTMCell:
    """A cell that computes what a published SA-ConvLSTM cell does, with copies of its parameters.

    It is recognised by the names and shapes of its parameters: `SA_Convlstm_cell` of hyona-yu/SA-convlstm and of
    MinNamgung/sa_convlstm, `SAConvLSTMCell` of CaiCandong/sa_convLSTM, `SA_Convlstm_cell` of
    johnjaejunlee95/SA_ConvLSTM, `SAConvLSTMCell` of jerrywn121/TianChi_AIEarth, and `SAMConvLSTMCell` of
    tsugumi-sys/SA-ConvLSTM-Pytorch with the activation tanh. The parameters are those of the original, the
    convolution's and the norm's in the order i, f, g, o; its SAM is converted by `fastsam.SAM.from_module`. The
    peepholes of the last, which on CUDA are attributes and no parameters there, are parameters of the result.

    Args:
        module: the published cell, with its weights. It is checked on small random maps that it computes what its names
            tell.

    Returns:
        The cell, in the dtype and on the device of the original. It is called as the other cells of this package are,
        also where the original keeps its state to itself, takes it in another order or returns more:
        `cell(x, (h, c, m))` returns the output and the state (h, c, m), and without a state starts from zeros.

    Raises:
        TypeError, ValueError: the module is not recognised or has another activation, a parameter does not fit the
            others, it cannot be run, or it computes something else.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{_OWNER}: module must be a torch.nn.Module, a published cell, got {type(module).__name__}")
    lineage = _recognised(module)
    _check_activation(module, lineage)
    tensors, sam = _tensors(module, lineage), SAM.from_module(module.get_submodule(lineage.sam))
    _check_sizes(tensors, lineage, sam)
    norm: Any = module.get_submodule(lineage.norm) if lineage.norm else None
    cell = _converted(tensors, lineage, sam, eps=getattr(norm, "eps", 1e-5))
    _check_cell(module, lineage, cell)
    return cell


def _recognised(module: nn.Module) -> _Lineage:
    for lineage in _LINEAGES:
        names = set(_tensors(module, lineage))
        own = {name for name in names if not name.startswith(f"{lineage.sam}.")}
        sam = {name.removeprefix(f"{lineage.sam}.") for name in names - own}
        needed = {f"{lineage.conv}.weight", *lineage.peepholes}
        if lineage.norm:
            needed |= {f"{lineage.norm}.weight", f"{lineage.norm}.bias"}
        if own in (needed, needed | {f"{lineage.conv}.bias"}) and sam_origin(sam) == lineage.sam_origin:
            return lineage
    known = "".join(f"\n  {lineage}" for lineage in _LINEAGES)
    raise ValueError(
        f"{_OWNER}: {type(module).__name__} is no SA-ConvLSTM cell that is known here. It holds "
        f"{listed(module.state_dict()) or 'no parameters'}; known are, each with its SAM as the last:{known}"
    )


def _attribute(module: Any, name: str) -> Any:
    """What stands under a dotted name; None for nothing."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _tensors(module: nn.Module, lineage: _Lineage) -> dict[str, Tensor]:
    """The state_dict, with the peepholes also where they are plain attributes, as after `Parameter(...).to("cuda")`."""
    tensors = dict(module.state_dict())
    weight = tensors.get(f"{lineage.conv}.weight")
    for name in lineage.peepholes:
        value = _attribute(module, name)
        if name not in tensors and isinstance(value, Tensor) and weight is not None:
            tensors[name] = value.detach().to(weight)
    return tensors


def _check_activation(module: nn.Module, lineage: _Lineage) -> None:
    """Of tsugumi-sys' cells, which have the activation as an option."""
    if not lineage.peepholes:
        return
    activation = _attribute(module, lineage.conv.removesuffix("conv") + "activation")
    if activation is not None and activation is not torch.tanh and not isinstance(activation, nn.Tanh):
        name = getattr(activation, "__name__", type(activation).__name__)
        raise ValueError(
            f"{_OWNER}: the activation of {type(module).__name__} must be tanh, as in the paper, got {name}"
        )


def _check_sizes(tensors: dict[str, Tensor], lineage: _Lineage, sam: SAM) -> None:
    """Check that the parameters are of one kind and of the shapes that the SAM's C, in_channels I and k make."""
    check, channels, name = Arguments(_OWNER), sam.channels, f"{lineage.conv}.weight"
    check.bind(**{"C": channels, "4C": 4 * channels})
    check.tensor(name, tensors[name], "4C", "I+C", "k", "k")
    _, inputs, k, _ = shape = tuple(tensors[name].shape)
    if inputs <= channels or k % 2 == 0:
        raise ValueError(
            f"{_OWNER}: {name} must have shape (4C, I+C, k, k), C = {channels}, I at least 1 and k odd, got {shape}"
        )
    for vector in (f"{lineage.conv}.bias", f"{lineage.norm}.weight", f"{lineage.norm}.bias"):
        if vector in tensors:
            check.tensor(vector, tensors[vector], "4C")
    for peephole in lineage.peepholes:
        check.tensor(peephole, tensors[peephole], "C", "H", "W")
    check.tensor(f"the query of {lineage.sam}", sam.query.weight, "D", "C", 1, 1)


def _converted(tensors: dict[str, Tensor], lineage: _Lineage, sam: SAM, eps: float) -> PublishedSAConvLSTMCell:
    state_dict = {f"sam.{name}": value for name, value in sam.state_dict().items()}
    for new, old in (("conv", lineage.conv), ("norm", lineage.norm)):
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in tensors:
                gates = dict(zip(lineage.gates, tensors[f"{old}.{kind}"].chunk(4), strict=True))
                state_dict[f"{new}.{kind}"] = torch.cat([gates[gate] for gate in "ifgo"])
    peephole_size = None
    if lineage.peepholes:
        state_dict["peephole"] = torch.cat([tensors[name] for name in lineage.peepholes])
        peephole_size = tuple(state_dict["peephole"].shape[1:])
    weight = state_dict["conv.weight"]
    cell = PublishedSAConvLSTMCell(
        weight.shape[1] - sam.channels,
        sam.channels,
        weight.shape[2],
        bias="conv.bias" in state_dict,
        channel_norm=bool(lineage.norm),
        eps=eps,
        peephole_size=peephole_size,
        device="meta",  # parameters to be replaced: no memory, no random numbers
        dtype=weight.dtype,
    )
    cell.sam = sam
    cell.load_state_dict(state_dict, assign=True)
    return cell


def _check_cell(module: nn.Module, lineage: _Lineage, cell: PublishedSAConvLSTMCell) -> None:
    """Check on small random maps that both compute the same; for it peepholes are cropped to these maps' size."""
    limit = cell.peephole_size or (3, 4)
    height, width = min(3, limit[0]), min(4, limit[1])

    def crop(peephole: Tensor) -> None:
        peephole.data = peephole.data[:, :height, :width]

    def run_original(original: nn.Module, *maps: Tensor) -> _Maps:
        for name in lineage.peepholes:
            crop(_attribute(original, name))
        return lineage.step(original, *maps)

    def run_converted(converted: Any, *maps: Tensor) -> _Maps:
        if converted.peephole is not None:
            crop(converted.peephole)
            converted.peephole_size = (height, width)
        return _step_with_hcm(converted, *maps)

    shape = (2, cell.hidden_channels, height, width)
    check_arithmetic(
        f"{_OWNER}: {type(module).__name__} has the parameters of the cell of {lineage.origin}",
        Run(module, run_original),
        Run(cell, run_converted),
        {"x": (2, cell.in_channels, height, width), "h": shape, "c": shape, "m": shape},
        ("output", "h", "c", "m"),
        suspects="the order of its gates and of its state, its norm and the padding of its convolution",
    )
