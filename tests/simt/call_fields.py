"""Calls of compiled kernels: fields, which are the members of a struct of params.h in their order; cards; casts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from kernel_build import Kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Way(NamedTuple):
    """A type of maps on a card, which decide how the kernels multiply."""

    dtype: torch.dtype
    capability: int
    tf32: bool = False

    @property
    def wide(self) -> torch.dtype:
        """The dtype of weights, contexts and sums."""
        return torch.float32 if self.dtype.itemsize < 4 else self.dtype

    def function(self, kernels: Kernels, name: str) -> Callable[..., None]:
        return getattr(kernels, f"{name}_{str(self.dtype)[6:]}")  # type: ignore[no-any-return]

    def card(self, multiprocessors: int) -> tuple[int, int, int]:
        return self.capability, multiprocessors, int(self.tf32)


def map_fields(x: Tensor | None) -> list[int]:
    """Address, batch stride and channel stride of a map (B, C, H, W) whose positions are contiguous; zeros for None."""
    if x is None:
        return [0, 0, 0]
    assert x.shape[3] <= 1 or x.stride(3) == 1
    assert x.shape[2] <= 1 or x.stride(2) == x.shape[3]
    return [x.data_ptr(), x.stride(0), x.stride(1)]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where tensors lie; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor that holds NaN until a kernel writes to it."""
    return torch.full(tuple(shape), torch.nan, dtype=dtype)


class _Casts(TorchDispatchMode):
    """Counts the casts of one dtype to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def casts(call: Callable[[], Any]) -> int:
    """How many casts a call makes: on a GPU each is a launch."""
    with _Casts() as counted:
        call()
    return counted.count
