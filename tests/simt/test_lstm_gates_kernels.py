"""The CUDA kernels of `lstm_gates`, executed on the host, against the naive float64 form."""

from dataclasses import replace

import pytest
import torch
from call_fields import casts
from gate_calls import DTYPES, EPS, LSTM, check, draw, plain, run, spaced
from kernel_build import Kernels

from fastsam.ops._gates import native
from fastsam.ops._gates.update import Term, new_statistics

UNIT = "lstm_gates.cu"

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
    check(usual, [replace(call, c=call.c[:, :1].expand_as(call.c), dc_new=call.dh[:1].expand_as(call.c))])


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
    assert casts(lambda: native.forward(LSTM, terms, call.c, EPS)) == 0
    assert casts(lambda: native.backward(LSTM, call.dh, call.dc_new, terms, call.c, statistics)) == 0
    gradients, dc = native.backward(LSTM, call.dh, call.dc_new, terms, call.c, statistics)
    assert {tensor.dtype for of_term in gradients for tensor in [*of_term, dc] if tensor is not None} == {dtype}
    assert calls == ["lstm_gates_forward", *["lstm_gates_backward"] * 2]
