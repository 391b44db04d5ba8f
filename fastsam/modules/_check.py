"""Argument checks of the modules: one message names the argument, what it was, and what it should be."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsam.ops._check import spell
from fastsam.ops._dispatch import autocast_enabled

_Weights = TypeVar("_Weights")


def positive_int(owner: str, name: str, value: Any) -> int:
    """`value` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be a positive integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
    return value


def odd_kernel(owner: str, name: str, value: Any) -> int:
    """`value` if it is an odd positive integer, so that "same" padding is symmetric."""
    if positive_int(owner, name, value) % 2 == 0:
        raise ValueError(f"{owner}: {name} must be odd, got {value}")
    return int(value)


def real_number(owner: str, name: str, value: Any) -> float:
    """`value` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite, got {value}")
    return float(value)


def flag(owner: str, name: str, value: Any) -> bool:
    """`value` if it is a bool: a truthy string from a configuration file must not pass for one."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")
    return value


def placement(owner: str, device: Any, dtype: Any) -> dict[str, Any]:
    """`device` and `dtype` as keyword arguments of parameters, if parameters can be of them."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{owner}: dtype must be None or a floating-point torch.dtype, got {dtype!r}")
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"{owner}: dtype must be None or a floating-point torch.dtype of 16 bits or more, got {dtype}")
    if device is not None:
        try:
            torch.device(device)
        except TypeError as error:
            raise TypeError(f"{owner}: device must be None or name a torch.device, got {device!r}") from error
        except RuntimeError as error:
            raise ValueError(f"{owner}: device must be None or name a torch.device, got {device!r}") from error
    return {"device": device, "dtype": dtype}


def same_kind(owner: str, name: str, value: Tensor, weight: Tensor) -> None:
    """Check that `value` lies where the module's `weight` lies and, outside of autocast, has its dtype."""
    if value.device != weight.device:
        raise ValueError(f"{owner}: {name} is on {value.device}, the module's parameters are on {weight.device}")
    if value.dtype == weight.dtype:
        return
    if not (value.dtype.is_floating_point and autocast_enabled(value)):
        raise TypeError(f"{owner}: {name} is {value.dtype}, the module's parameters are {weight.dtype}")


def tensor(owner: str, name: str, value: Any, *dims: str | int) -> None:
    """Check that `value` is a tensor of the shape `dims`, where a letter stands for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor of shape {spell(dims)}, got {type(value).__name__}")
    if value.ndim != len(dims) or any(
        size != dim for size, dim in zip(value.shape, dims, strict=True) if not isinstance(dim, str)
    ):
        raise ValueError(f"{owner}: {name} must have shape {spell(dims)}, got {tuple(value.shape)}")


def state_tuple(owner: str, state: Any, names: Sequence[str]) -> None:
    """Check that `state` is a tuple of as many maps as there are names."""
    if not isinstance(state, tuple | list) or len(state) != len(names):
        got = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
        maps = f"map ({names[0]},)" if len(names) == 1 else f"maps ({', '.join(names)})"
        raise TypeError(f"{owner}: state must be None or a tuple of the {maps}, got {got}")


def state_maps(owner: str, state: Any, shapes: Mapping[str, Sequence[str | int]], weight: Tensor) -> tuple[Tensor, ...]:
    """`state` as a tuple if it is one of maps of these names and shapes, of the kind of the module's `weight`."""
    state_tuple(owner, state, tuple(shapes))
    for (name, shape), value in zip(shapes.items(), state, strict=True):
        tensor(owner, f"the state's {name}", value, *shape)
        same_kind(owner, f"the state's {name}", value, weight)
    return tuple(state)


def folded_weights(owner: str, value: Any, expected: type[_Weights]) -> _Weights:
    """`value` if it is what the module's own fold() returns."""
    if not isinstance(value, expected):
        raise TypeError(f"{owner}: weights must be None or what fold() returned, got {type(value).__name__}")
    return value


def no_weights(owner: str, value: Any) -> None:
    """Check that no folded weights are given to a module that has nothing to fold."""
    if value is not None:
        raise TypeError(f"{owner}: weights must be None, there is nothing to fold here, got {type(value).__name__}")


def query_points(owner: str, points: Tensor | Sequence[Sequence[int]], height: int, width: int) -> Tensor:
    """The points as an int64 tensor (P, 2) of (row, column), each checked to lie on an (height, width) map."""
    try:
        points = torch.as_tensor(points)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(points, list | tuple) else TypeError
        raise kind(f"{owner}: points must be integers of shape (P, 2), got {points!r}") from error
    if points.dtype.is_floating_point or points.dtype.is_complex or points.dtype == torch.bool:
        raise TypeError(f"{owner}: points must be integers, got {points.dtype}")
    tensor(owner, "points", points, "P", 2)
    limits = points.new_tensor([height, width])
    outside = ((points < 0) | (points >= limits)).any(dim=1)
    if outside.any():
        point = tuple(points[outside][0].tolist())
        raise ValueError(f"{owner}: points holds {point}, which is outside of the {height} x {width} map (row, column)")
    return points.long()
