"""The operators on gates: how `lstm_gates`, `memory_gates` and `norm_gate` are checked, routed and registered."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._check import Arguments, real_number
from fastsam.ops._gates import eager, native
from fastsam.ops._gates.update import Term, Update, new_statistics, terms_of

REGISTERED = "registered"
"""The route of a call that a tracer or a tensor subclass looks at."""


class Call(NamedTuple):
    """What all of the operators make of their arguments.

    x, recurrent: the gates (B, G C, H, W) and their second summand. c: what they act on, (B, C, H, W). The weights and
    biases are those of the summands' norms.
    """

    update: Update
    eps: float
    x: Tensor
    c: Tensor
    recurrent: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    recurrent_norm_weight: Tensor | None = None
    recurrent_norm_bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All tensors, None for those that are absent, in the order that every operator takes them in."""
        return self[2:]

    @property
    def terms(self) -> list[Term]:
        """The summands of the gates."""
        return terms_of(self.x, *self[4:])


class Operator:
    """An operator on gates, registered with torch.library.

    Args:
        name: of the operator.
        rows: the channels of its gates, in words.
        gates, state: the names of its first two arguments, `x` and `c` of a `Call`.
        arguments: the schema's, with their defaults.
        call: makes a `Call` of arguments in the schema's order, of which the last ones may be left out.
    """

    def __init__(
        self, name: str, rows: str, gates: str, state: str, arguments: Sequence[str], call: Callable[..., Call]
    ) -> None:
        self.name, self.rows, self.gates, self.state, self.call = name, rows, gates, state, call
        self._tensors = [index for index, argument in enumerate(arguments) if argument.startswith("Tensor")]
        self._count = len(arguments)
        without_defaults = ", ".join(argument.partition("=")[0] for argument in arguments)
        _dispatch.register(
            name,
            f"({', '.join(arguments)}) -> (Tensor h, Tensor c_new, Tensor statistics)",
            f"(Tensor dh, Tensor dc_new, {without_defaults}, Tensor statistics) -> Tensor[]",
            implementation=self._implementation,
            fake=self._fake,
            backward_implementation=self._backward_implementation,
            backward_fake=self._backward_fake,
            setup_context=self._setup_context,
            backward=self._backward,
        )

    def check(self, call: Call) -> Arguments:
        """Check the tensors of a call and its eps.

        Raises:
            TypeError, ValueError: with the name of the argument, what it was, and what it should be.
        """
        check = Arguments(self.name)
        check.tensor(self.state, call.c, "B", "C", "H", "W")
        rows = self.rows
        check.bind(**{rows: call.update.gates * call.c.shape[1]})
        check.tensor(self.gates, call.x, "B", rows, "H", "W")
        if call.recurrent is not None:
            check.tensor("recurrent", call.recurrent, "B", rows, "H", "W")
        elif call.recurrent_norm_weight is not None:
            raise ValueError(f"{self.name}: recurrent_norm normalises recurrent, which is None; give both or neither")
        recurrent_norm = (call.recurrent_norm_weight, call.recurrent_norm_bias)
        check_norms(check, rows, norm=(call.norm_weight, call.norm_bias), recurrent_norm=recurrent_norm)
        real_number(self.name, "eps", call.eps)
        if not 0 < call.eps < math.inf:
            raise ValueError(f"{self.name}: eps must be positive and finite, got {call.eps}")
        return check

    def route(self, tensors: Sequence[Any]) -> str:
        """Where a call on checked tensors goes, the gates first: `REGISTERED` or a back end."""
        if _dispatch.needs_registered_operator(tensors) and backends.selected() != "eager":
            return REGISTERED
        return _dispatch.choose(self.name, tensors[0])

    def run(self, route: str, call: Call, arguments: tuple[Any, ...]) -> tuple[Tensor, Any]:
        """h and c_new of a checked call, made of these arguments, on any route but that to the eager back end."""
        if route == REGISTERED:
            h, c_new, _ = getattr(torch.ops.fastsam, self.name)(*arguments)
            return h, c_new
        if _dispatch.wants_gradient(call.tensors):
            return _Gates.apply(self.name, route, call.update, call.eps, *call.tensors)
        return implementation(route).forward(call.update, call.terms, call.c, call.eps)[:2]

    # What follows has the signatures that torch.library asks for.

    def _implementation(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = self.call(*arguments)
        self.check(call)
        h, c_new, statistics = self._module(call).forward(call.update, call.terms, call.c, call.eps)
        return h, h.new_empty(0) if c_new is None else c_new, statistics

    def _fake(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = self.call(*arguments)
        shape = call.c.shape
        count = sum(weight is not None for weight in (call.norm_weight, call.recurrent_norm_weight))
        c_new = call.c.new_empty(shape if call.update.keeps_state else 0)
        return call.c.new_empty(shape), c_new, new_statistics(call.x, count)

    def _backward_implementation(self, dh: Tensor, dc_new: Tensor, *arguments: Any) -> list[Tensor]:
        *inputs, statistics = arguments
        call = self.call(*inputs)
        upstream = dh, dc_new if call.update.keeps_state else None
        terms, dc = self._module(call).backward(call.update, *upstream, call.terms, call.c, statistics)
        dx, dc, drecurrent, *norms = _flat_gradients(terms, dc)
        if drecurrent is dx:  # the outputs of an operator must not share memory
            drecurrent = torch.clone(dx)
        return [gradient for gradient in (dx, dc, drecurrent, *norms) if gradient is not None]

    def _backward_fake(self, dh: Tensor, dc_new: Tensor, *arguments: Any) -> list[Tensor]:
        return _dispatch.empty_gradients(self.call(*arguments[:-1]).tensors)

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.others = [None if index in self._tensors else value for index, value in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[index] for index in self._tensors), output[2])

    def _backward(self, ctx: Any, dh: Tensor, dc_new: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, statistics = ctx.saved_tensors
        arguments = list(ctx.others)
        for index, tensor in zip(self._tensors, tensors, strict=True):
            arguments[index] = tensor
        backward = getattr(torch.ops.fastsam, f"{self.name}_backward")
        gradients = _at_tensors(tensors, backward(dh, dc_new, *arguments, statistics))
        return tuple(next(gradients) if index in self._tensors else None for index in range(self._count))

    def _module(self, call: Call) -> Any:
        return implementation(backends.choose(self.name, call.x))


def _at_tensors(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The gradients in the places of their tensors."""
    given = iter(gradients)
    return (None if tensor is None else next(given) for tensor in tensors)


def implementation(backend: str) -> Any:
    """The module with `forward` and `backward` of a back end; only the back end triton imports Triton."""
    if backend == "triton":
        return importlib.import_module("fastsam.ops._gates.triton")
    return eager if backend == "eager" else native


def pair(operator: str, name: str, norm: Any) -> Sequence[Any]:
    """Weight and bias of a norm, twice None for none.

    Raises:
        TypeError, ValueError: it is neither None nor a pair.
    """
    if norm is None:
        return (None, None)
    if not isinstance(norm, (tuple, list)):
        raise TypeError(f"{operator}: {name} must be a pair (weight, bias) or None, got {type(norm).__name__}")
    if len(norm) != 2:
        raise ValueError(f"{operator}: {name} must be a pair (weight, bias), got {len(norm)} values")
    if norm[0] is None:
        raise TypeError(f"{operator}: {name}[0] must be a torch.Tensor, got NoneType")
    return norm


def joined(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What `pair` took apart."""
    return None if weight is None or bias is None else (weight, bias)


def check_norms(check: Arguments, rows: str, **norms: tuple[Any, Any]) -> None:
    """Check norms of maps with `rows` channels: the first weight has one of two shapes, which all others must have.

    Raises:
        TypeError, ValueError: with the name of the argument, what it was, and what it should be.
    """
    dims: tuple[str, ...] = ()
    for name, values in norms.items():
        if values[0] is None and values[1] is not None:
            raise ValueError(f"{check.operator}: {name} has a bias without a weight; give both or neither")
        for index, value in enumerate(values if values[0] is not None else ()):
            dims = dims or _dims_of_norm(check.operator, f"{name}[{index}]", value, rows)
            check.tensor(f"{name}[{index}]", value, *dims)


def _dims_of_norm(operator: str, name: str, weight: Any, rows: str) -> tuple[str, ...]:
    count = weight.ndim if isinstance(weight, Tensor) else 1
    if count not in (1, 3):
        raise ValueError(
            f"{operator}: {name} must have 1 dimension ({rows},) or 3 dimensions ({rows}, H, W), "
            f"got shape {tuple(weight.shape)}"
        )
    return (rows, "H", "W")[:count]


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, backend: str, update: Update, eps: float, *tensors: Any) -> tuple[Any, Any]:
        ctx.operator, ctx.implementation, ctx.update = operator, implementation(backend), update
        call = Call(update, eps, *tensors)
        h, c_new, statistics = ctx.implementation.forward(update, call.terms, call.c, eps)
        ctx.save_for_backward(*tensors, statistics)
        return h, c_new

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc_new: Tensor | None) -> Any:
        x, c, *others, statistics = ctx.saved_tensors
        upstream = dh.detach(), None if dc_new is None else dc_new.detach()
        terms, dc = ctx.implementation.backward(ctx.update, *upstream, terms_of(x, *others), c, statistics)
        gradients = _flat_gradients(terms, dc)
        depends_on = [dh, dc_new, x, c, *others]
        return (None,) * 4 + tuple(_dispatch.first_derivative_only(ctx.operator, gradients, depends_on))


def _flat_gradients(terms: Sequence[Term], dc: Tensor) -> list[Any]:
    """In the order of `Call.tensors`."""
    (dx, *norm), (drecurrent, *recurrent_norm) = (*terms, (None, None, None))[:2]
    return [dx, dc, drecurrent, *norm, *recurrent_norm]
