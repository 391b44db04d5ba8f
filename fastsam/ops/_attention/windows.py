"""Maps cut into windows, as the attention of each window by itself wants them."""

from typing import Any

from torch import Size, SymInt, Tensor


def check(window: Any, x: Tensor) -> None:
    """Raise TypeError or ValueError unless the map (B, C, H, W) is a whole number of windows (height, width)."""
    if not (isinstance(window, tuple) and len(window) == 2 and all(type(side) in (int, SymInt) for side in window)):
        raise TypeError(f"self_attention: window must be a pair of integers (height, width), got {window!r}")
    height, width = x.shape[2:]
    if min(window) < 1 or height % window[0] != 0 or width % window[1] != 0:
        raise ValueError(
            f"self_attention: window must divide the map of {height} x {width}, got {window[0]} x {window[1]}"
        )


def split(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, C, H, W) as a batch (B * windows, C, height, width), windows row by row."""
    rows, columns = x.shape[2] // window[0], x.shape[3] // window[1]
    return x.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def merge(x: Tensor, shape: Size) -> Tensor:
    """The map, of the batch, height and width of `shape`, that `split` made windows of; contiguous."""
    height, width = x.shape[2:]
    x = x.unflatten(0, (shape[0], shape[2] // height, shape[3] // width))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous()
