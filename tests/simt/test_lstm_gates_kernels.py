"""The CUDA kernels of `lstm_gates`, executed on the host, against the naive float64 form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import oracle
import pytest
import torch
from accuracy import Results, assert_accurate
from call_fields import addresses, casts, map_fields
from kernel_build import Kernels
from torch import Tensor

from fastsam.ops.lstm_gates import native
from fastsam.ops.lstm_gates._term import Term, new_statistics

UNIT = "lstm_gates.cu"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EPS = 1e-5


@dataclass(frozen=True)
class Draw:
    """The arguments of one call. x: one or two maps (B, 4C, H, W); norms: their weights and biases, or None."""

    x: tuple[Tensor, ...]
    norms: tuple[tuple[Tensor, Tensor] | None, ...]
    c: Tensor
    dh: Tensor
    dc_new: Tensor
    forget_bias: float = 0.5

    def map(self, function: Callable[[Tensor], Tensor]) -> "Draw":
        """The same call with every tensor changed."""
        norms = tuple(None if norm is None else (function(norm[0]), function(norm[1])) for norm in self.norms)
        maps = [function(tensor) for tensor in (self.c, self.dh, self.dc_new)]
        return Draw(tuple(map(function, self.x)), norms, *maps, self.forget_bias)


def draw(norms: str, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Draw:
    """Random arguments. A letter of `norms` a term: "-" no norm, "c" a weight a channel, "p" a weight a position."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    weights = {"c": (4 * channels,), "p": (4 * channels, height, width)}
    pairs = tuple(None if n == "-" else (1 + random(*weights[n]) / 4, random(*weights[n]) / 4) for n in norms)
    x = tuple(2 * random(batch, 4 * channels, height, width) + 0.3 for _ in norms)
    return Draw(x, pairs, *(random(*shape) for _ in range(3)))


def plain(call: Draw, dtype: torch.dtype) -> Results:
    """The results of the naive form in `dtype`."""
    call = call.map(lambda tensor: tensor.to(dtype).requires_grad_())
    leaves = {f"gradient of x[{i}]": x for i, x in enumerate(call.x)} | {"gradient of c": call.c}
    for i, norm in enumerate(call.norms):
        if norm is not None:
            leaves |= {f"gradient of weight[{i}]": norm[0], f"gradient of bias[{i}]": norm[1]}
    second: dict[str, Any] = {"recurrent": call.x[1], "recurrent_norm": call.norms[1]} if len(call.x) > 1 else {}
    outputs = oracle.lstm_gates(call.x[0], call.c, call.forget_bias, norm=call.norms[0], eps=EPS, **second)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [call.dh, call.dc_new])
    named = dict(zip(leaves, gradients, strict=True))
    return {"h": outputs[0].detach(), "c_new": outputs[1].detach(), **named}


def run(kernels: Kernels, call: Draw, multiprocessors: int = 2) -> Results:
    """The results of the kernels, forward and backward, on a card with so many multiprocessors."""
    dtype = call.c.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    norms = [None if n is None else tuple(tensor.contiguous() for tensor in n) for n in call.norms]
    empty = [torch.full_like(call.c, torch.nan, memory_format=torch.contiguous_format) for _ in range(3)]
    h, c_new, dc = empty
    batch, channels, height, width = call.c.shape
    statistics = [None if n is None else torch.full((batch, 2), torch.nan, dtype=wide) for n in norms]
    dx = [torch.full(x.shape, torch.nan, dtype=dtype) for x in call.x]
    dnorms = [None if n is None else tuple(torch.full_like(tensor, torch.nan) for tensor in n) for n in norms]
    workspace = torch.full((1 << 16,), torch.nan, dtype=torch.float64)
    space = (workspace, workspace.nbytes, multiprocessors)

    has_positions = any(norm is not None and norm[0].ndim == 3 for norm in norms)
    inputs = [batch, channels, height * width, int(has_positions)]
    for x, norm in zip(call.x, norms, strict=True):
        inputs += [*map_fields(x), *addresses(norm or (None, None))]
    inputs += [*[0] * 5 * (2 - len(call.x)), *map_fields(call.c)]
    kept = [*addresses(statistics), *[0] * (2 - len(statistics))]
    fields = numpy.array([*inputs, *addresses([h, c_new]), *kept])
    getattr(kernels, f"forward_{str(dtype)[6:]}")(fields, call.forget_bias, EPS, *space)

    fields_backward = [*inputs, *map_fields(call.dh), *map_fields(call.dc_new), *kept]
    for of_x, of_norm in zip(dx, dnorms, strict=True):
        fields_backward += [*addresses([of_x, *(of_norm or (None, None))])]
    fields_backward += [*[0] * 3 * (2 - len(dx)), *addresses([dc])]
    getattr(kernels, f"backward_{str(dtype)[6:]}")(numpy.array(fields_backward), call.forget_bias, *space)

    results = {"h": h, "c_new": c_new, **{f"gradient of x[{i}]": value for i, value in enumerate(dx)}}
    results["gradient of c"] = dc
    for i, of_norm in enumerate(dnorms):
        if of_norm is not None:
            results |= {f"gradient of weight[{i}]": of_norm[0], f"gradient of bias[{i}]": of_norm[1]}
    return {name: value.to(dtype) for name, value in results.items()}


def check(kernels: Kernels, draws: Sequence[Draw], multiprocessors: int = 2) -> None:
    """Run the calls and compare with the naive form, in float64 and in their own dtype."""
    dtype = draws[0].c.dtype
    limits = None if dtype == torch.float64 else [plain(call, dtype) for call in draws]
    exact = [plain(call, torch.float64) for call in draws]
    assert_accurate([run(kernels, call, multiprocessors) for call in draws], exact, limits)


NORMS = ["-", "--", "c", "c-", "-c", "cc", "p", "-p", "pp"]


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 4, 4)], ids=str)
def test_every_combination_of_norms(kernels: Kernels, norms: str, shape: tuple[int, int, int, int]) -> None:
    check(kernels, [draw(norms, shape, seed=seed) for seed in range(2)])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (2, 2, 4, 8)], ids=str)
def test_every_dtype(usual: Kernels, norms: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(usual, [draw(norms, shape, dtype, seed) for seed in range(4)])


@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 13), (1, 17, 1, 1), (2, 33, 2, 2)], ids=str)
def test_small_and_odd_shapes(usual: Kernels, norms: str, shape: tuple[int, int, int, int]) -> None:
    check(usual, [draw(norms, shape, seed=seed) for seed in range(8)])


@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
@pytest.mark.parametrize("shape", [(1, 2, 16, 24), (1, 2, 17, 19)], ids=str)
def test_channels_of_several_chunks(kernels: Kernels, norms: str, shape: tuple[int, int, int, int]) -> None:
    """A large card gets more blocks, and more parts whose sums and moments are to be joined."""
    check(kernels, [draw(norms, shape)], multiprocessors=100)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("norms", ["cc", "pp"])
@pytest.mark.parametrize("shape", [(70, 1, 1, 3), (65, 1, 2, 4)], ids=str)
def test_more_samples_than_corrections_at_a_time(
    kernels: Kernels, norms: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check(kernels, [draw(norms, shape, dtype, seed) for seed in range(2)])


@pytest.mark.parametrize("offset", [30.0, -1000.0])
@pytest.mark.parametrize("norms", ["cc", "pp"])
def test_means_far_from_zero(usual: Kernels, norms: str, offset: float) -> None:
    draws = [draw(norms, (2, 4, 9, 7), seed=seed) for seed in range(8)]
    check(usual, [replace(call, x=tuple(x + offset for x in call.x)) for call in draws])


def test_a_mean_whose_square_is_infinite(usual: Kernels) -> None:
    """Threads that have seen no number must not be taken for a part with the mean 0."""
    draws = [draw("c", (1, 1, 3, 3), seed=seed) for seed in range(8)]
    check(usual, [replace(call, x=(1e18 * call.x[0] + 3e19,)) for call in draws])


def spaced(x: Tensor, channel_gap: int, batch_gap: int) -> Tensor:
    """The same map with unused numbers after each channel and each sample."""
    batch, channels, height, width = x.shape
    stride = height * width + channel_gap
    strides = (channels * stride + batch_gap, stride, width, 1)
    storage = torch.full((batch * strides[0],), torch.nan, dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("gaps", [(4, 0), (1, 0), (0, 4), (0, 1)], ids=str)
@pytest.mark.parametrize("name", ["x", "c", "dh"])
@pytest.mark.parametrize("norms", ["-", "c", "p"])
def test_strided_maps(usual: Kernels, norms: str, name: str, gaps: tuple[int, int]) -> None:
    """Strides that are multiples of a vector and such that are not, one map at a time."""
    call = draw(norms, (2, 3, 4, 4))
    value = spaced(call.x[0] if name == "x" else getattr(call, name), *gaps)
    check(usual, [replace(call, **{name: (value,) if name == "x" else value})])


@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
def test_expanded_maps(usual: Kernels, norms: str) -> None:
    call = draw(norms, (2, 3, 2, 6))
    changed = {"c": call.c[:, :1].expand_as(call.c), "dc_new": call.dc_new[:1].expand_as(call.c)}
    check(usual, [replace(call, **changed)])


@pytest.mark.parametrize("name", ["x", "c", "dh"])
@pytest.mark.parametrize("norms", ["-", "p"])
def test_addresses_that_are_not_aligned_for_vectors(usual: Kernels, norms: str, name: str) -> None:
    call = draw(norms, (1, 2, 4, 4))
    value = call.x[0] if name == "x" else getattr(call, name)
    shifted = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    check(usual, [replace(call, **{name: (shifted,) if name == "x" else shifted})])


@pytest.mark.parametrize("norms", ["-", "cc", "pp"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values_spread_as_in_the_naive_form(usual: Kernels, norms: str, value: float) -> None:
    call = draw(norms, (2, 2, 3, 3))
    for row in range(0, 8, 2):
        x = call.x[0].clone()
        x[0, row, 1, 1] = value
        special = replace(call, x=(x, *call.x[1:]))
        mine, naive = run(usual, special), plain(special, torch.float32)
        for name in ("h", "c_new"):
            torch.testing.assert_close(mine[name], naive[name], equal_nan=True)
        for name, gradient in naive.items():
            assert torch.equal(mine[name].isnan(), gradient.isnan()), name


def test_saturated_gates(usual: Kernels) -> None:
    call = draw("--", (2, 2, 4, 4))
    check(usual, [replace(call, x=tuple(1000 * x for x in call.x))])


@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
def test_no_samples(usual: Kernels, norms: str) -> None:
    results = run(usual, draw(norms, (0, 2, 3, 3)))
    for name, value in results.items():
        assert (value == 0).all(), name  # of the weights: the sum over nothing


@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
def test_the_same_bits_in_every_order(built: Kernels, norms: str) -> None:
    call = draw(norms, (3, 3, 4, 9))
    built.schedule(None)
    usual = run(built, call, multiprocessors=20)
    for seed in range(2):
        built.schedule(seed)
        shuffled = run(built, call, multiprocessors=20)
        for name, value in usual.items():
            assert torch.equal(shuffled[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norms", ["c-", "pp"])
def test_a_gpu_gets_weights_as_they_are(monkeypatch: pytest.MonkeyPatch, norms: str, dtype: torch.dtype) -> None:
    """Without casts, which would be launches of their own. meta stands for a GPU."""
    calls: list[str] = []
    monkeypatch.setattr(native, "run", lambda name, like, fields: calls.append(name))
    call = draw(norms, (2, 3, 4, 4), dtype).map(lambda tensor: tensor.to("meta"))
    terms = [Term(x, *(norm or (None, None))) for x, norm in zip(call.x, call.norms, strict=True)]
    statistics = new_statistics(call.c, sum(norm is not None for norm in call.norms))
    assert casts(lambda: native.forward(terms, call.c, 0.5, EPS)) == 0
    assert casts(lambda: native.backward(call.dh, call.dc_new, terms, call.c, 0.5, statistics)) == 0
    gradients, dc = native.backward(call.dh, call.dc_new, terms, call.c, 0.5, statistics)
    assert {tensor.dtype for of_term in gradients for tensor in [*of_term, dc] if tensor is not None} == {dtype}
    assert calls == ["lstm_gates_forward", *["lstm_gates_backward"] * 2]
