"""Calls of the CUDA kernels of the attention operators on the host, and the plain forms that they are measured against.

Results are named as the arguments in tests/ops/cases.py: "z", "gradient of h", "gradient of score_h", and so on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cases
import numpy
import torch
from accuracy import Results
from call_fields import Way
from cases import Arguments
from kernel_build import Kernels
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsam.ops._attention import Context, Source, SourceGradients, eager

WAYS = {
    "float32": Way(torch.float32, 61),
    "float32_copied_ahead": Way(torch.float32, 86),
    "tf32": Way(torch.float32, 86, tf32=True),
    "float64": Way(torch.float64, 70),
    "float64_copied_ahead": Way(torch.float64, 86),
    "half_fma": Way(torch.float16, 61),
    "half_8": Way(torch.float16, 75),
    "half_16": Way(torch.float16, 86),
    "bfloat16_fma": Way(torch.bfloat16, 75),
    "bfloat16": Way(torch.bfloat16, 86),
}
MAIN_WAYS = ["float32", "tf32", "float64", "half_8", "half_16", "bfloat16_fma", "bfloat16"]

MANY = 1000
"""Multiprocessors of a card for which blocks are as small as they get; with one they are large."""


NO_WINDOWS = (0, 0, 0)


def make(
    operator: str, way: Way, seed: int = 0, mean: float = 0.0, largest: float | None = None, **options: Any
) -> Arguments:
    """Arguments in the dtype of the maps.

    Args:
        mean: what is added to the maps. largest: to which the largest score of each source is scaled, if it is.
        options: of cases.double_attention.
    """
    arguments = cases.make(operator, **options, seed=seed)
    arguments |= {name: arguments[name] + mean for name in ("h", "m", "x") if name in arguments}
    if largest is not None:
        arguments = cases.scale_scores(operator, arguments, largest)
    return cases.map_tensors(lambda value: value.to(way.dtype), arguments)


def dz_of(arguments: Arguments) -> Tensor:
    first = arguments["h" if "h" in arguments else "x"]
    shape = (first.shape[0], arguments["value_bias"].shape[0], *first.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(99)).to(first.dtype)


def sources_of(arguments: Arguments) -> list[Source]:
    names = [("x", "")] if "x" in arguments else [("h", "_h"), ("m", "_m")]
    weights = ("score", "score_bias", "value", "key")
    return [Source(arguments[name], *(arguments.get(f"{weight}{end}") for weight in weights)) for name, end in names]


def gradients_of(
    arguments: Arguments, maps: Sequence[Tensor], weights: Sequence[SourceGradients], value_bias: Tensor
) -> Results:
    """Gradients by the names of the arguments."""
    names = [("x", "")] if "x" in arguments else [("h", "_h"), ("m", "_m")]
    results = {}
    for (name, end), dx, of in zip(names, maps, weights, strict=True):
        results[name] = dx
        results |= {f"{weight}{end}": value for weight, value in of._asdict().items() if value is not None}
    results["value_bias"] = value_bias
    return {f"gradient of {name}": value.to(arguments["value_bias"].dtype) for name, value in results.items()}


# The plain forms.


def evaluate(function: Callable[..., Tensor], arguments: Arguments, dz: Tensor, dtype: torch.dtype) -> Results:
    """z and, by autograd, the gradients of a plain form in `dtype`."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in arguments.items()}
    z = function(**leaves)
    gradients = torch.autograd.grad(z, list(leaves.values()), dz.to(dtype))
    return {"z": z.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def naive(**arguments: Tensor) -> Tensor:
    return cases.naive("self_attention" if "x" in arguments else "double_attention")(**arguments)  # type: ignore[no-any-return]


def exact(arguments: Arguments, dz: Tensor) -> Results:
    return evaluate(naive, arguments, dz, torch.float64)


def eager_form(**arguments: Tensor) -> Tensor:
    return eager.forward(sources_of(arguments), arguments["value_bias"], save=False)[0]


def round_to_tf32(x: Tensor) -> Tensor:
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class Tf32Product(torch.autograd.Function):
    """A matrix product as tensor cores do it: operands rounded, forward and backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return round_to_tf32(a) @ round_to_tf32(b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        gradient, left, right = map(round_to_tf32, (gradient, a, b))
        da, db = gradient @ right.transpose(-1, -2), left.transpose(-1, -2) @ gradient
        return da.sum_to_size(a.shape), db.sum_to_size(b.shape)


class Tf32Products(TorchFunctionMode):
    """Makes every `@` of plain PyTorch a Tf32Product."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("matmul", "__matmul__"):
            return Tf32Product.apply(*args)
        return function(*args, **(kwargs or {}))


def tf32_form(**arguments: Tensor) -> Tensor:
    with Tf32Products():
        return eager_form(**arguments)


def plain(way: Way, arguments: Arguments, dz: Tensor) -> Results | None:
    """The results that those of the kernels are measured against, or None in float64, which is exact enough."""
    if way.dtype == torch.float64:
        return None
    return evaluate(tf32_form if way.tf32 else eager_form, arguments, dz, way.dtype)


# The kernels.


def _map(x: Tensor) -> list[int]:
    assert x.shape[3] <= 1 or x.stride(3) == 1
    assert x.shape[2] <= 1 or x.stride(2) == x.shape[3]
    return [x.data_ptr(), x.stride(0), x.stride(1)]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), torch.nan, dtype=dtype)


def _inputs(sources: Sequence[Source], value_channels: int) -> list[int]:
    """What all calls begin with: sizes and sources."""
    batch, channels, height, width = sources[0].x.shape
    fields = [batch, channels, value_channels, height * width, *NO_WINDOWS, len(sources)]
    for source in sources:
        fields += [*_map(source.x), source.score.shape[0], *_addresses(source[1:])]
    return fields


def _widened(way: Way, arguments: Arguments) -> tuple[list[Source], Tensor]:
    """Sources and value bias with weights as the kernels want them."""

    def widen(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.to(way.wide).contiguous()

    sources = [Source(source.x, *map(widen, source[1:])) for source in sources_of(arguments)]  # type: ignore[arg-type]
    return sources, arguments["value_bias"].to(way.wide)


def forward(
    kernels: Kernels,
    way: Way,
    arguments: Arguments,
    multiprocessors: int = 1,
    save: bool = True,
    most_shared_bytes: int | None = None,
) -> tuple[Tensor, list[Context]]:
    """z, and the contexts if they are to be saved.

    most_shared_bytes: that a block gets, whatever the launch was planned for; in float32 only.
    """
    sources, value_bias = _widened(way, arguments)
    batch, channels, *size = sources[0].x.shape
    z = _unwritten((batch, len(value_bias), *size), way.dtype)
    shapes = ((batch, channels, *size), (batch, size[0] * size[1]), (batch, channels))
    contexts = [Context(*(_unwritten(shape, way.wide) for shape in shapes)) for _ in sources if save]
    fields = [*_inputs(sources, len(value_bias)), *_addresses([value_bias, z])]
    for kept in zip(*contexts, strict=True) if save else [[None] * len(sources)] * 3:
        fields += _addresses(kept)
    if most_shared_bytes is None:
        way.function(kernels, "forward")(numpy.array(fields), *way.card(multiprocessors))
    else:
        way.function(kernels, "forward_within")(numpy.array(fields), most_shared_bytes, *way.card(multiprocessors))
    return z, contexts


def backward(
    kernels: Kernels,
    way: Way,
    arguments: Arguments,
    dz: Tensor,
    contexts: Sequence[Context],
    multiprocessors: int = 1,
) -> Results:
    sources, value_bias = _widened(way, arguments)
    maps = [_unwritten(source.x.shape, way.dtype) for source in sources]
    weights = [
        SourceGradients(*(None if weight is None else _unwritten(weight.shape, way.wide) for weight in source[1:]))  # type: ignore[arg-type]
        for source in sources
    ]
    dvalue_bias = _unwritten(value_bias.shape, way.wide)
    inputs = _inputs(sources, len(value_bias))
    workspace = _unwritten([plan_backward(kernels, way, inputs, multiprocessors).workspace // 8], torch.float64)
    fields = [*inputs, *_map(dz)]
    for kept in zip(*contexts, strict=True):
        fields += _addresses(kept)
    for dx, of in zip(maps, weights, strict=True):
        fields += _addresses([dx, *of])
    fields += _addresses([dvalue_bias])
    call = way.function(kernels, "backward")
    call(numpy.array(fields), workspace, workspace.nbytes, *way.card(multiprocessors))
    return gradients_of(arguments, maps, weights, dvalue_bias)


def run(kernels: Kernels, way: Way, arguments: Arguments, dz: Tensor, multiprocessors: int = 1) -> Results:
    z, contexts = forward(kernels, way, arguments, multiprocessors)
    return {"z": z} | backward(kernels, way, arguments, dz, contexts, multiprocessors)


# Launch shapes.


class ForwardPlan(NamedTuple):
    """The launch of the forward pass; bytes of a block, static ones included.

    keys_at_once: query channels of the keys that are made at a time, 0 where all are.
    """

    blocks: int
    shared_bytes: int
    stages: int
    rows: int
    keys_at_once: int


class BackwardPlan(NamedTuple):
    """The three launches of the backward pass; of the last one the blocks that add to the gradient of one source."""

    prepare_blocks: int
    prepare_bytes: int
    attend_blocks: int
    attend_bytes: int
    finish_blocks: int
    finish_bytes: int
    stages: int
    rows: int
    rows_take_turns: int
    workspace: int

    @property
    def shared_bytes(self) -> int:
        return max(self.prepare_bytes, self.attend_bytes, self.finish_bytes)


def sizes(batch: int, channels: int, value_channels: int, positions: int, keys: Sequence[int | None]) -> list[int]:
    """What a call begins with, without addresses; `keys`: D of each source with a key map, None for one without."""
    fields = [batch, channels, value_channels, positions, *NO_WINDOWS, len(keys)]
    for depth in keys:
        some_address = 0 if depth is None else 16
        fields += [0, 0, 0, channels if depth is None else depth, 0, 0, 0, some_address]
    return fields


def plan_forward(
    kernels: Kernels, way: Way, inputs: Sequence[int], multiprocessors: int, gates: bool = False, save: bool = False
) -> ForwardPlan:
    """gates: with 1x1 gates. save: with contexts for the backward pass."""
    plan = numpy.zeros(len(ForwardPlan._fields), dtype=numpy.int64)
    some_address, sources = 16, 2
    fields = [*inputs, *[some_address if save else 0] * (3 * sources)]
    way.function(kernels, "plan_forward")(numpy.array(fields), int(gates), plan, *way.card(multiprocessors))
    return ForwardPlan(*plan.tolist())


def plan_gates(kernels: Kernels, way: Way, inputs: Sequence[int], multiprocessors: int) -> ForwardPlan:
    return plan_forward(kernels, way, inputs, multiprocessors, gates=True)


def plan_backward(kernels: Kernels, way: Way, inputs: Sequence[int], multiprocessors: int) -> BackwardPlan:
    plan = numpy.zeros(len(BackwardPlan._fields), dtype=numpy.int64)
    way.function(kernels, "plan_backward")(numpy.array(inputs), plan, *way.card(multiprocessors))
    return BackwardPlan(*plan.tolist())
