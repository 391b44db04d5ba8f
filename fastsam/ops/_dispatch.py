"""How a call reaches its implementation, the same for every operator.

In eager mode the public function calls the chosen back end directly: a registered operator costs about 10 us a call,
which matters when a model makes hundreds of small ones. While compiling or exporting, and for tensor subclasses, it
calls the registered operator, which the tracers understand. Function transforms (torch.func, forward-mode AD) outside
of them go through the eager form, which PyTorch differentiates itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsam import backends

LIBRARY = torch.library.Library("fastsam", "DEF")

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


# What autocast casts; float64 it leaves alone.
_CAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maps of a dtype are computed with, and their weights passed."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of this tensor."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` as autocast wants it: arguments cast to one dtype, autocast off inside.

    The dtype is float32 on a CPU, as for PyTorch's own softmax, and the autocast dtype elsewhere, where the kernels
    accumulate in float32. float64 stays as it is.
    """
    device_type = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
    dtype = torch.float32 if device_type == "cpu" else torch.get_autocast_dtype(device_type)
    cast: dict[int, Tensor] = {}  # a tensor given twice, as SAM's memory is, stays one tensor
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype in _CAST_FROM and id(argument) not in cast:
            cast[id(argument)] = argument.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return function(*(cast.get(id(argument), argument) for argument in arguments))


def needs_registered_operator(tensors: Sequence[Any]) -> bool:
    """Whether a tracer or a tensor subclass is looking, so that the call must go through torch.ops."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return any(tensor is not None and type(tensor) not in _PLAIN for tensor in tensors)


def choose(operator: str, tensor: Tensor, channels: int | None = None) -> str:
    """The back end for a call outside of tracers; transforms that only the eager form serves are sent there."""
    name = backends.choose(operator, tensor, channels)
    if name != "eager" and _inside_transform():
        if backends.selected() != "auto":
            raise RuntimeError(
                f"fastsam.{operator}: the back end {name!r} has no forward-mode derivatives and no torch.func "
                'transforms; use `with fastsam.backend("eager"):`'
            )
        return "eager"
    return name


def _inside_transform() -> bool:
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd will ask for a derivative with respect to any of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def keeps_context(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a registered operator must keep what its backward pass needs.

    A graph of torch.jit.trace is run with gradients and without, however it was traced.
    """
    return torch.jit.is_tracing() or wants_gradient(tensors)


def check_context_kept(operator: str, keep: bool) -> None:
    """Raise where the backward pass of a registered operator is asked for that was told not to keep its context."""
    if not keep:
        raise RuntimeError(
            f"fastsam.{operator}: it was traced or called with keep=False, without a gradient to come, and has none; "
            "trace it with torch.is_grad_enabled() and an input that requires a gradient"
        )


def empty_gradients(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """What a backward operator returns, uninitialised: one contiguous tensor for each that is given."""
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors if tensor is not None]


class _FirstDerivativeOnly(torch.autograd.Function):
    """The identity on computed gradients; differentiating it again is an error instead of a wrong number."""

    @staticmethod
    def forward(ctx: Any, operator: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.operator = operator
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(second_derivative_message(ctx.operator))


def second_derivative_message(operator: str) -> str:
    return (
        f"fastsam.{operator} has no second derivative on its compiled back ends; "
        'run the forward pass under `with fastsam.backend("eager"):` for one'
    )


def first_derivative_only(
    operator: str, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients computed by a compiled backward pass, guarded against being differentiated again."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return _FirstDerivativeOnly.apply(operator, len(gradients), *gradients, *inputs)


def register(
    operator: str,
    schema: str,
    backward_schema: str,
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward_implementation: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register an operator and its backward operator with torch.library: schema, kernels, fake, autograd, autocast."""
    name, backward_name = f"fastsam::{operator}", f"fastsam::{operator}_backward"
    LIBRARY.define(f"{operator}{schema}")
    LIBRARY.define(f"{operator}_backward{backward_schema}")
    LIBRARY.impl(operator, _filled(operator, implementation), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{operator}_backward", backward_implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, _filled(operator, fake), lib=LIBRARY)
    torch.library.register_fake(backward_name, backward_fake, lib=LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(backward_name, _raise_second_derivative(operator), lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(operator, _autocast_kernel(operator), key)


def _filled(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with all of the operator's arguments: the dispatcher leaves out the last ones that are the default."""
    defaults = [argument.default_value for argument in getattr(torch.ops.fastsam, operator).default._schema.arguments]

    def filled(*arguments: Any) -> Any:
        return function(*arguments, *defaults[len(arguments) :])

    return filled


def _autocast_kernel(operator: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        return without_autocast(getattr(torch.ops.fastsam, operator), *arguments)

    return kernel


def _raise_second_derivative(operator: str) -> Callable[..., Any]:
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(second_derivative_message(operator))

    return backward
