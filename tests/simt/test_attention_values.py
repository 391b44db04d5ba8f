"""The CUDA kernels of the attention operators on the host: where their maps lie in memory, and values at the edges of
what there is.
"""

from collections.abc import Callable, Sequence

import cases
import pytest
import torch
from accuracy import assert_accurate
from attention_calls import (
    MAIN_WAYS,
    MANY,
    WAYS,
    Way,
    dz_of,
    eager_form,
    evaluate,
    exact,
    forward,
    make,
    naive,
    plain,
    run,
)
from cases import Arguments
from kernel_build import Kernels
from torch import Tensor

DOUBLE, SELF = "double_attention", "self_attention"

MAIN = pytest.mark.parametrize("way", [WAYS[name] for name in MAIN_WAYS], ids=MAIN_WAYS)
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
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
}
"""All but the first and the fifth keep maps whose rows are multiples of 16 bytes from being copied so."""


@pytest.mark.parametrize("name", ["float32", "tf32", "float64", "half_8", "half_16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", ["h", "m", "dz"])
def test_layouts(kernels: Kernels, name: str, layout: str, strided: str) -> None:
    """The bits are those of dense maps."""
    way = WAYS[name]
    arguments = make(DOUBLE, way, batch=2, channels=5, size=(3, 8), out=6, keys=4)
    maps = {**arguments, "dz": dz_of(arguments)}
    laid_out = {**maps, strided: LAYOUTS[layout](maps[strided])}
    dense = {key: value.contiguous() for key, value in laid_out.items()}
    actual, expected = (run(kernels, way, each, each.pop("dz")) for each in (laid_out, dense))
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


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


@pytest.mark.parametrize("name", ["float32", "tf32", "float64", "half_16", "bfloat16_fma"])
@ROWS
@pytest.mark.parametrize("operator", [DOUBLE, SELF])
def test_scores_of_a_thousand(kernels: Kernels, name: str, operator: str, multiprocessors: int) -> None:
    """Errors over many draws together: of one draw they hang on the rounding of one or two nearly tied scores."""
    way = WAYS[name]
    count = 1 if way.dtype == torch.float64 else 24
    draws = [make(operator, way, seed, batch=1, channels=16, size=(3, 7), keys=4, largest=1e3) for seed in range(count)]
    upstream = [dz_of(arguments) for arguments in draws]
    pairs = list(zip(draws, upstream, strict=True))
    limits = None if way.dtype == torch.float64 else [plain(way, *pair) for pair in pairs]
    actual = [run(kernels, way, *pair, multiprocessors) for pair in pairs]
    assert_accurate(actual, [exact(*pair) for pair in pairs], limits)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_beyond_the_range_of_exp(kernels: Kernels, sign: float) -> None:
    """All scores of a row shifted by +-1e4, which the softmax must not notice."""
    way = WAYS["float64"]
    arguments = make(SELF, way, batch=2, channels=5, size=(4, 4), out=3)
    arguments["x"][:, 0] = torch.linspace(0.9, 1.1, 16, dtype=torch.float64).view(4, 4)
    arguments["score_bias"][0] = sign * 1e4
    dz = dz_of(arguments)
    assert_accurate([run(kernels, way, arguments, dz)], [exact(arguments, dz)], None)


@MAIN
@pytest.mark.parametrize("keys", [None, 12], ids=["folded", "projected"])
def test_one_key_takes_all_of_the_softmax(kernels: Kernels, way: Way, keys: int | None) -> None:
    """No gradient reaches the scores: each output is a copy of one column."""
    arguments = make(SELF, way, batch=1, channels=12, size=(3, 4), keys=keys)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    identity = torch.eye(12, dtype=way.dtype)
    arguments |= {"x": (30 * basis).to(way.dtype).view(1, 12, 3, 4), "score": identity}
    arguments["score_bias"] = torch.zeros(12, dtype=way.dtype)
    if keys is not None:
        arguments["key"] = identity
    dz = dz_of(arguments)
    actual = run(kernels, way, arguments, dz)
    for name, value in actual.items():
        print(name, value.abs().max())
    assert 0


# Numbers that are not finite.
