"""Derivatives against finite differences in float64, and what happens to second ones."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "double_attention": ("double_attention", {"channels": 2, "out": 3}),
    "double_attention-keys": ("double_attention", {"channels": 3, "keys": 2}),
    "self_attention": ("self_attention", {"channels": 3, "out": 2}),
    "self_attention-keys": ("self_attention", {"channels": 3, "keys": 2}),
    "separable_gates": ("separable_gates", {"channels": 2, "z": 1}),
    "separable_gates-kernel_5": ("separable_gates", {"channels": 1, "z": 2, "kernel": 5}),
    "separable_gates-no_z-no_bias": ("separable_gates", {"channels": 2, "z": None, "bias": False}),
    "separable_gates-no_depthwise": ("separable_gates", {"channels": 2, "z": 2, "kernel": None}),
    "lstm_gates": ("lstm_gates", {"channels": 2}),
    "lstm_gates-recurrent": ("lstm_gates", {"channels": 1, "recurrent": True}),
    "lstm_gates-norm": ("lstm_gates", {"channels": 2, "norm": "position"}),
    "lstm_gates-recurrent_norm": ("lstm_gates", {"channels": 2, "recurrent_norm": "channel"}),
    "lstm_gates-norms": ("lstm_gates", {"channels": 2, "norm": "channel", "recurrent_norm": "channel"}),
    "lstm_gates-position_norms": ("lstm_gates", {"channels": 1, "norm": "position", "recurrent_norm": "position"}),
    "memory_gates": ("memory_gates", {"channels": 2, "recurrent": True}),
    "memory_gates-norms": ("memory_gates", {"channels": 2, "norm": "channel", "recurrent_norm": "channel"}),
    "memory_gates-position_norm": ("memory_gates", {"channels": 2, "norm": "position"}),
    "norm_gate": ("norm_gate", {"channels": 2, "activation": "tanh"}),
    "norm_gate-norm": ("norm_gate", {"channels": 2, "norm": "channel", "scale": 2.0}),
    "norm_gate-position_norm": ("norm_gate", {"channels": 2, "norm": "position", "activation": "identity"}),
}
STATE_NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm_gates-state_norm": ("lstm_gates", {"channels": 2, "norm": "channel", "state_norm": "channel"}),
    "memory_gates-state_norm": ("memory_gates", {"channels": 2, "recurrent": True, "state_norm": "position"}),
}
PUBLIC = {**SMALL, **STATE_NORMS}


def _positional(
    variant: str, function: Callable[[str], Callable[..., Any]], size: tuple[int, int] = (3, 2)
) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operator as a function of its tensors alone, and those tensors."""
    operator, options = PUBLIC[variant]
    arguments = cases.make(operator, size=size, **options)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    tensors = [arguments[name].requires_grad_() for name in names]

    def call(*values: Tensor) -> Any:
        return function(operator)(**{**arguments, **dict(zip(names, values, strict=True))})

    return call, tensors


@pytest.mark.parametrize("variant", PUBLIC)
def test_gradient(backend_name, variant):
    assert torch.autograd.gradcheck(*_positional(variant, cases.public))


@pytest.mark.parametrize("variant", SMALL)
def test_gradient_of_the_registered_operator(native_backend, variant):
    def differentiable_outputs(operator: str) -> Callable[..., Any]:
        count = len(cases.OUTPUTS[operator])
        return lambda **arguments: cases.outputs_of(cases.registered(operator)(**arguments))[:count]

    assert torch.autograd.gradcheck(*_positional(variant, differentiable_outputs))


@pytest.mark.parametrize("variant", PUBLIC)
def test_gradient_across_tiles(native_backend, variant):
    """More positions than a tile has, where finite differences along random directions have to do."""
    call, tensors = _positional(variant, cases.public, size=(7, 10))
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("variant", PUBLIC)
def test_eager_has_second_derivatives(variant):
    call, tensors = _positional(variant, cases.eager)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("variant", PUBLIC)
def test_eager_has_forward_derivatives(variant):
    call, tensors = _positional(variant, cases.eager)
    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("function", [cases.public, cases.registered], ids=["public", "registered"])
@pytest.mark.parametrize("variant", SMALL)
def test_second_derivatives_of_native_code_are_an_error(native_backend, variant, function):
    """Whichever of the first gradients is differentiated again, and with respect to whatever it depends on."""
    call, tensors = _positional(variant, function)
    targets, first = _first_gradients(SMALL[variant][0], call, tensors)
    call, tensors = _positional(variant, cases.eager)
    eager_targets, eager_first = _first_gradients(SMALL[variant][0], call, tensors)
    for gradient, eager_gradient in zip(first, eager_first, strict=True):
        for target, eager_target in zip(targets, eager_targets, strict=True):
            (second,) = torch.autograd.grad(eager_gradient.sum(), eager_target, retain_graph=True, allow_unused=True)
            message = r"second derivative.*eager" if second is not None and second.any() else None
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.grad(gradient.sum(), target, retain_graph=True)


def _first_gradients(
    operator: str, call: Callable[..., Any], tensors: list[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The first gradients with a graph, and all that they may depend on: arguments and gradients from upstream."""
    outputs = cases.outputs_of(call(*tensors))[: len(cases.OUTPUTS[operator])]
    upstream = [torch.ones_like(output).requires_grad_() for output in outputs]
    return [*tensors, *upstream], torch.autograd.grad(outputs, tensors, upstream, create_graph=True)


@pytest.mark.parametrize("function", [cases.public, cases.registered], ids=["public", "registered"])
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_a_gradient_penalty_on_native_code_is_an_error(native_backend, operator, function):
    """The common use: the norm of a gradient as a part of the loss."""
    call, tensors = _positional(operator, function)
    loss = cases.outputs_of(call(*tensors))[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("function", [cases.public, cases.registered], ids=["public", "registered"])
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_first_derivatives_with_create_graph_are_those_without(native_backend, operator, function):
    call, tensors = _positional(operator, function)
    loss = cases.outputs_of(call(*tensors))[0].square().sum()
    plain = torch.autograd.grad(loss, tensors, retain_graph=True)
    graphed = torch.autograd.grad(loss, tensors, create_graph=True)
    assert all(torch.equal(left, right) for left, right in zip(plain, graphed, strict=True))
