"""Whether what was made of a published module computes what the original does: its parameters do not tell it all."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam import backends


class Run(NamedTuple):
    """A module, and how it is called: from it and some maps to a sequence of maps."""

    module: nn.Module
    call: Callable[..., Any] = nn.Module.__call__


def check_arithmetic(
    recognised: str,
    original: Run,
    converted: Run,
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Sequence[str],
    *,
    suspects: str,
    otherwise: str = "",
) -> None:
    """Check on random maps, in float64, that both compute the same.

    Copies of them run on the CPU, or on the CUDA device that the parameters are on, because some published code sends
    its maps there. The tolerance is the square root of the machine epsilon of the parameters.

    Args:
        recognised: how a message begins: who says it, and as what the original was recognised.
        original, converted: with the outputs in the same order; of the original's those beyond them are left alone.
        inputs: names and shapes of the maps.
        outputs: names of the outputs.
        suspects: what may differ behind the same names and shapes, for the message.
        otherwise: what remains to be done, for the message.

    Raises:
        ValueError: the original cannot be run, returns something else than such maps, or computes something else.
    """
    parameter = next(converted.module.parameters())
    device = parameter.device if parameter.is_cuda else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in inputs.values()]
    maps = [value.to(device) for value in drawn]
    with torch.no_grad(), backends.backend("eager"):
        try:
            expected = original.call(exact_copy(original.module, device), *maps)
        except Exception as error:
            shapes = ", ".join(f"{name} {shape}" for name, shape in inputs.items())
            raise ValueError(
                f"{recognised} but could not be run on maps {shapes}: {type(error).__name__}: {error}{otherwise}"
            ) from error
        actual = converted.call(exact_copy(converted.module, device), *maps)
    if not isinstance(expected, tuple | list) or len(expected) < len(outputs):
        got = f"{len(expected)} values" if isinstance(expected, tuple | list) else type(expected).__name__
        raise ValueError(f"{recognised} but returns {got}, not the maps {', '.join(outputs)}{otherwise}")
    for name, one, other in zip(outputs, expected, actual, strict=False):
        difference = _difference(one, other, torch.finfo(parameter.dtype).eps ** 0.5)
        if difference is not None:
            raise ValueError(
                f"{recognised} but computes something else: its {name} on random maps is {difference}; look at "
                f"{suspects}{otherwise}"
            )


def _difference(expected: Any, actual: Tensor, tolerance: float) -> str | None:
    """What the expected map is beside the actual one, in words; None for the same."""
    if not isinstance(expected, Tensor):
        return f"a {type(expected).__name__}, not a tensor"
    if expected.shape != actual.shape:
        return f"of shape {tuple(expected.shape)}, not {tuple(actual.shape)}"
    error = float((expected.to(actual) - actual).norm() / expected.norm())
    return None if error <= tolerance else f"off by {error:.2g} of its norm"


def exact_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy in float64 on the device, with the tensors that are neither parameters nor buffers.

    Published code keeps states, and on CUDA even weights, as plain attributes; those with a gradient's history cannot
    be copied by `copy.deepcopy`.
    """
    plain = {
        id(value): value.detach().to(device, torch.float64 if value.is_floating_point() else value.dtype, copy=True)
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor)
    }
    return copy.deepcopy(module, plain).to(device, torch.float64)
