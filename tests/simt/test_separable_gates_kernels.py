"""The CUDA kernels of separable_gates on the host, against plain PyTorch in float64."""

import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from accuracy import assert_accurate
from kernel_build import KernelFault, Kernels
from torch import Tensor
from torch.nn import functional as F

from fastsam.ops.separable_gates import eager

WAYS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,
    "half": torch.float16,
    "half_8": torch.float16,
    "half_16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bfloat16_16": torch.bfloat16,
}
"""The ways to multiply, with the type of the maps."""

SHAPES: dict[str, dict[str, Any]] = {
    "tiles": {"batch": 2, "channels": 36, "size": (9, 11), "z": 7, "kernel": 5},
    "no_z": {"batch": 1, "channels": 5, "size": (7, 3), "z": None, "kernel": 3},
    "no_depthwise": {"batch": 3, "channels": 9, "size": (5, 8), "z": 9, "kernel": None},
    "no_bias": {"batch": 2, "channels": 3, "size": (8, 17), "z": 2, "kernel": 7, "bias": False},
    "one": {"batch": 64, "channels": 1, "size": (1, 1), "z": 1, "kernel": 1},
    "large_filter": {"batch": 1, "channels": 4, "size": (6, 10), "z": 20, "kernel": 23},
    "more_tiles_than_warps": {"batch": 3, "channels": 1, "size": (9, 17), "z": 1, "kernel": 17},
}


Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("separable_gates.cu")


def _map(x: Tensor | None) -> list[Any]:
    return [None, 0, 0] if x is None else [x, x.stride(0), x.stride(1)]


def _inputs(arguments: Arguments) -> list[Any]:
    """What all kernels take first: maps, weights, sizes."""
    z, h, depthwise = arguments["z"], arguments["h"], arguments["depthwise"]
    batch, channels, height, width = h.shape
    sizes = [batch, channels, 0 if z is None else z.shape[1], height, width]
    kernel = 0 if depthwise is None else depthwise.shape[-1]
    maps = [part for name in ("z", "h", "m") for part in _map(arguments[name])]
    return [*maps, depthwise, arguments["pointwise"], arguments["bias"], *sizes, kernel]


def _stored(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Maps in the storage type, weights in that of the arithmetic."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None if value is None else value.to(dtype if name in ("z", "h", "m") else wide)
        for name, value in arguments.items()
    }


def _unwritten(like: Tensor) -> Tensor:
    return torch.full(like.shape, float("nan"), dtype=like.dtype)


class _Tf32Product(torch.autograd.Function):
    """A 1x1 convolution as tensor cores do it: operands rounded, forward and backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(u, weight)
        return F.conv2d(_round_to_tf32(u), _round_to_tf32(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        u, weight = map(_round_to_tf32, ctx.saved_tensors)
        gradient = _round_to_tf32(gradient)
        dweight = torch.einsum("brhw,bihw->ri", gradient, u)
        return F.conv2d(gradient, weight.transpose(0, 1)), dweight[:, :, None, None]


def _round_to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _tf32_gates(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The eager form with the operands of the pointwise product rounded."""
    u = h if z is None else torch.cat([z, h], dim=1)
    if depthwise is not None:
        u = F.conv2d(u, depthwise, padding=depthwise.shape[-1] // 2, groups=u.shape[1])
    gates = _Tf32Product.apply(u, pointwise)
    if bias is not None:
        gates = gates + bias[:, None, None]
    channels = h.shape[1]
    identity = torch.eye(3 * channels, dtype=gates.dtype)[:, :, None, None]
    return eager.separable_gates(gates[:, : 2 * channels], gates[:, 2 * channels :], m, None, identity, None)


def _evaluate(
    function: Callable[..., Any], arguments: Arguments, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The outputs and, by autograd, the gradients of a plain form in `dtype`."""
    leaves = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in arguments.items()}
    outputs = function(**leaves)
    names = [name for name, leaf in leaves.items() if leaf is not None]
    upstream = [gradient.to(dtype) for gradient in upstream]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], upstream)
    named = {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: x.detach() for name, x in zip(("h_hat", "m_new"), outputs, strict=True)} | named


def _run(kernels: Kernels, way: str, arguments: Arguments, upstream: list[Tensor], cores: int) -> dict[str, Tensor]:
    """The same from the kernels, for a device of that many multiprocessors."""
    outputs = {"h_hat": _unwritten(arguments["m"]), "m_new": _unwritten(arguments["m"])}
    getattr(kernels, f"forward_{way}")(*_inputs(arguments), *outputs.values(), cores)
    gradients = {name: None if x is None else _unwritten(x) for name, x in arguments.items()}
    maps = [part for gradient in upstream for part in _map(gradient)]
    getattr(kernels, f"backward_{way}")(*_inputs(arguments), *maps, *gradients.values(), cores)
    return outputs | {f"gradient of {name}": x for name, x in gradients.items() if x is not None}


def _upstream(arguments: Arguments) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(arguments["m"].shape, generator=generator).to(arguments["m"].dtype) for _ in range(2)]


def _check(kernels: Kernels, way: str, arguments: Arguments, cores: int = 1) -> None:
    upstream = _upstream(arguments)
    actual = _run(kernels, way, arguments, upstream, cores)
    exact = _evaluate(eager.separable_gates, arguments, upstream, torch.float64)
    if way == "float64":
        assert_accurate([actual], [exact], None)
        return
    same_precision = _tf32_gates if way == "tf32" else eager.separable_gates
    assert_accurate([actual], [exact], [_evaluate(same_precision, arguments, upstream, WAYS[way])])


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_in_any_order(kernels: Kernels, seed: int | None, way: str) -> None:
    kernels.schedule(seed)
    _check(kernels, way, _stored(cases.separable_gates(**SHAPES["tiles"], dtype=torch.float32), WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "tiles"])
def test_outputs_and_gradients(kernels: Kernels, way: str, shape: str) -> None:
    kernels.schedule(3)
    _check(kernels, way, _stored(cases.separable_gates(**SHAPES[shape], dtype=torch.float32), WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["tiles", "no_depthwise", "large_filter"])
def test_small_tiles_for_devices_of_many_multiprocessors(kernels: Kernels, way: str, shape: str) -> None:
    kernels.schedule(2)
    arguments = _stored(cases.separable_gates(**SHAPES[shape], dtype=torch.float32), WAYS[way])
    _check(kernels, way, arguments, cores=132)


@pytest.mark.parametrize("way", ["float32", "half_16"])
def test_strided_maps(kernels: Kernels, way: str) -> None:
    kernels.schedule(None)
    arguments = _stored(cases.separable_gates(2, 6, (5, 9), z=3, kernel=3, dtype=torch.float32), WAYS[way])
    every_other = torch.full((2, 12, 5, 9), float("nan"), dtype=WAYS[way])
    every_other[:, ::2] = arguments["h"]
    arguments["h"] = every_other[:, ::2]
    arguments["z"] = arguments["z"][:1].expand(2, -1, -1, -1)
    arguments["m"] = arguments["m"].transpose(0, 1).contiguous().transpose(0, 1)
    _check(kernels, way, arguments)


def test_every_way_to_split_the_positions(kernels: Kernels) -> None:
    kernels.schedule(None)
    arguments = cases.separable_gates(3, 4, (7, 19), z=3, kernel=3, dtype=torch.float64)
    for cores in (1, 2, 3, 5, 8, 132):
        _check(kernels, "float64", arguments, cores)


def test_schedules_give_the_same_bits(kernels: Kernels) -> None:
    arguments = cases.separable_gates(2, 5, (9, 10), z=4, kernel=5, dtype=torch.float32)
    results = []
    for seed in (None, 0, 1):
        kernels.schedule(seed)
        results.append(_run(kernels, "float32", arguments, _upstream(arguments), 4))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_no_samples_give_gradients_of_zero(kernels: Kernels) -> None:
    kernels.schedule(None)
    arguments = cases.separable_gates(2, 5, (3, 4), z=4, kernel=3, dtype=torch.float32)
    empty = {name: x[:0] if name in ("z", "h", "m") else x for name, x in arguments.items()}
    gradients = {name: _unwritten(x) for name, x in empty.items()}
    maps = [part for gradient in _upstream(empty) for part in _map(gradient)]
    kernels.backward_float32(*_inputs(empty), *maps, *gradients.values(), 4)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["z", "h", "m", "pointwise"])
def test_special_values_spread_as_in_eager(kernels: Kernels, name: str, value: float) -> None:
    kernels.schedule(None)
    arguments = cases.separable_gates(2, 3, (6, 9), z=2, kernel=3, dtype=torch.float32)
    arguments[name].view(-1)[arguments[name].numel() // 2] = value
    upstream = _upstream(arguments)
    actual = _run(kernels, "float32", arguments, upstream, 4)
    for output, expected in _evaluate(eager.separable_gates, arguments, upstream, torch.float32).items():
        assert not (~actual[output].isfinite() & expected.isfinite()).any(), output
        if output in ("h_hat", "m_new"):
            assert torch.equal(actual[output].isnan(), expected.isnan()), output
            assert torch.equal(actual[output].isfinite(), expected.isfinite()), output


@pytest.mark.parametrize(("size", "kernel"), [((7, 1), 7), ((5, 2), 7), ((3, 5), 5), ((4, 9), 3), ((2, 97), 3)])
def test_infinity_at_the_edge_of_the_map(kernels: Kernels, size: tuple[int, int], kernel: int) -> None:
    """What a block computes beyond the map must not reach a gradient."""
    kernels.schedule(None)
    for row in range(min(size[0], 3)):
        arguments = cases.separable_gates(2, 3, size, z=2, kernel=kernel, seed=row, dtype=torch.float32)
        arguments["h"][1, 1, row, -1] = float("inf")
        upstream = _upstream(arguments)
        actual = _run(kernels, "float32", arguments, upstream, 4)
        for name, expected in _evaluate(eager.separable_gates, arguments, upstream, torch.float32).items():
            assert not (~actual[name].isfinite() & expected.isfinite()).any(), name


def _launches(kernels: Kernels, way: str, *sizes: int) -> tuple[list[int], list[int], int]:
    """Blocks and bytes of shared memory of the three kinds of launches, and warps of the third one with windows."""
    blocks, nbytes, warps = (torch.zeros(count, dtype=torch.int64) for count in (3, 3, 1))
    getattr(kernels, f"launches_{way}")(*sizes, blocks, nbytes, warps)
    return blocks.tolist(), nbytes.tolist(), int(warps)


@pytest.mark.parametrize("cores", [28, 64, 128])
def test_small_maps_fill_a_card(kernels: Kernels, cores: int) -> None:
    blocks, *_ = _launches(kernels, "float32", 8, 64, 64, 16, 16, 5, cores)
    assert min(blocks) >= cores


@pytest.mark.parametrize("way", ["float32", "float64", "half_16"])
@pytest.mark.parametrize("kernel", [0, 1, 3, 5, 7, 25])
def test_every_card_has_the_shared_memory(kernels: Kernels, way: str, kernel: int) -> None:
    for cores in (1, 1000):
        _, nbytes, warps = _launches(kernels, way, 8, 256, 256, 16, 16, kernel, cores)
        assert max(nbytes) <= 48 * 1024
        assert warps >= 1


@pytest.mark.parametrize(
    ("way", "kernel", "expected"),
    [("float32", 5, 8), ("half_16", 5, 8), ("float32", 7, 7), ("float64", 5, 4), ("float64", 7, 3), ("float32", 25, 4)],
)
def test_as_many_warps_have_windows_as_there_is_room_for(
    kernels: Kernels, way: str, kernel: int, expected: int
) -> None:
    assert _launches(kernels, way, 8, 64, 64, 16, 16, kernel, 28)[2] == expected


def test_more_blocks_than_a_launch_can_have_are_refused(kernels: Kernels) -> None:
    most = 2**31 - 1
    assert _launches(kernels, "float32", most, 1, 0, 1, 1, 0, 1)[0][0] == most
    refusal = (
        f"separable_gates backward (batch {most + 1}, channels 1, z channels 0, map 1 x 1, kernel size 0) "
        f"on CUDA device 0 needs {most + 1} blocks, a launch has at most {most}"
    )
    with pytest.raises(KernelFault, match=re.escape(refusal)):
        _launches(kernels, "float32", most + 1, 1, 0, 1, 1, 0, 1)
