"""The CUDA kernels of the attention operators on the host: where their maps lie in memory, and values at the edges of
what there is.
"""

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from accuracy import Results, assert_accurate
from attention_calls import (
    MANY,
    WAYS,
    dz_of,
    eager_form,
    evaluate,
    exact,
    forward,
    make,
    naive,
    plain,
    run,
    tf32_form,
)
from call_fields import Way
from cases import Arguments
from kernel_build import Kernels
from torch import Tensor

DOUBLE, SELF = "double_attention", "self_attention"

ROWS = pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["64_rows", "16_rows"])


@pytest.fixture(scope="module")
def kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    kernels = compile_host("attention.cu")
    kernels.schedule(None)
    return kernels


# Layouts.


def _spaced(x: Tensor, channel_gap: int, batch_gap: int, offset: int = 0) -> Tensor:
    """The same map with unused numbers after each channel and each sample, and before all."""
    batch, channels, height, width = x.shape
    stride = height * width + channel_gap
    strides = (channels * stride + batch_gap, stride, width, 1)
    storage = torch.full((offset + batch * strides[0],), torch.nan, dtype=x.dtype)
    return storage.as_strided(x.shape, strides, offset).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "vectors": lambda x: _spaced(x, 8, 16),
    "channels_apart": lambda x: _spaced(x, 1, 0),
    "samples_apart": lambda x: _spaced(x, 0, 1),
    "address": lambda x: _spaced(x, 0, 0, 1),
}
"""All but the first keep rows from being copied as vectors of 16 bytes."""

EXPANSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda x: x[:1].expand_as(x),
    "channels": lambda x: x[:, :1].expand_as(x),
}


def _run_layout(kernels: Kernels, way: Way, layout: Callable[[Tensor], Tensor] | None, strided: str) -> Results:
    """One call, one of whose maps is laid out in another way."""
    arguments = make(DOUBLE, way, batch=2, channels=5, size=(3, 8), out=6, keys=4)
    maps = {**arguments, "dz": dz_of(arguments)}
    if layout is not None:
        maps[strided] = layout(maps[strided])
    dz = maps.pop("dz")
    return run(kernels, way, maps, dz)


def _assert_same_bits(actual: Results, expected: Results, layout: str) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{layout}: {name}"


@pytest.mark.parametrize("name", ["float32", "tf32", "float64", "half_8", "half_16", "bfloat16"])
def test_layouts(kernels: Kernels, name: str) -> None:
    expected = _run_layout(kernels, WAYS[name], None, "")
    for strided in ("h", "m", "dz"):
        for layout, function in LAYOUTS.items():
            actual = _run_layout(kernels, WAYS[name], function, strided)
            _assert_same_bits(actual, expected, f"{strided}, {layout}")


@pytest.mark.parametrize("name", ["float32", "float64", "half_16"])
def test_expanded_maps(kernels: Kernels, name: str) -> None:
    for strided in ("h", "m", "dz"):
        for expansion, function in EXPANSIONS.items():
            actual = _run_layout(kernels, WAYS[name], function, strided)
            expected = _run_layout(kernels, WAYS[name], lambda x: function(x).contiguous(), strided)  # noqa: B023
            _assert_same_bits(actual, expected, f"{strided}, {expansion}")


@pytest.mark.parametrize("name", ["float32", "float64", "half_16"])
def test_rows_that_are_no_vectors(kernels: Kernels, name: str) -> None:
    """The same numbers in rows of 24 positions, which are vectors, and of 24 with the last left out."""
    way = WAYS[name]
    arguments = make(DOUBLE, way, batch=2, channels=5, size=(1, 24))
    cut = {key: value[..., :-1] if value.ndim == 4 else value for key, value in arguments.items()}
    dense = {key: value.contiguous() for key, value in cut.items()}
    (actual, _), (expected, _) = (forward(kernels, way, each) for each in (cut, dense))
    assert torch.equal(actual, expected)


# Scores.


def _scores_of_a_thousand(way: Way) -> list[Arguments]:
    """Many draws, over which errors are taken: of one they hang on the rounding of one or two nearly tied scores."""
    count = 1 if way.dtype == torch.float64 else 60
    return [make(DOUBLE, way, seed, batch=1, channels=16, size=(3, 7), keys=4, largest=1e3) for seed in range(count)]


@pytest.mark.parametrize("name", ["float32", "tf32", "float64", "half_16"])
def test_scores_of_a_thousand(kernels: Kernels, name: str) -> None:
    way = WAYS[name]
    pairs = [(arguments, dz_of(arguments)) for arguments in _scores_of_a_thousand(way)]
    limits = None if way.dtype == torch.float64 else [plain(way, *pair) for pair in pairs]
    assert_accurate([run(kernels, way, *pair) for pair in pairs], [exact(*pair) for pair in pairs], limits)


def test_scores_of_a_thousand_in_small_tiles(kernels: Kernels) -> None:
    way = WAYS["float32"]
    draws = _scores_of_a_thousand(way)
    actual = [{"z": forward(kernels, way, arguments, MANY)[0]} for arguments in draws]
    expected = [{"z": naive(**cases.map_tensors(Tensor.double, arguments))} for arguments in draws]
    assert_accurate(actual, expected, [{"z": eager_form(**arguments)} for arguments in draws])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_beyond_the_range_of_exp(kernels: Kernels, sign: float) -> None:
    """All scores of a row shifted by +-1e4, which the softmax must not notice."""
    way = WAYS["float64"]
    arguments = make(SELF, way, batch=2, channels=5, size=(4, 4), out=3)
    arguments["x"][:, 0] = torch.linspace(0.9, 1.1, 16, dtype=torch.float64).view(4, 4)
    arguments["score_bias"][0] = sign * 1e4
    dz = dz_of(arguments)
    assert_accurate([run(kernels, way, arguments, dz)], [exact(arguments, dz)], None)


def _saturated(way: Way, keys: int | None) -> Arguments:
    """Orthogonal columns of length 30 that ask for themselves: each score of its own is 900 above the others."""
    arguments = make(SELF, way, batch=1, channels=12, size=(3, 4), keys=keys)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    identity = torch.eye(12, dtype=way.dtype)
    arguments |= {"x": (30 * basis).contiguous().view(1, 12, 3, 4).to(way.dtype)}
    arguments |= {"score": identity, "score_bias": torch.zeros(12, dtype=way.dtype)}
    return arguments if keys is None else {**arguments, "key": identity}


@pytest.mark.parametrize("name", ["float32", "float64", "half_fma", "bfloat16_fma"])
@pytest.mark.parametrize("keys", [None, 12], ids=["folded", "projected"])
def test_one_key_takes_all_of_the_softmax(kernels: Kernels, name: str, keys: int | None) -> None:
    """Then nothing of the gradient reaches the scores: both terms of P (dP - delta) are the same sum."""
    way = WAYS[name]
    arguments = _saturated(way, keys)
    dz = dz_of(arguments)
    actual = run(kernels, way, arguments, dz)
    for of in ("score", "score_bias", *(["key"] if keys is not None else [])):
        assert not actual[f"gradient of {of}"].any(), of
    limits = None if way.dtype == torch.float64 else [plain(way, arguments, dz)]
    assert_accurate([actual], [exact(arguments, dz)], limits)


@pytest.mark.parametrize("name", ["tf32", "half_8", "half_16", "bfloat16"])
@pytest.mark.parametrize("keys", [None, 12], ids=["folded", "projected"])
def test_one_key_takes_all_of_the_softmax_on_tensor_cores(kernels: Kernels, name: str, keys: int | None) -> None:
    """What is left of P (dP - delta) is the rounding of two float32 sums over the channels, in whatever dtype."""
    way = WAYS[name]
    arguments = _saturated(way, keys)
    dz = dz_of(arguments)
    actual = run(kernels, way, arguments, dz)
    columns = (arguments["x"].double() - arguments["x"].double().mean((2, 3), keepdim=True)).flatten(2)
    dr = arguments["value"].double().T @ dz.double().flatten(2)
    rounding = 12 * torch.finfo(torch.float32).eps * (dr * columns).abs().sum(1)
    # One more percent for the rounding of the operands.
    limits = {
        "score_bias": (rounding * columns.abs()).sum(2)[0],
        "score": ((rounding * columns.abs()) @ arguments["x"].double().flatten(2).abs().transpose(1, 2))[0],
    }
    for of, limit in limits.items():
        assert (actual[f"gradient of {of}"].double().abs() <= 1.01 * limit).all(), of


# Numbers that are not finite.


VARIANTS = {
    "folded": (DOUBLE, {}),
    "projected": (DOUBLE, {"keys": 3, "out": 4}),
    "one_source": (SELF, {}),
}


def _spoiled(variant: str, way: Way, value: float) -> Iterator[tuple[str, Arguments]]:
    """A call for each argument with its middle element replaced, and the argument's name."""
    operator, options = VARIANTS[variant]
    arguments = make(operator, way, batch=2, channels=5, size=(3, 7), **options)
    for name, argument in arguments.items():
        spoiled = argument.clone()
        spoiled[tuple(length // 2 for length in argument.shape)] = value
        yield name, {**arguments, name: spoiled}


def _assert_same_kinds_of_number(actual: Tensor, expected: Tensor, name: str) -> None:
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected)), f"{name}: {kind.__name__}"


@pytest.mark.parametrize("name", ["float32", "tf32", "float64", "half_16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_spreads_as_in_eager(kernels: Kernels, name: str, variant: str) -> None:
    way = WAYS[name]
    for spoiled, arguments in _spoiled(variant, way, torch.nan):
        dz = dz_of(arguments)
        actual = run(kernels, way, arguments, dz)
        assert actual["z"].isnan().any(), f"NaN in {spoiled} is lost"
        for result, expected in evaluate(eager_form, arguments, dz, way.dtype).items():
            _assert_same_kinds_of_number(actual[result], expected, f"NaN in {spoiled}: {result}")


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_from_upstream_spreads_as_in_eager(kernels: Kernels, name: str, variant: str) -> None:
    way = WAYS[name]
    operator, options = VARIANTS[variant]
    arguments = make(operator, way, batch=2, channels=5, size=(3, 7), **options)
    dz = dz_of(arguments)
    dz[1, 2, 1, 3] = torch.nan
    actual = run(kernels, way, arguments, dz)
    for result, expected in evaluate(eager_form, arguments, dz, way.dtype).items():
        _assert_same_kinds_of_number(actual[result], expected, result)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["float32", "tf32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinity_spreads_as_in_eager(kernels: Kernels, name: str, variant: str, value: float) -> None:
    way = WAYS[name]
    for spoiled, arguments in _spoiled(variant, way, value):
        z, _ = forward(kernels, way, arguments)
        _assert_same_kinds_of_number(z, eager_form(**arguments), f"{value} in {spoiled}")


def _with_infinite_scores(way: Way, positions: int, infinite: int, sign: float) -> Arguments:
    """The memory's scores of the first `infinite` positions overflow to infinity; the memory itself is finite."""
    arguments = make(DOUBLE, way, batch=1, channels=4, size=(1, positions))
    arguments["m"][:, 2, :, :infinite] = 0.9 * torch.finfo(way.dtype).max
    arguments["score_m"][2] = 0
    arguments["score_bias_m"][2] = sign * 10
    return arguments


@pytest.mark.parametrize("name", ["float32", "tf32", "float64"])
@ROWS
def test_rows_whose_scores_are_all_infinite(kernels: Kernels, name: str, multiprocessors: int) -> None:
    for positions in (3, 40, 140):
        for sign in (1, -1):
            arguments = _with_infinite_scores(WAYS[name], positions, positions, sign)
            z, _ = forward(kernels, WAYS[name], arguments, multiprocessors)
            assert eager_form(**arguments).isnan().all()
            assert z.isnan().all()


@pytest.mark.parametrize("name", ["float32", "tf32"])
@ROWS
@pytest.mark.parametrize(("positions", "infinite"), [(40, 33), (100, 64), (140, 96)])
def test_columns_whose_scores_are_minus_infinity(
    kernels: Kernels, name: str, multiprocessors: int, positions: int, infinite: int
) -> None:
    """All of the first tiles, so that a maximum of -inf comes before a finite one: they have no weight."""
    arguments = _with_infinite_scores(WAYS[name], positions, infinite, -1)
    z, _ = forward(kernels, WAYS[name], arguments, multiprocessors)
    expected = naive(**cases.map_tensors(Tensor.double, arguments))
    plain_form = tf32_form if WAYS[name].tf32 else eager_form
    assert_accurate([{"z": z}], [{"z": expected}], [{"z": plain_form(**arguments)}])
