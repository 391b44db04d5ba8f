"""The CUDA kernels of separable_gates on the host, against plain PyTorch in float64."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cases
import numpy
import pytest
import torch
from accuracy import assert_accurate
from call_fields import Way, addresses, casts, map_fields, unwritten
from kernel_build import KernelFault, Kernels
from torch import Tensor
from torch.nn import functional as F

from fastsam.ops.separable_gates import eager, native

UNIT = "separable_gates.cu"

WAYS = {
    "float32": Way(torch.float32, 61),
    "float64": Way(torch.float64, 86),
    "tf32": Way(torch.float32, 86, tf32=True),
    "half": Way(torch.float16, 61),
    "half_8": Way(torch.float16, 75),
    "half_16": Way(torch.float16, 86),
    "bfloat16": Way(torch.bfloat16, 75),
    "bfloat16_16": Way(torch.bfloat16, 86),
}
"""The ways to multiply, each on a card that has it."""

SHAPES: dict[str, dict[str, Any]] = {
    "tiles": {"batch": 2, "channels": 36, "size": (9, 11), "z": 7, "kernel": 5},
    "no_z": {"batch": 1, "channels": 5, "size": (7, 3), "z": None, "kernel": 3},
    "no_depthwise": {"batch": 3, "channels": 9, "size": (5, 8), "z": 9, "kernel": None},
    "no_bias": {"batch": 2, "channels": 3, "size": (8, 17), "z": 2, "kernel": 7, "bias": False},
    "one": {"batch": 64, "channels": 1, "size": (1, 1), "z": 1, "kernel": 1},
    "large_filter": {"batch": 1, "channels": 4, "size": (6, 10), "z": 20, "kernel": 23},
    "more_tiles_than_warps": {"batch": 3, "channels": 1, "size": (9, 17), "z": 1, "kernel": 17},
    "aligned": {"batch": 2, "channels": 36, "size": (9, 12), "z": 8, "kernel": 5},
    "aligned_no_depthwise": {"batch": 3, "channels": 8, "size": (5, 8), "z": 4, "kernel": None},
    "aligned_large_filter": {"batch": 1, "channels": 3, "size": (6, 12), "z": 1, "kernel": 23},
}
"""In those called aligned, 16-bit types are copied several elements at a time."""

COPIED = ["half_8", "half_16", "bfloat16_16"]
"""Ways that copy maps and weights of 16 bits as they are."""


Arguments = dict[str, Any]


def _inputs(arguments: Arguments) -> list[int]:
    """What all calls take first: sizes, maps, weights."""
    z, h, depthwise = arguments["z"], arguments["h"], arguments["depthwise"]
    batch, channels, height, width = h.shape
    sizes = [batch, channels, 0 if z is None else z.shape[1], height, width]
    kernel = 0 if depthwise is None else depthwise.shape[-1]
    maps = [part for name in ("z", "h", "m") for part in map_fields(arguments[name])]
    return [*sizes, kernel, *maps, *addresses([depthwise, arguments["pointwise"], arguments["bias"]])]


def _stored(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: None if value is None else value.to(dtype) for name, value in arguments.items()}


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


class Plan(NamedTuple):
    """The launches of a call: the forward one and then three backward, the last of which has warps with windows."""

    workspace: int
    operand_bytes: int
    depth_at_once: int
    forward_blocks: int
    forward_bytes: int
    gates_blocks: int
    gates_bytes: int
    products_blocks: int
    products_bytes: int
    channels_blocks: int
    channels_bytes: int
    warps: int

    @property
    def blocks(self) -> tuple[int, ...]:
        return self[3:11:2]

    @property
    def shared_bytes(self) -> tuple[int, ...]:
        return self[4:11:2]


def _plan(kernels: Kernels, way: Way, sizes: Sequence[int], cores: int) -> Plan:
    """sizes: batch, channels, z channels, height, width, kernel size."""
    plan = numpy.zeros(len(Plan._fields), dtype=numpy.int64)
    no_addresses = [0] * 12
    way.function(kernels, "plan")(numpy.array([*sizes, *no_addresses]), plan, *way.card(cores))
    return Plan(*plan.tolist())


def _run(kernels: Kernels, way: str, arguments: Arguments, upstream: list[Tensor], cores: int) -> dict[str, Tensor]:
    """The same from the kernels, for a device of that many multiprocessors."""
    h_hat, m_new = (unwritten(arguments["m"].shape, arguments["m"].dtype) for _ in range(2))
    call = numpy.array([*_inputs(arguments), *addresses([h_hat, m_new])])
    WAYS[way].function(kernels, "forward")(call, *WAYS[way].card(cores))
    return {"h_hat": h_hat, "m_new": m_new} | _run_backward(kernels, way, arguments, upstream, cores)


def _run_backward(
    kernels: Kernels, way: str, arguments: Arguments, upstream: list[Tensor], cores: int
) -> dict[str, Tensor]:
    gradients = {name: None if x is None else unwritten(x.shape, x.dtype) for name, x in arguments.items()}
    maps = [part for gradient in upstream for part in map_fields(gradient)]
    call = numpy.array([*_inputs(arguments), *maps, *addresses([*gradients.values()])])
    workspace = unwritten([_plan(kernels, WAYS[way], _inputs(arguments)[:6], cores).workspace // 8], torch.float64)
    WAYS[way].function(kernels, "backward")(call, workspace, workspace.nbytes, *WAYS[way].card(cores))
    return {f"gradient of {name}": x for name, x in gradients.items() if x is not None}


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
    assert_accurate([actual], [exact], [_evaluate(same_precision, arguments, upstream, WAYS[way].dtype)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["tiles", "aligned"])
def test_outputs_and_gradients_in_any_order(kernels: Kernels, way: str, shape: str) -> None:
    _check(kernels, way, _stored(cases.separable_gates(**SHAPES[shape], dtype=torch.float32), WAYS[way].dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("tiles", "aligned")])
def test_outputs_and_gradients(built: Kernels, way: str, shape: str) -> None:
    built.schedule(3)
    _check(built, way, _stored(cases.separable_gates(**SHAPES[shape], dtype=torch.float32), WAYS[way].dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["tiles", "no_depthwise", "large_filter", "aligned", "aligned_no_depthwise"])
def test_small_tiles_for_devices_of_many_multiprocessors(built: Kernels, way: str, shape: str) -> None:
    built.schedule(2)
    arguments = _stored(cases.separable_gates(**SHAPES[shape], dtype=torch.float32), WAYS[way].dtype)
    _check(built, way, arguments, cores=132)


@pytest.mark.parametrize("way", ["float32", "half_16"])
def test_strided_maps(usual: Kernels, way: str) -> None:
    arguments = _stored(cases.separable_gates(2, 6, (5, 9), z=3, kernel=3, dtype=torch.float32), WAYS[way].dtype)
    every_other = torch.full((2, 12, 5, 9), float("nan"), dtype=WAYS[way].dtype)
    every_other[:, ::2] = arguments["h"]
    arguments["h"] = every_other[:, ::2]
    arguments["z"] = arguments["z"][:1].expand(2, -1, -1, -1)
    arguments["m"] = arguments["m"].transpose(0, 1).contiguous().transpose(0, 1)
    _check(usual, way, arguments)


def _shifted(x: Tensor) -> Tensor:
    """The same one element further in memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _spread(x: Tensor) -> Tensor:
    """The same map with channels an odd number of elements apart."""
    batch, channels, height, width = x.shape
    strides = (channels * (height * width + 1), height * width + 1, width, 1)
    return x.new_zeros(batch * strides[0]).as_strided(x.shape, strides).copy_(x)


@pytest.fixture
def taking_all_for_aligned(usual: Kernels) -> Iterator[Kernels]:
    usual.take_all_for_aligned(1)
    yield usual
    usual.take_all_for_aligned(0)


MISPLACED = pytest.mark.parametrize(
    ("name", "misplace"),
    [*((name, _shifted) for name in ("z", "h", "depthwise", "pointwise")), ("z", _spread), ("h", _spread)],
)


def _misplaced(way: str, name: str, misplace: Callable[[Tensor], Tensor]) -> Arguments:
    arguments = _stored(cases.separable_gates(2, 4, (6, 8), z=8, kernel=3, dtype=torch.float32), WAYS[way].dtype)
    return arguments | {name: misplace(arguments[name])}


@pytest.mark.parametrize("way", COPIED)
@MISPLACED
def test_what_is_not_aligned_is_copied_one_by_one(
    usual: Kernels, way: str, name: str, misplace: Callable[[Tensor], Tensor]
) -> None:
    _check(usual, way, _misplaced(way, name, misplace))


@pytest.mark.parametrize("way", COPIED)
@MISPLACED
def test_what_is_aligned_is_copied_several_at_a_time(
    taking_all_for_aligned: Kernels, way: str, name: str, misplace: Callable[[Tensor], Tensor]
) -> None:
    """Told that all is aligned, kernels make copies that are not."""
    arguments = _misplaced(way, name, misplace)
    with pytest.raises(KernelFault, match="must be a multiple of 8"):
        _run(taking_all_for_aligned, way, arguments, _upstream(arguments), cores=1)


@pytest.mark.parametrize("size", [(5, 9), (4, 6)], ids=str)
@pytest.mark.parametrize("way", COPIED)
def test_rows_that_are_not_aligned(usual: Kernels, way: str, size: tuple[int, int]) -> None:
    """Where only the maps are not, or only the weights."""
    for channels, of_z in ((4, 8), (3, 2)):
        for width in (size[1], 8):
            arguments = cases.separable_gates(2, channels, (size[0], width), z=of_z, kernel=7, dtype=torch.float32)
            _check(usual, way, _stored(arguments, WAYS[way].dtype))


@pytest.mark.parametrize(("way", "width"), [("float64", 19), ("half_16", 20)])
def test_every_way_to_split_the_positions(usual: Kernels, way: str, width: int) -> None:
    arguments = cases.separable_gates(3, 4, (7, width), z=3, kernel=3, dtype=torch.float64)
    for cores in (1, 2, 3, 5, 8, 132):
        _check(usual, way, _stored(arguments, WAYS[way].dtype), cores)


def test_schedules_give_the_same_bits(built: Kernels) -> None:
    arguments = cases.separable_gates(2, 5, (9, 10), z=4, kernel=5, dtype=torch.float32)
    results = []
    for seed in (None, 0, 1):
        built.schedule(seed)
        results.append(_run(built, "float32", arguments, _upstream(arguments), 4))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_no_samples_give_gradients_of_zero(usual: Kernels) -> None:
    arguments = cases.separable_gates(2, 5, (3, 4), z=4, kernel=3, dtype=torch.float32)
    empty = {name: x[:0] if name in ("z", "h", "m") else x for name, x in arguments.items()}
    gradients = _run_backward(usual, "float32", empty, _upstream(empty), 4)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["z", "h", "m", "pointwise"])
def test_special_values_spread_as_in_eager(usual: Kernels, name: str, value: float) -> None:
    arguments = cases.separable_gates(2, 3, (6, 9), z=2, kernel=3, dtype=torch.float32)
    arguments[name].view(-1)[arguments[name].numel() // 2] = value
    upstream = _upstream(arguments)
    actual = _run(usual, "float32", arguments, upstream, 4)
    for output, expected in _evaluate(eager.separable_gates, arguments, upstream, torch.float32).items():
        assert not (~actual[output].isfinite() & expected.isfinite()).any(), output
        if output in ("h_hat", "m_new"):
            assert torch.equal(actual[output].isnan(), expected.isnan()), output
            assert torch.equal(actual[output].isfinite(), expected.isfinite()), output


@pytest.mark.parametrize(("size", "kernel"), [((7, 1), 7), ((5, 2), 7), ((3, 5), 5), ((4, 9), 3), ((2, 97), 3)])
def test_infinity_at_the_edge_of_the_map(usual: Kernels, size: tuple[int, int], kernel: int) -> None:
    """What a block computes beyond the map must not reach a gradient."""
    for row in range(min(size[0], 3)):
        arguments = cases.separable_gates(2, 3, size, z=2, kernel=kernel, seed=row, dtype=torch.float32)
        arguments["h"][1, 1, row, -1] = float("inf")
        upstream = _upstream(arguments)
        actual = _run(usual, "float32", arguments, upstream, 4)
        for name, expected in _evaluate(eager.separable_gates, arguments, upstream, torch.float32).items():
            assert not (~actual[name].isfinite() & expected.isfinite()).any(), name


@pytest.mark.parametrize("cores", [28, 64, 128])
def test_small_maps_fill_a_card(built: Kernels, cores: int) -> None:
    plan = _plan(built, WAYS["float32"], [8, 64, 64, 16, 16, 5], cores)
    assert min(plan.blocks) >= cores


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel", [0, 1, 3, 5, 7, 25])
def test_every_card_has_the_shared_memory(built: Kernels, way: str, kernel: int) -> None:
    for cores in (1, 1000):
        plan = _plan(built, WAYS[way], [8, 256, 256, 16, 16, kernel], cores)
        assert max(plan.shared_bytes) <= 48 * 1024
        assert plan.warps >= 1


@pytest.mark.parametrize(
    ("way", "kernel", "expected"),
    [("float32", 5, 8), ("half_16", 5, 8), ("float32", 7, 7), ("float64", 5, 4), ("float64", 7, 3), ("float32", 25, 4)],
)
def test_as_many_warps_have_windows_as_there_is_room_for(built: Kernels, way: str, kernel: int, expected: int) -> None:
    assert _plan(built, WAYS[way], [8, 64, 64, 16, 16, kernel], 28).warps == expected


@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [
        (torch.float32, False, {61: (4, 1), 70: (4, 1), 75: (4, 1), 80: (4, 1), 90: (4, 1), 120: (4, 1)}),
        (torch.float32, True, {61: (4, 1), 70: (4, 1), 75: (4, 1), 80: (4, 8), 90: (4, 8), 120: (4, 8)}),
        (torch.float64, False, {61: (8, 1), 70: (8, 1), 75: (8, 1), 80: (8, 1), 90: (8, 1), 120: (8, 1)}),
        (torch.float16, False, {61: (4, 1), 70: (4, 1), 75: (2, 8), 80: (2, 16), 90: (2, 16), 120: (2, 16)}),
        (torch.bfloat16, False, {61: (4, 1), 70: (4, 1), 75: (4, 1), 80: (2, 16), 90: (2, 16), 120: (2, 16)}),
    ],
    ids=["float32", "tf32", "float64", "float16", "bfloat16"],
)
def test_every_card_multiplies_as_fast_as_it_can(
    built: Kernels, dtype: torch.dtype, tf32: bool, expected: dict[int, tuple[int, int]]
) -> None:
    """Bytes of an operand, and terms of a sum that one instruction adds: with more than one it is a tensor core's."""
    for capability, product in expected.items():
        plan = _plan(built, Way(dtype, capability, tf32), [2, 5, 4, 9, 8, 3], 20)
        assert (plan.operand_bytes, plan.depth_at_once) == product, capability


def test_the_workspace_is_as_large_as_it_has_to_be(built: Kernels) -> None:
    """u, dgates, du and the parts of dpointwise, each at a multiple of 16 bytes; without a filter there is no du."""
    positions, inputs, rows = 2 * 9 * 8, 9, 15
    for kernel in (0, 3):
        plan = _plan(built, WAYS["half_16"], [2, 5, 4, 9, 8, kernel], 1)
        du, parts = (4 * inputs * positions if kernel else 0), 4 * 2 * rows * inputs
        nbytes = [2 * inputs * positions, 2 * rows * positions, du, parts]
        assert plan.workspace == sum(-(-size // 16) * 16 for size in nbytes)


def test_more_blocks_than_a_launch_can_have_are_refused(built: Kernels) -> None:
    most = 2**31 - 1
    assert _plan(built, WAYS["float32"], [most, 1, 0, 1, 1, 0], 1).blocks[0] == most
    refusal = (
        f"separable_gates forward (batch {most + 1}, channels 1, z channels 0, map 1 x 1, kernel size 0) "
        f"on CUDA device 0 needs {most + 1} blocks, a launch has at most {most}"
    )
    with pytest.raises(KernelFault, match=re.escape(refusal)):
        _plan(built, WAYS["float32"], [most + 1, 1, 0, 1, 1, 0], 1)


@pytest.mark.parametrize("way", WAYS)
def test_filters_that_are_too_large_are_refused(built: Kernels, way: str) -> None:
    refusal = r"separable_gates forward \(.*, kernel size 127\) on CUDA device 0 needs a smaller kernel size"
    with pytest.raises(KernelFault, match=refusal):
        _plan(built, WAYS[way], [1, 2, 2, 8, 8, 127], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_gets_weights_as_they_are(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without casts, which would be launches of their own. meta stands for a GPU."""
    calls: list[str] = []
    monkeypatch.setattr(native, "run", lambda name, like, fields: calls.append(name))
    arguments = _stored(cases.separable_gates(2, 5, (3, 4), z=4, kernel=3, dtype=torch.float32), dtype)
    of_gpu = [tensor.to("meta") for tensor in arguments.values()]
    upstream = [torch.empty_like(of_gpu[2]) for _ in range(2)]
    assert casts(lambda: native.forward(*of_gpu)) == 0
    gradients = native.backward(*upstream, *of_gpu)
    assert casts(lambda: native.backward(*upstream, *of_gpu)) == 0
    assert [gradient.dtype for gradient in gradients] == [dtype] * 6
    assert calls == ["separable_gates_forward", *["separable_gates_backward"] * 2]
