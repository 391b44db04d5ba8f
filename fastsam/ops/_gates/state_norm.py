"""`lstm_gates` and `memory_gates` with all their norms: those of the summands, and the one of the new state."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsam.ops import _dispatch
from fastsam.ops._gates.operator import Operator, check_norms, joined, pair
from fastsam.ops.norm_gate import norm_of_state


def call_with_norms(
    operator: Operator,
    eager_form: Callable[..., Any],
    activation: str,
    first: tuple[Any, ...],
    recurrent: Any,
    norms: dict[str, Any],
    eps: Any,
) -> tuple[Tensor, Tensor]:
    """The output and the new state of a call, on the route that it takes.

    Args:
        operator: the one on gates, without the norm of the state.
        eager_form: its reference.
        activation: of the new state behind its norm, as in `norm_gate`.
        first: the arguments before recurrent, the gates first.
        recurrent: the second summand of the gates, or None.
        norms: the arguments norm, recurrent_norm and state_norm, in this order.
        eps: added to the variances.

    Raises:
        TypeError, ValueError: with the name of the argument, what it was, and what it should be.
    """
    values = [value for name, norm in norms.items() for value in pair(operator.name, name, norm)]
    arguments = (operator, eager_form, activation, *first, recurrent, *values, eps)
    if isinstance(first[0], Tensor) and _dispatch.autocast_enabled(first[0]):
        return _dispatch.without_autocast(_call, *arguments)
    return _call(*arguments)


def _call(operator: Operator, eager_form: Callable[..., Any], activation: str, *arguments: Any) -> Any:
    *summands, weight, bias, eps = arguments
    fused = (*summands, eps, weight is not None)
    call = operator.call(*fused)
    check_norms(operator.check(call), "C", state_norm=(weight, bias))
    route = operator.route((*call.tensors, weight, bias))
    if route == "eager":
        *first, recurrent = summands[:-4]
        norms = {"norm": joined(*summands[-4:-2]), "recurrent_norm": joined(*summands[-2:])}
        return eager_form(*first, recurrent=recurrent, **norms, state_norm=joined(weight, bias), eps=eps)
    h, c_new = operator.run(route, call, fused)
    return (h, c_new) if weight is None else norm_of_state(c_new, h, activation, (weight, bias), eps, route)
