"""Argument checks of the operators: one message names the argument, what it was, and what it should be."""

from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Arguments:
    """Checks the tensors of one operator call against shapes written with letters.

    The first tensor checked sets the dtype and the device; a letter stands for the size it had where it came first.
    """

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.sizes: dict[str, Any] = {}
        self.first: tuple[str, Tensor] | None = None

    def tensor(self, name: str, value: Any, *dims: str | int) -> None:
        """Check that `value` is a floating-point tensor of the shape `dims` (letters, products like "4C", or sizes)."""
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.operator}: {name} must be a torch.Tensor of shape {spell(dims)}, got {type(value).__name__}"
            )
        if value.layout is not torch.strided:
            raise TypeError(
                f"{self.operator}: {name} must be a dense tensor, got layout {value.layout}; use to_dense()"
            )
        if len(value.shape) != len(dims):
            raise ValueError(
                f"{self.operator}: {name} must have {len(dims)} dimensions {spell(dims)}, "
                f"got shape {tuple(value.shape)}"
            )
        for position, dim in enumerate(dims):
            if isinstance(dim, str) and dim not in self.sizes:
                if dim != "B" and value.shape[position] == 0:
                    raise ValueError(
                        f"{self.operator}: {name} must have shape {spell(dims)} with {dim} at least 1, "
                        f"got {tuple(value.shape)}"
                    )
                self.sizes[dim] = value.shape[position]
            elif value.shape[position] != self._size(dim):
                raise ValueError(
                    f"{self.operator}: {name} must have shape {spell(dims)} = {self._expected(dims, value)}, "
                    f"got {tuple(value.shape)}"
                )
        self._same_kind(name, value)

    def bind(self, **sizes: Any) -> None:
        """Give letters their sizes before a tensor is checked against them."""
        self.sizes.update(sizes)

    def _size(self, dim: str | int) -> Any:
        return self.sizes[dim] if isinstance(dim, str) else dim

    def _expected(self, dims: tuple[str | int, ...], value: Tensor) -> tuple[Any, ...]:
        return tuple(
            self.sizes.get(dim, actual) if isinstance(dim, str) else dim
            for dim, actual in zip(dims, value.shape, strict=True)
        )

    def _same_kind(self, name: str, value: Tensor) -> None:
        if self.first is None:
            if value.dtype not in _DTYPES:
                raise TypeError(
                    f"{self.operator}: {name} must be a floating-point tensor of 16, 32 or 64 bits, got {value.dtype}"
                )
            self.first = (name, value)
            return
        first_name, first = self.first
        if value.dtype != first.dtype:
            raise TypeError(f"{self.operator}: {name} is {value.dtype}, it must be {first.dtype} as {first_name} is")
        if value.device != first.device:
            raise ValueError(
                f"{self.operator}: {name} is on {value.device}, it must be on {first.device} as {first_name} is"
            )


def spell(dims: tuple[str | int, ...]) -> str:
    """The shape in words, for a message."""
    return "(" + ", ".join(map(str, dims)) + ("," if len(dims) == 1 else "") + ")"


def real_number(operator: str, name: str, value: Any) -> None:
    """Check that `value` is a plain number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be a number, got {type(value).__name__}")
