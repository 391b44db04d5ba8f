"""What the wrappers of the compiled CPU operators share: addresses, strides, the scalar type, the thread count.

The field order of a call is that of its struct in csrc/include/fastsam/params.h.
"""

from typing import Any

import torch
from torch import Tensor

from fastsam import backends

MapFields = tuple[int, int, int]


def operators(dtype: torch.dtype) -> Any:
    """The compiled operators for a scalar type."""
    native = backends.native_module()
    return getattr(native, "float64" if dtype == torch.float64 else "float32")


def dense(tensor: Tensor) -> Tensor:
    """The map itself where its positions lie one after the other in memory, else one contiguous copy.

    Batch and channel may have any stride, so slices and expanded maps are read in place; channels_last is copied.
    """
    tensor = tensor.resolve_neg()
    _, _, height, width = tensor.shape
    row, step = tensor.stride()[2:]
    in_place = (width == 1 or step == 1) and (height == 1 or row == width)
    return tensor if in_place else tensor.contiguous()


def packed(tensor: Tensor | None) -> Tensor | None:
    """The weights themselves where they are contiguous, else a copy."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def map_fields(tensor: Tensor | None) -> MapFields:
    """Address, batch stride and channel stride of a `dense` map; zeros for None."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def new_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised contiguous map of the size of `like`."""
    return torch.empty((like.shape[0], channels, *like.shape[2:]), dtype=like.dtype, device=like.device)
