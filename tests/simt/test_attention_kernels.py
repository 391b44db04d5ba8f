"""The CUDA kernels of the attention operators, executed on the host, against the naive float64 form."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
from accuracy import Results, assert_accurate
from attention_calls import (
    MAIN_WAYS,
    MANY,
    WAYS,
    backward,
    dz_of,
    eager_form,
    exact,
    forward,
    gradients_of,
    make,
    naive,
    plain,
    plan_backward,
    plan_forward,
    run,
    sizes,
    sources_of,
    tf32_form,
)
from call_fields import Way
from cases import Arguments
from kernel_build import Kernels
from torch import Tensor

from fastsam.ops._attention import eager

DOUBLE, SELF = "double_attention", "self_attention"

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "projected": (DOUBLE, {"batch": 2, "channels": 20, "size": (5, 9), "out": 13, "keys": 12}),
    "folded": (DOUBLE, {"batch": 2, "channels": 20, "size": (5, 9), "out": 12}),
    "vectors": (SELF, {"batch": 2, "channels": 12, "size": (8, 9), "out": 13}),
    "one_position": (SELF, {"batch": 3, "channels": 5, "size": (1, 1), "keys": 2}),
    "one_channel": (DOUBLE, {"batch": 1, "channels": 1, "size": (3, 7)}),
    "prime": (DOUBLE, {"batch": 1, "channels": 9, "size": (1, 67), "out": 7}),
    "sampled_mean": (DOUBLE, {"batch": 1, "channels": 9, "size": (10, 14), "out": 4, "keys": 8}),
    "many_keys": (SELF, {"batch": 1, "channels": 12, "size": (4, 5), "keys": 70}),
    "many_value_channels": (SELF, {"batch": 1, "channels": 6, "size": (5, 5), "out": 200}),
    "group_of_128": (SELF, {"batch": 1, "channels": 70, "size": (5, 8), "out": 20, "keys": 9}),
    "group_of_128_folded": (SELF, {"batch": 1, "channels": 128, "size": (3, 7), "out": 9}),
    "two_groups": (SELF, {"batch": 1, "channels": 130, "size": (5, 7), "out": 12, "keys": 12}),
}
"""Operators, and sizes for cases.double_attention."""


def draws_of(shape: str, way: Way, least: int = 16, **options: Any) -> list[Arguments]:
    """So many that the gradient of the score bias, which is the smallest, has at least so many numbers in all."""
    operator, of_shape = SHAPES[shape]
    numbers = of_shape.get("keys", of_shape["channels"])
    count = 1 if way.dtype == torch.float64 else max(2, math.ceil(least / numbers))
    return [make(operator, way, seed, **{**of_shape, **options}) for seed in range(count)]


def check(kernels: Kernels, way: Way, draws: Sequence[Arguments], multiprocessors: int = 1) -> None:
    """Run the kernels and compare with the naive form in float64, and with the eager one in the same precision."""
    pairs = [(arguments, dz_of(arguments)) for arguments in draws]
    limits = None if way.dtype == torch.float64 else [plain(way, *pair) for pair in pairs]
    actual = [run(kernels, way, *pair, multiprocessors) for pair in pairs]
    assert_accurate(actual, [exact(*pair) for pair in pairs], limits)


@pytest.fixture(scope="module")
def built(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("attention.cu")


@pytest.fixture
def kernels(built: Kernels, seed: int | None) -> Kernels:
    """In three orders of threads and blocks."""
    built.schedule(seed)
    return built


@pytest.fixture
def usual(built: Kernels) -> Kernels:
    built.schedule(None)
    return built


EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
MAIN = pytest.mark.parametrize("way", [WAYS[name] for name in MAIN_WAYS], ids=MAIN_WAYS)
ROWS = pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["64_rows", "16_rows"])


@EVERY_WAY
@pytest.mark.parametrize(
    ("shape", "multiprocessors"), [("projected", 1), ("folded", MANY)], ids=["projected-64_rows", "folded-16_rows"]
)
def test_in_any_order(kernels: Kernels, way: Way, shape: str, multiprocessors: int) -> None:
    check(kernels, way, draws_of(shape, way)[:1], multiprocessors)


@MAIN
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(usual: Kernels, way: Way, shape: str) -> None:
    check(usual, way, draws_of(shape, way))


@MAIN
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "two_groups"])
def test_small_tiles_of_queries(usual: Kernels, way: Way, shape: str) -> None:
    """On cards of many multiprocessors; two groups of channels have them everywhere, and so has the backward pass."""
    draws = draws_of(shape, way)
    actual = [{"z": forward(usual, way, arguments, MANY, save=False)[0]} for arguments in draws]
    plain_form = tf32_form if way.tf32 else eager_form
    limits = None if way.dtype == torch.float64 else [{"z": plain_form(**arguments)} for arguments in draws]
    assert_accurate(
        actual, [{"z": naive(**cases.map_tensors(Tensor.double, arguments))} for arguments in draws], limits
    )


@MAIN
def test_groups_of_channels_without_a_key_map(usual: Kernels, way: Way) -> None:
    """More than 128 channels, which not every card has the shared memory for."""
    with_memory = way._replace(capability=max(way.capability, 80))
    operator, of_shape = SHAPES["two_groups"]
    check(usual, with_memory, [make(operator, with_memory, seed, **{**of_shape, "keys": None}) for seed in range(2)])


@pytest.mark.parametrize(
    ("name", "channels", "keys"),
    [
        *(("float32", 128, None), ("tf32", 192, None), ("half_8", 192, None), ("half_16", 256, None)),
        *(("bfloat16_fma", 144, None), ("bfloat16", 256, None)),
        *(("float32", 128, 12), ("tf32", 192, 12), ("half_8", 192, 12), ("half_16", 192, 192)),
        *(("bfloat16_fma", 144, 12), ("bfloat16", 192, 192)),
    ],
)
def test_backward_with_small_tiles(usual: Kernels, name: str, channels: int, keys: int | None) -> None:
    """Which it has where large ones do not fit."""
    way = WAYS[name]
    assert plan_backward(usual, way, sizes(1, channels, 9, 21, [keys]), 1).rows == 16
    options = {"batch": 1, "channels": channels, "size": (3, 7), "out": 9, "keys": keys, "largest": 3.0}
    _check_backward(usual, way, [make(SELF, way, seed, **options) for seed in range(2)])


@pytest.mark.parametrize(
    ("name", "channels", "keys", "takes_turns"),
    [
        *(("float32", 97, 97, 1), ("float32", 128, 128, 1), ("half_fma", 128, 70, 0), ("bfloat16_fma", 128, 128, 0)),
        *(("tf32", 100, 97, 0), ("half_8", 112, 100, 0), ("float64_61", 40, 33, 0), ("float64_61", 64, 64, 1)),
    ],
)
@pytest.mark.parametrize("operator", [SELF, DOUBLE])
def test_keys_in_parts(usual: Kernels, operator: str, name: str, channels: int, keys: int, takes_turns: int) -> None:
    """Where the weights of all keys have no room; on some cards with the operands of rows in turn, backward."""
    way = {**WAYS, "float64_61": Way(torch.float64, 61)}[name]
    inputs = sizes(1, channels, 9, 35, [keys])
    assert plan_forward(usual, way, inputs, 1).keys_at_once == 16
    assert plan_backward(usual, way, inputs, 1).rows_take_turns == takes_turns
    options = {"batch": 1, "channels": channels, "size": (5, 7), "out": 9, "keys": keys, "largest": 3.0}
    check(usual, way, [make(operator, way, seed, **options) for seed in range(1 if operator == DOUBLE else 2)])


def _mixed(way: Way, seed: int) -> Arguments:
    """A source with a key map and one without, whose queries have other numbers of channels."""
    first, second = (make(DOUBLE, way, seed, channels=12, size=(5, 7), keys=keys) for keys in (20, None))
    memory = {name: second[name] for name in ("m", "score_m", "score_bias_m", "value_m")}
    return {name: value for name, value in {**first, **memory}.items() if name != "key_m"}


@MAIN
def test_sources_of_two_kinds(usual: Kernels, way: Way) -> None:
    check(usual, way, [_mixed(way, seed) for seed in range(3)])


@MAIN
@pytest.mark.parametrize("shape", ["projected", "folded"])
def test_maps_with_a_mean(usual: Kernels, way: Way, shape: str) -> None:
    """Maps far from 0 for their spread, as images are: terms of the size of the mean cancel in the gradients."""
    check(usual, way, draws_of(shape, way, mean=10.0, largest=3.0))


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_maps_with_a_sampled_mean(usual: Kernels, name: str) -> None:
    """What the sample leaves of the mean makes errors of few numbers chance: as many as in the operators' own tests."""
    way = WAYS[name]
    check(usual, way, draws_of("sampled_mean", way, least=128, mean=10.0, largest=3.0))


# Contexts.


@MAIN
@pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["64_rows", "16_rows"])
def test_contexts_are_not_needed(usual: Kernels, way: Way, multiprocessors: int) -> None:
    (arguments, *_) = draws_of("projected", way)
    z, contexts = forward(usual, way, arguments, multiprocessors)
    alone, none = forward(usual, way, arguments, multiprocessors, save=False)
    assert len(contexts) == 2 and not none
    assert torch.equal(z, alone)


@MAIN
@pytest.mark.parametrize("shape", ["projected", "folded"])
def test_contexts_of_eager(usual: Kernels, way: Way, shape: str) -> None:
    _check_backward(usual, way, draws_of(shape, way, mean=3.0, largest=3.0))


@MAIN
@pytest.mark.parametrize("shape", ["projected", "folded"])
def test_contexts_for_eager(usual: Kernels, way: Way, shape: str) -> None:
    draws = draws_of(shape, way, mean=3.0, largest=3.0)
    actual = []
    for arguments in draws:
        _, contexts = forward(usual, way, arguments)
        actual.append(gradients_of(arguments, *eager.backward(dz_of(arguments), sources_of(arguments), contexts)))
    _assert_accurate_gradients(way, draws, actual)


def _check_backward(kernels: Kernels, way: Way, draws: Sequence[Arguments]) -> None:
    """The backward pass alone, with contexts of the eager forward pass."""
    actual = []
    for arguments in draws:
        _, contexts = eager.forward(sources_of(arguments), arguments["value_bias"], save=True)
        actual.append(backward(kernels, way, arguments, dz_of(arguments), contexts))
    _assert_accurate_gradients(way, draws, actual)


def _assert_accurate_gradients(way: Way, draws: Sequence[Arguments], actual: Sequence[Results]) -> None:
    def gradients(results: Results) -> Results:
        return {name: value for name, value in results.items() if name != "z"}

    limits = [plain(way, arguments, dz_of(arguments)) for arguments in draws]
    assert_accurate(
        actual,
        [gradients(exact(arguments, dz_of(arguments))) for arguments in draws],
        None if way.dtype == torch.float64 else [gradients(limit) for limit in limits],
    )


@MAIN
@pytest.mark.parametrize("multiprocessors", [1, MANY], ids=["64_rows", "16_rows"])
def test_the_same_bits_in_every_order(built: Kernels, way: Way, multiprocessors: int) -> None:
    arguments = make(DOUBLE, way, batch=2, channels=9, size=(5, 8), keys=3)
    results = []
    for seed in (None, 0, 1):
        built.schedule(seed)
        results.append(run(built, way, arguments, dz_of(arguments), multiprocessors))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name
