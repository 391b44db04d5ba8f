"""The operators on gates on Triton, interpreted where there is no card, against the naive float64 forms."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import cases
import pytest
import torch
from checks import assert_accurate, evaluate
from on_device import DEVICE, make
from torch import Tensor

import fastsam

pytest.importorskip("triton")

from fastsam.ops._gates import triton as gates
from fastsam.ops._triton.configurations import DoesNotFitError, forced, recorded
from fastsam.ops.separable_gates import triton as separable_gates

pytestmark = pytest.mark.usefixtures("triton_backend")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
VARIANTS = [variant for variant in cases.PUBLIC_VARIANTS if "gate" in variant]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
MAIN_VARIANTS = pytest.mark.parametrize(
    "variant",
    [
        "separable_gates",
        "separable_gates-no_depthwise",
        "lstm_gates",
        "lstm_gates-norms",
        "memory_gates-state_norm",
        "norm_gate-position_norm",
    ],
)
"""Those that take different ways through the kernels; the interpreter is slow."""

# (height, width), kernel size, channels, channels of z, bias
SEPARABLE = [
    ((1, 1), 5, 1, 1, True),
    ((4, 9), 3, 17, None, True),
    ((3, 2), 7, 5, 20, False),
    ((6, 7), 1, 16, 3, True),
    ((9, 5), None, 33, 31, True),
    ((7, 6), 5, 20, 12, True),
]
NORMS = [
    {},
    {"recurrent": True},
    {"norm": "channel"},
    {"norm": "position", "recurrent": True},
    {"norm": "channel", "recurrent_norm": "channel"},
    {"recurrent_norm": "position"},
]


def _arguments(variant: str, **options: Any) -> tuple[str, cases.Arguments]:
    operator, defaults = cases.PUBLIC_VARIANTS[variant]
    return operator, make(operator, **{**defaults, "dtype": torch.float32, **options})


def _draws(operator: str, count: int = 2, **options: Any) -> list[cases.Arguments]:
    return [make(operator, seed=seed, **options) for seed in range(count)]


@EACH_DTYPE
@pytest.mark.parametrize(("size", "kernel", "channels", "z", "bias"), SEPARABLE)
def test_separable_gates(poison, size, kernel, channels, z, bias, dtype):
    options = {"channels": channels, "size": size, "z": z, "kernel": kernel, "bias": bias, "dtype": dtype}
    assert_accurate("separable_gates", _draws("separable_gates", **options))


@MAIN_VARIANTS
def test_float16(poison, variant):
    operator, options = cases.PUBLIC_VARIANTS[variant]
    assert_accurate(operator, _draws(operator, **{**options, "size": (5, 6), "dtype": torch.float16}))


@pytest.mark.parametrize(("channels", "z", "kernel"), [(65, None, 3), (65, 65, None), (129, None, None)])
def test_separable_gates_of_several_blocks_of_channels(poison, channels, z, kernel):
    options = {"channels": channels, "z": z, "kernel": kernel, "size": (3, 4), "dtype": torch.float32}
    assert_accurate("separable_gates", _draws("separable_gates", batch=1, **options))


def test_separable_gates_of_more_channels_than_there_are_tiles_for():
    arguments = make("separable_gates", batch=1, channels=257, size=(2, 2), kernel=3, dtype=torch.float32)
    message = r"fastsam\.separable_gates: .* up to 256 channels, these maps have 257; .*backend\(\"eager\"\)"
    with pytest.raises(DoesNotFitError, match=message):
        fastsam.ops.separable_gates(**arguments)


def test_separable_gates_with_a_filter_larger_than_its_sums(poison):
    """81 taps: the part of ddepthwise goes through the positions three times."""
    options = {"channels": 3, "z": 2, "kernel": 9, "size": (5, 8), "dtype": torch.float32}
    assert_accurate("separable_gates", _draws("separable_gates", batch=1, **options))


def test_separable_gates_summed_in_several_parts(poison, monkeypatch):
    """Of 6 samples of 2 tiles each, 3 tiles to a part: parts that begin inside of a sample, and more than one round."""
    monkeypatch.setattr(separable_gates, "_LEAST_TILES_A_PART", 3)
    monkeypatch.setattr(separable_gates, "_SUM", {"PARTS_AT_ONCE": 2, "NUMBERS": 128})
    options = {"channels": 4, "z": 3, "kernel": 3, "size": (5, 8), "dtype": torch.float32}
    assert_accurate("separable_gates", _draws("separable_gates", batch=6, **options))


@EACH_DTYPE
@pytest.mark.parametrize("variant", ["norm_gate-norm", "norm_gate-position_norm", "memory_gates-state_norm"])
def test_a_sample_of_one_number_is_its_own_mean(poison, variant, dtype):
    """So its gradient is 0 however much 1 / sqrt(eps) makes of a rounding error."""
    operator, options = cases.PUBLIC_VARIANTS[variant]
    assert_accurate(operator, _draws(operator, 4, channels=1, size=(1, 1), **options, dtype=dtype))


@EACH_DTYPE
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_lstm_gates(poison, norms, dtype):
    assert_accurate("lstm_gates", _draws("lstm_gates", channels=7, size=(5, 6), **norms, dtype=dtype))


@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_lstm_gates_of_one_position(poison, norms):
    assert_accurate("lstm_gates", _draws("lstm_gates", 4, channels=3, size=(1, 1), **norms, dtype=torch.float32))


@pytest.mark.parametrize("norms", [NORMS[3], NORMS[4]], ids=str)
def test_lstm_gates_summed_in_several_parts(poison, monkeypatch, norms):
    """Small tiles: 136 of the moments of a sample in 128 parts, 34 sums of its rows."""
    small = {**gates.tile(1, 529, 16), "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(gates, "_MOMENTS_TILE", 16)
    with forced("lstm_gates_backward", small), forced("lstm_gates_norm_backward", gates.candidates(4, 529)[-1]):
        draws = _draws("lstm_gates", 1, batch=1, channels=1, size=(23, 23), **norms, dtype=torch.float32)
        assert_accurate("lstm_gates", draws)


@pytest.mark.parametrize("norms", NORMS[2:5], ids=str)
def test_means_far_from_zero(norms):
    """Where E[x^2] - E[x]^2 would lose most digits of the variance."""
    draws = _draws("lstm_gates", 4, channels=4, size=(9, 17), **norms, dtype=torch.float32)
    maps = [name for name, norm in (("gates", "norm"), ("recurrent", "recurrent_norm")) if norm in norms]
    assert_accurate("lstm_gates", [{**draw, **{name: draw[name] - 1000.0 for name in maps}} for draw in draws])


@MAIN_VARIANTS
def test_every_candidate(poison, variant):
    """What tuning may choose computes the same."""
    operator, arguments = _arguments(variant, size=(3, 4), batch=1)
    with recorded() as asked:
        evaluate(operator, cases.public(operator), arguments)
    candidates = {of.kernel: of.candidates for of in asked.values()}
    assert len(candidates) >= 2 and all(1 <= len(of_kernel) <= 6 for of_kernel in candidates.values())
    for place in range(1, max(map(len, candidates.values()))):
        with ExitStack() as stack:
            for kernel, of_kernel in candidates.items():
                stack.enter_context(forced(kernel, of_kernel[min(place, len(of_kernel) - 1)]))
            assert_accurate(operator, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "expanded_batch"])
@MAIN_VARIANTS
def test_layouts(poison, variant, layout):
    operator, arguments = _arguments(variant)
    change = cases.LAYOUTS[layout]
    assert_accurate(operator, cases.map_tensors(change, arguments), upstream=change)


@EACH_VARIANT
def test_empty_batch(variant):
    operator, arguments = _arguments(variant, batch=0)
    result = evaluate(operator, cases.public(operator), arguments)
    assert all(output.shape[0] == 0 for output in result.outputs.values())
    for name, gradient in result.gradients.items():
        assert gradient.shape == arguments[name].shape and not gradient.any(), name


@EACH_VARIANT
def test_nothing_around_the_results_is_written(variant, monkeypatch):
    """Everything allocated for results and between launches comes with sentinels before and behind it."""
    allocations = []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], Sequence) else shape
        room = torch.full([math.prod(sizes) + 128], 12345.0, dtype=dtype, device=DEVICE)
        allocations.append(room)
        return room[64:-64].view(sizes)

    operator, arguments = _arguments(variant, size=(5, 7), batch=1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", empty)
        patched.setattr(torch, "empty_like", lambda like: empty(like.shape, dtype=like.dtype))
        evaluate(operator, cases.public(operator), arguments)
    assert len(allocations) >= 4
    for room in allocations:
        assert (room[:64] == 12345).all() and (room[-64:] == 12345).all()


def _spoil(tensor: Tensor, value: float) -> Tensor:
    """The same tensor with its middle element replaced."""
    spoiled = tensor.clone()
    spoiled[tuple(length // 2 for length in tensor.shape)] = value
    return spoiled


def _assert_same_kinds_of_number(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, reference in expected.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual[name]), kind(reference)), f"{name}: {kind.__name__}"


@MAIN_VARIANTS
def test_nan_spreads_as_in_eager(variant):
    operator, arguments = _arguments(variant, size=(4, 5))
    for name in [name for name, value in arguments.items() if isinstance(value, Tensor)]:
        spoiled = {**arguments, name: _spoil(arguments[name], float("nan"))}
        actual = evaluate(operator, cases.public(operator), spoiled)
        expected = evaluate(operator, cases.eager(operator), spoiled)
        assert any(output.isnan().any() for output in actual.outputs.values()), f"NaN in {name} is lost"
        _assert_same_kinds_of_number(actual.tensors(), expected.tensors())


@MAIN_VARIANTS
def test_nan_from_upstream_spreads_as_in_eager(variant):
    operator, arguments = _arguments(variant, size=(4, 5))

    def upstream(gradient: Tensor) -> Tensor:
        return _spoil(gradient, float("nan"))

    actual = evaluate(operator, cases.public(operator), arguments, upstream=upstream)
    expected = evaluate(operator, cases.eager(operator), arguments, upstream=upstream)
    _assert_same_kinds_of_number(actual.gradients, expected.gradients)


@MAIN_VARIANTS
def test_infinity_spreads_as_in_eager(variant):
    """But for weights of norms: PyTorch's x (rstd weight) + (bias - mean (rstd weight)) has infinity less infinity."""
    operator, arguments = _arguments(variant, size=(4, 5))
    outputs = cases.OUTPUTS[operator]
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in [name for name in tensors if not name.endswith("norm_weight")]:
        spoiled = {**arguments, name: _spoil(arguments[name], -float("inf"))}
        actual = cases.outputs_of(cases.public(operator)(**spoiled))
        expected = cases.outputs_of(cases.eager(operator)(**spoiled))
        _assert_same_kinds_of_number(*(dict(zip(outputs, values, strict=True)) for values in (actual, expected)))


@pytest.mark.parametrize(("size", "kernel"), [((7, 1), 7), ((3, 5), 5), ((4, 9), 3)])
def test_infinity_at_the_edge_of_the_map(size, kernel):
    """What a kernel computes beyond the map, to fill its tiles, must not reach a gradient."""
    for seed in range(2):
        options = {"channels": 3, "size": size, "z": 2, "kernel": kernel, "seed": seed}
        arguments = make("separable_gates", **options, dtype=torch.float32)
        arguments["h"][1, 1, seed % size[0], -1] = float("inf")
        actual = evaluate("separable_gates", cases.public("separable_gates"), arguments)
        expected = evaluate("separable_gates", cases.eager("separable_gates"), arguments)
        for name, reference in expected.gradients.items():
            assert not (~actual.gradients[name].isfinite() & reference.isfinite()).any(), name


@pytest.mark.parametrize("operator", ["separable_gates", "lstm_gates"])
def test_saturated_gates(operator):
    arguments = _arguments(operator)[1]
    name = "bias" if operator == "separable_gates" else "gates"
    arguments[name] = 1e3 * arguments[name]
    assert_accurate(operator, arguments)
