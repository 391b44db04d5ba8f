"""What only `lstm_gates` has: the forget bias, and gates that saturate."""

import cases
import pytest
import torch
from checks import assert_accurate

import fastsam


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
