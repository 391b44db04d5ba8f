"""How the operators call their Triton kernels.

Under torch.compile too they are called from the registered operators, not shown to the compiler through
torch.library.triton_op: a graph then names an operator, and back end and tile sizes are looked up whenever it runs,
further tiles tried where a card lacks room, while a graph of kernels would keep those of the time of tracing. Inductor
by default fuses nothing into kernels of others, so that what it would save is time of the host before a launch, and
none in a CUDA graph, which records a registered operator's launches like any other.
"""

from typing import Any

import torch
from torch import Tensor

from fastsam import fastest


def run(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of `like` and its current stream."""
    if like.device.type == "cuda":
        with torch.cuda.device(like.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def precision(like: Tensor) -> str:
    """What `product` takes for float32 operands: "tf32" where PyTorch's own products may use it, else "ieee"."""
    return "tf32" if fastest.arithmetic_name(like.dtype) == "tf32" else "ieee"


def strides(*maps: Tensor | None) -> tuple[int, ...]:
    """Of batch and channel, map by map; zeros for None."""
    return tuple(stride for x in maps for stride in ((0, 0) if x is None else x.stride()[:2]))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded(count: int, least: int = 16) -> int:
    """The size of a tile that holds `count`: the next power of two, at least 16 for the operands of a product."""
    return max(least, 1 << (count - 1).bit_length())
