"""What the wrappers of the compiled operators share: addresses and strides, and the call, on a CPU or a GPU.

The fields of a call are those of its struct in csrc/include/fastsam/params.h, in their order (csrc/calls.h).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.fastest import arithmetic_name

MapFields = tuple[int, int, int]


def run(name: str, like: Tensor, fields: Sequence[float]) -> None:
    """Run a compiled operator on maps like this one: on their device, in their dtype, on the current stream."""
    native: Any = backends.native_module()
    dtype = str(like.dtype).removeprefix("torch.")
    if like.device.type == "cpu":
        getattr(getattr(native, dtype), name)(torch.get_num_threads(), tuple(fields))
        return
    operators = getattr(native.cuda, dtype)
    with torch.cuda.device(like.device):
        launch = _launch(like)
        size = getattr(operators, f"{name}_workspace")(launch, tuple(fields))
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device)
        getattr(operators, name)(launch, workspace.data_ptr(), tuple(fields))


def _launch(like: Tensor) -> tuple[int, ...]:
    """The fields of csrc/include/fastsam/cuda_kernels.h, `Launch`, on the current device."""
    index = torch.cuda.current_device()
    tf32 = arithmetic_name(like.dtype) == "tf32"
    return (index, torch.cuda.current_stream(index).cuda_stream, *_card(index), int(tf32))


@cache
def _card(index: int) -> tuple[int, int, int]:
    """Compute capability, times ten, of the code that runs on this card; the card's multiprocessors, and the bytes of
    shared memory that a block may have on it."""
    native: Any = backends.native_module()
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    return backends.cuda_code(index)[0], multiprocessors, native.cuda.shared_bytes(index)


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
