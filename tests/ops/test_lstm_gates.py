"""`lstm_gates` against the naive float64 form."""

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate

import fastsam

SIZES = [(1, 1), (3, 5), (4, 4), (1, 17), (47, 1), (6, 8), (7, 7), (7, 9), (8, 8), (5, 13), (97, 1)]
CHANNELS = [1, 3, 8, 13, 64, 65]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("size", "channels"), [(size, CHANNELS[i % 6]) for i, size in enumerate(SIZES)])
def test_shapes(backend_name, poison, size, channels, dtype):
    options = {"channels": channels, "size": size, "dtype": dtype}
    draws = [cases.lstm_gates(seed=seed, **options) for seed in seeds(dtype, channels)]
    assert_accurate("lstm_gates", draws)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_model_sized(backend_name, poison, three_threads, dtype):
    assert_accurate("lstm_gates", cases.lstm_gates(3, 64, (16, 16), dtype=dtype))


@pytest.mark.parametrize("forget_bias", [0.0, 1, -2.5])
def test_forget_bias(backend_name, forget_bias):
    assert_accurate("lstm_gates", cases.lstm_gates(forget_bias=forget_bias))


def test_forget_bias_is_zero_by_default(backend_name):
    arguments = cases.lstm_gates(forget_bias=0.0)
    default = fastsam.ops.lstm_gates(arguments["gates"], arguments["c"])
    for left, right in zip(default, fastsam.ops.lstm_gates(**arguments), strict=True):
        assert torch.equal(left, right)


def test_saturated_gates(backend_name):
    """Gates of +-1e3: remembers, forgets, writes and hides exactly, and its gradients are finite."""
    arguments = cases.lstm_gates(forget_bias=0.0)
    gates = (1000 * arguments["gates"].sign()).requires_grad_()
    h, c_new = fastsam.ops.lstm_gates(gates, arguments["c"])
    i, f, g, o = gates.detach().sign().chunk(4, dim=1)
    expected = (f > 0) * arguments["c"] + (i > 0) * g
    torch.testing.assert_close(c_new, expected)
    torch.testing.assert_close(h, (o > 0) * expected.tanh())
    (h.sum() + c_new.sum()).backward()
    assert gates.grad.isfinite().all()


@pytest.mark.parametrize("output", [0, 1], ids=["h", "c_new"])
def test_gradient_from_one_output_only(backend_name, output):
    """The other output's gradient is absent, not zero-filled by the caller."""
    arguments = cases.lstm_gates()
    gradients = []
    for function in (fastsam.ops.lstm_gates, cases.naive("lstm_gates")):
        leaves = [arguments[name].clone().requires_grad_() for name in ("gates", "c")]
        gradients.append(torch.autograd.grad(function(*leaves, 0.75)[output].square().sum(), leaves))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
