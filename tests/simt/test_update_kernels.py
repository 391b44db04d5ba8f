"""The CUDA kernels of `memory_gates` and `norm_gate`, and those of `lstm_gates` with a norm after them.

Executed on the host, against the naive float64 form, as those of test_lstm_gates_kernels.py are.
"""

from dataclasses import replace

import pytest
import torch
from gate_calls import DTYPES, LSTM, Draw, check, draw, plain, run, spaced
from kernel_build import Kernels

from fastsam.ops._gates.update import Update

UNIT = "lstm_gates.cu"
MEMORY, MEMORY_GATE = Update("memory", "hidden"), Update("memory", "gate")
IDENTITY, TANH = Update("product", "identity"), Update("product", "tanh", 1.0)
SIGMOID = Update("product", "sigmoid", 2.0, keeps_state=False)
UPDATES = [
    LSTM._replace(form="gate"),
    MEMORY,
    MEMORY_GATE,
    IDENTITY._replace(constant=1.5),
    TANH,
    SIGMOID._replace(keeps_state=True),
    IDENTITY._replace(constant=-1.5, keeps_state=False),
    TANH._replace(keeps_state=False),
    SIGMOID,
]


def name_of(update: Update) -> str:
    return f"{update.kind}-{update.form}{'' if update.keeps_state else '-alone'}"


each_update = pytest.mark.parametrize("update", UPDATES, ids=name_of)
one_of_each_kind = pytest.mark.parametrize("update", [MEMORY, TANH, SIGMOID], ids=name_of)


@each_update
@pytest.mark.parametrize("norms", ["-", "--", "c", "-c", "cc", "p", "p-", "pp"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 4, 4)], ids=str)
def test_every_combination_of_norms(
    usual: Kernels, norms: str, shape: tuple[int, int, int, int], update: Update
) -> None:
    check(usual, [draw(norms, shape, seed=seed, update=update) for seed in range(3)])


@each_update
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("norms", ["--", "c", "pp"])
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (2, 2, 4, 8)], ids=str)
def test_every_dtype(
    usual: Kernels, norms: str, shape: tuple[int, int, int, int], dtype: torch.dtype, update: Update
) -> None:
    check(usual, [draw(norms, shape, dtype, seed, update) for seed in range(4)])


@each_update
@pytest.mark.parametrize("norms", ["-", "cc", "p"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 1, 1, 13), (1, 17, 1, 1)], ids=str)
def test_small_and_odd_shapes(usual: Kernels, norms: str, shape: tuple[int, int, int, int], update: Update) -> None:
    check(usual, [draw(norms, shape, seed=seed, update=update) for seed in range(12)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("norms", ["c", "p"])
@pytest.mark.parametrize("update", [TANH, SIGMOID], ids=name_of)
def test_a_sample_of_one_number_is_its_own_mean(usual: Kernels, norms: str, dtype: torch.dtype, update: Update) -> None:
    """So its gradient is 0 but for what float32 loses, however much 1 / sqrt(eps) makes of a rounding to 16 bits."""
    gradient = run(usual, draw(norms, (40, 1, 1, 1), dtype, update=update))["gradient of x[0]"]
    assert gradient.abs().max() < 1e-4


@one_of_each_kind
@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
@pytest.mark.parametrize("shape", [(1, 2, 16, 24), (1, 2, 17, 19)], ids=str)
def test_channels_of_several_chunks(
    kernels: Kernels, norms: str, shape: tuple[int, int, int, int], update: Update
) -> None:
    check(kernels, [draw(norms, shape, update=update)], multiprocessors=100)


@one_of_each_kind
@pytest.mark.parametrize("norms", ["cc", "pp"])
@pytest.mark.parametrize("shape", [(70, 1, 1, 3), (65, 1, 2, 4)], ids=str)
def test_more_samples_than_corrections_at_a_time(
    usual: Kernels, norms: str, shape: tuple[int, int, int, int], update: Update
) -> None:
    check(usual, [draw(norms, shape, seed=seed, update=update) for seed in range(2)])


@one_of_each_kind
@pytest.mark.parametrize("gaps", [(4, 0), (1, 0), (0, 4), (0, 1)], ids=str)
@pytest.mark.parametrize("name", ["x", "c", "dh", "dc_new"])
@pytest.mark.parametrize("norms", ["-", "c", "p"])
def test_strided_maps(usual: Kernels, norms: str, name: str, gaps: tuple[int, int], update: Update) -> None:
    """Strides that are multiples of a vector and such that are not, one map at a time."""
    call = draw(norms, (2, 3, 4, 4), update=update._replace(keeps_state=update.keeps_state or name == "dc_new"))
    value = spaced(call.x[0] if name == "x" else getattr(call, name), *gaps)
    check(usual, [replace(call, **{name: (value,) if name == "x" else value})])


def without_state(call: Draw) -> Draw:
    return replace(call, update=call.update._replace(keeps_state=False), dc_new=None)


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (2, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("norms", ["-", "c", "pp"])
@pytest.mark.parametrize("update", [IDENTITY, TANH, SIGMOID._replace(keeps_state=True)], ids=name_of)
def test_a_state_left_out_is_one_without_gradient(
    usual: Kernels, norms: str, shape: tuple[int, int, int, int], update: Update
) -> None:
    kept = draw(norms, shape, update=update)
    kept = replace(kept, dc_new=torch.zeros_like(kept.c))
    results, alone = run(usual, kept), run(usual, without_state(kept))
    assert set(results) - set(alone) == {"c_new"}
    for name, value in alone.items():
        assert torch.equal(value, results[name]), name


@each_update
@pytest.mark.parametrize("norms", ["-", "cc"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values_spread_as_in_the_naive_form(usual: Kernels, norms: str, value: float, update: Update) -> None:
    call = draw(norms, (2, 2, 3, 3), update=update)
    for row in range(0, call.x[0].shape[1], 2):
        x = call.x[0].clone()
        x[0, row, 1, 1] = value
        special = replace(call, x=(x, *call.x[1:]))
        mine, naive = run(usual, special), plain(special, torch.float32)
        torch.testing.assert_close(mine["h"], naive["h"], equal_nan=True)
        for name, expected in naive.items():
            assert torch.equal(mine[name].isnan(), expected.isnan()), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("update", [LSTM._replace(form="gate"), MEMORY_GATE], ids=name_of)
def test_gradients_of_the_gate_alone_leave_the_cell_alone(usual: Kernels, value: float, update: Update) -> None:
    call = draw("-", (1, 2, 2, 2), update=update)
    results = run(usual, replace(call, dh=torch.full_like(call.dh, value)))
    *cell, gate = results["gradient of x[0]"].chunk(update.gates, dim=1)
    assert torch.cat([*cell, results["gradient of c"]]).isfinite().all()
    assert not gate.isfinite().any()


@each_update
def test_saturated_gates(usual: Kernels, update: Update) -> None:
    call = draw("--", (2, 2, 4, 4), update=update)
    check(usual, [replace(call, x=tuple(1000 * x for x in call.x))])


@each_update
@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
def test_no_samples(usual: Kernels, norms: str, update: Update) -> None:
    results = run(usual, draw(norms, (0, 2, 3, 3), update=update))
    for name, value in results.items():
        assert (value == 0).all(), name  # of the weights: the sum over nothing


@one_of_each_kind
@pytest.mark.parametrize("norms", ["--", "cc", "pp"])
def test_the_same_bits_in_every_order(built: Kernels, norms: str, update: Update) -> None:
    call = draw(norms, (3, 3, 4, 9), update=update)
    built.schedule(None)
    usual = run(built, call, multiprocessors=20)
    for seed in range(2):
        built.schedule(seed)
        shuffled = run(built, call, multiprocessors=20)
        for name, value in usual.items():
            assert torch.equal(shuffled[name], value), name
