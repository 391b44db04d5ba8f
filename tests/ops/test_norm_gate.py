"""`norm_gate`: its activations and its scale, and what it does not keep."""

import cases
import pytest
import torch
from checks import assert_accurate

import fastsam


@pytest.mark.parametrize("scale", [0.0, 1, -2.5])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "identity"])
def test_activations_and_scales(backend_name, activation, scale):
    assert_accurate("norm_gate", cases.norm_gate(activation=activation, scale=scale, norm="channel"))


def test_defaults(backend_name):
    """A plain sigmoid gate."""
    arguments = cases.norm_gate()
    expected = arguments["x"].sigmoid() * arguments["y"]
    torch.testing.assert_close(fastsam.ops.norm_gate(**arguments), expected)


def test_the_normalised_map_is_not_kept(native_backend):
    """One output and nothing else of its size but what autograd saves, the two arguments."""
    arguments = cases.map_tensors(lambda tensor: tensor.requires_grad_(), cases.norm_gate(norm="position"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fastsam.ops.norm_gate(arguments["x"], arguments["y"], norm=tuple(list(arguments.values())[2:]))
    maps = [tensor for tensor in saved if tensor.ndim == 4]
    assert [tensor.data_ptr() for tensor in maps] == [arguments[name].data_ptr() for name in ("x", "y")]


def test_a_map_of_one_number(backend_name):
    """It is its own mean, so that its norm is the bias."""
    x, y, weight, bias = torch.tensor([[5.0], [3.0], [2.0], [0.25]], dtype=torch.float64).unbind()
    actual = fastsam.ops.norm_gate(x.view(1, 1, 1, 1), y.view(1, 1, 1, 1), "identity", norm=(weight, bias), scale=2.0)
    assert actual.item() == 2.0 * 0.25 * 3.0
