"""Running the variants of a case: what is timed, and the check against eager that comes first."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import TRAINING, Case
from benchmarks.peers import Peer

Results = dict[str, Tensor]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a variant's outputs and gradients may be from eager's: norm of the difference over the norm of the result."""

TF32_TOLERANCE = 2e-2


class Variant:
    """A model in the form of one peer, with its parameters and inputs.

    Args:
        parameters: the values to start from, by name; they are copied.
        inputs: shared by all variants of the case.
    """

    def __init__(
        self, peer: Peer, model: str, case: Case, parameters: Mapping[str, Tensor], inputs: list[Tensor]
    ) -> None:
        self.peer, self.model, self.case, self.inputs = peer, model, case, inputs
        module = peer.module(model, case).to(inputs[0].device, inputs[0].dtype)
        module.load_state_dict({**module.state_dict(), **parameters})
        self.parameters = {name: value for name, value in module.named_parameters() if name in parameters}
        self._optimizer = torch.optim.Adam(self.parameters.values(), lr=1e-3) if case.group == TRAINING else None
        self._module = peer.compiled(module)

    def results(self) -> Results:
        """Outputs, and with a backward pass the gradients of inputs and parameters, computed as they are timed."""
        outputs = self._forward()
        named = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
        if not self.case.backward:
            return named
        wanted = {f"input {index}": value for index, value in enumerate(self.inputs) if value.requires_grad}
        wanted |= self.parameters
        gradients = torch.autograd.grad(outputs, list(wanted.values()), self._upstream(outputs))
        return named | {
            f"gradient of {name}": gradient.clone() for name, gradient in zip(wanted, gradients, strict=True)
        }

    def lap(self) -> None:
        """What is timed: a forward pass, the gradients of all inputs and parameters, or an iteration of training."""
        outputs = self._forward()
        if not self.case.backward:
            return
        if self._optimizer is None:
            leaves = [*(value for value in self.inputs if value.requires_grad), *self.parameters.values()]
            torch.autograd.grad(outputs, leaves, self._upstream(outputs))
            return
        self._optimizer.zero_grad()
        torch.nn.functional.mse_loss(outputs[0], self.inputs[0][:, 1:]).backward()
        self._optimizer.step()

    def _forward(self) -> tuple[Tensor, ...]:
        if self.peer.compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        grad_mode = contextlib.nullcontext() if self.case.backward else torch.no_grad()
        with self.peer.selected(), grad_mode:
            outputs: Any = self._module(*self.inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def _upstream(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """A fixed random gradient for each output, made once."""
        if not hasattr(self, "_gradients"):
            generator = torch.Generator().manual_seed(1)
            self._gradients = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        return self._gradients


def draw_parameters(module: nn.Module) -> Results:
    """Random parameters by name: scores of order one, gates neither open nor closed."""
    generator = torch.Generator().manual_seed(2)
    drawn = {}
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        values = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        if name.endswith(("query.weight", "key.weight")):
            values *= parameter.shape[0] ** -0.25
        drawn[name] = values
    return drawn


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance of `assert_same` for this dtype with the precision of matrix products that is set."""
    reduced = dtype == torch.float32 and torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
    return TF32_TOLERANCE if reduced else TOLERANCES[dtype]


def assert_same(actual: Results, expected: Results, allowed: float, label: str) -> None:
    """Check outputs and gradients against eager's.

    A gradient that vanishes by mathematics (that of a key bias) is rounding in eager: every gradient is measured
    against its own norm, but at least against a thousandth of the largest.

    Raises:
        AssertionError: one of them differs by more than `allowed`, or is not finite.
    """
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    floor = 1e-3 * max((norm for name, norm in norms.items() if name.startswith("gradient")), default=0.0)
    for name, value in expected.items():
        error = float((actual[name].double() - value.double()).norm()) / (max(norms[name], floor) or 1.0)
        if not error <= allowed:
            raise AssertionError(f"{label}: {name} differs from eager's by {error:.1e}, allowed is {allowed:.0e}")
