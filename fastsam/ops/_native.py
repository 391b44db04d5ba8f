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
    return getattr(native, str(dtype).removeprefix("torch."))


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maps of a dtype are computed with, and their weights passed."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def dense(tensor: Tensor) -> Tensor:
    """The map itself where its positions lie one after the other in memory, else one contiguous copy.

    Batch and channel may have any stride, so slices and expanded maps are read in place; channels_last is copied.
    """
    tensor = tensor.resolve_neg()
    _, _, height, width = tensor.shape
    row, step = tensor.stride()[2:]
    in_place = (width == 1 or step == 1) and (height == 1 or row == width)
    return tensor if in_place else tensor.contiguous()


def weights(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weights in the dtype of the arithmetic, contiguous; themselves where they are so already."""
    return None if tensor is None else tensor.resolve_neg().to(dtype).contiguous()


def map_fields(tensor: Tensor | None) -> MapFields:
    """Address, batch stride and channel stride of a `dense` map; zeros for None."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def new_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised contiguous map of the size of `like`."""
    return torch.empty((like.shape[0], channels, *like.shape[2:]), dtype=like.dtype, device=like.device)
