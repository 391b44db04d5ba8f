"""Comparing an operator with its reference: outputs and gradients as norm ratios."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import accuracy
import cases
import torch
from cases import Arguments
from torch import Tensor


class Evaluation(NamedTuple):
    """Named outputs, and named gradients of the outputs' weighted sum."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {**self.outputs, **{f"gradient of {name}": value for name, value in self.gradients.items()}}


def upstream_for(outputs: Iterable[Tensor]) -> list[Tensor]:
    """One fixed random gradient for each output."""
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def evaluate(
    operator: str,
    function: Callable[..., Any],
    arguments: Arguments,
    *,
    wanted: Iterable[str] | None = None,
    upstream: Callable[[Tensor], Tensor | None] = lambda gradient: gradient,
) -> Evaluation:
    """Run `function` forward and backward.

    Args:
        wanted: names of the arguments to differentiate; all tensors by default.
        upstream: changes the gradient that comes from above each output (its layout, say).
    """
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    wanted = names if wanted is None else list(wanted)
    leaves = {
        name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    outputs = cases.outputs_of(function(**leaves))
    gradients = torch.autograd.grad(
        outputs, [leaves[name] for name in wanted], [upstream(gradient) for gradient in upstream_for(outputs)]
    )
    names_of_outputs = cases.OUTPUTS[operator]
    assert len(outputs) == len(names_of_outputs)
    return Evaluation(
        {name: output.detach() for name, output in zip(names_of_outputs, outputs, strict=True)},
        dict(zip(wanted, gradients, strict=True)),
    )


def assert_accurate(operator: str, draws: Arguments | Sequence[Arguments], **options: Any) -> None:
    """Check outputs and gradients of the public function against the float64 oracle.

    Args:
        draws: arguments, or several sets of them of one dtype whose errors are taken together.
        options: of `evaluate`.
    """
    draws = [draws] if isinstance(draws, dict) else draws
    actual, exact, plain = [], [], []
    for arguments in draws:
        dtype = next(value.dtype for value in arguments.values() if isinstance(value, Tensor))
        contiguous = cases.map_tensors(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), arguments)
        doubled = cases.map_tensors(Tensor.double, contiguous)
        actual.append(evaluate(operator, cases.public(operator), arguments, **options).tensors())
        assert all(value.dtype == dtype for value in actual[-1].values())
        exact.append(evaluate(operator, cases.naive(operator), doubled, **options).tensors())
        if dtype != torch.float64:
            plain.append(evaluate(operator, cases.naive(operator), contiguous, **options).tensors())
    accuracy.assert_accurate(actual, exact, plain or None)


def same_bits(left: Evaluation, right: Evaluation) -> bool:
    """Whether two evaluations agree bit for bit."""
    first, second = left.tensors(), right.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
