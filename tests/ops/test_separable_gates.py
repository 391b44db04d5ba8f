"""`separable_gates` against the naive float64 form: kernels, maps smaller than the kernel, optional arguments."""

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate

import fastsam

SIZES = [(1, 1), (1, 2), (2, 3), (4, 4), (1, 17), (47, 1), (7, 7), (8, 8), (5, 13), (3, 33)]
KERNELS = [None, 1, 3, 5, 7]
CHANNELS = [1, 3, 8, 13, 16, 17]
AGGREGATED = [None, 1, 8, 5, 17, 13]

# Every size with every kernel (maps smaller than the kernel among them), the other dimensions in turn.
SHAPES = [
    (size, kernel, CHANNELS[(3 * index + place) % 6], AGGREGATED[(index + 2 * place) % 6], (index + place) % 3 > 0)
    for index, size in enumerate(SIZES)
    for place, kernel in enumerate(KERNELS)
] + [((6, 5), kernel, 64, z, True) for kernel in (None, 5) for z in (None, 64, 65)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("size", "kernel", "channels", "z", "bias"), SHAPES)
def test_shapes(backend_name, poison, size, kernel, channels, z, bias, dtype):
    options = {"channels": channels, "size": size, "z": z, "kernel": kernel, "bias": bias, "dtype": dtype}
    draws = [cases.separable_gates(seed=seed, **options) for seed in seeds(dtype, channels)]
    assert_accurate("separable_gates", draws)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_model_sized(backend_name, poison, three_threads, dtype):
    arguments = cases.separable_gates(3, 64, (16, 16), z=64, kernel=5, dtype=dtype)
    assert_accurate("separable_gates", arguments)


def test_closed_gates(backend_name):
    """Saturated biases: the input gate keeps or replaces the memory, the output gate hides or shows it."""
    arguments = cases.separable_gates(2, 3, (4, 5), z=None)
    closed = torch.full((3,), -1e4, dtype=torch.float64)
    for bias, memory in (([closed, closed, -closed], arguments["m"]), ([-closed, closed, -closed], None)):
        h_hat, m_new = fastsam.ops.separable_gates(**{**arguments, "bias": torch.cat(bias)})
        torch.testing.assert_close(m_new, -torch.ones_like(m_new) if memory is None else memory)
        torch.testing.assert_close(h_hat, m_new)
    hidden, _ = fastsam.ops.separable_gates(**{**arguments, "bias": torch.cat([closed, closed, closed])})
    assert not hidden.any()


@pytest.mark.parametrize("output", ["h_hat", "m_new"])
def test_gradient_from_one_output_only(backend_name, output):
    """The other output's gradient is absent, not zero-filled by the caller."""
    arguments = cases.separable_gates()
    names = [name for name, value in arguments.items() if value is not None]
    gradients = []
    for function in (fastsam.ops.separable_gates, cases.naive("separable_gates")):
        leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
        h_hat, m_new = function(**leaves)
        loss = (h_hat if output == "h_hat" else m_new).square().sum()
        gradients.append(torch.autograd.grad(loss, [leaves[name] for name in names]))
    for name, actual, expected in zip(names, *gradients, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda message, name=name: f"{name}: {message}")
