"""What the ahead-of-time test compiles of the attention operators: the launches of ordinary calls."""

from collections.abc import Iterator
from unittest import mock

import torch
from aot_gates import ODD_SIZE, SIZE, Case, _case, _launches_of
from torch import Tensor

from fastsam.ops._attention import Source, triton_tiles
from fastsam.ops._attention import triton as attention


def _attention_cases(
    dtype: torch.dtype,
    precision: str,
    channels: int,
    keys: int | None,
    count: int,
    size: tuple[int, int] = SIZE,
    out: int | None = None,
) -> Iterator[Case]:
    """Forward and backward of so many sources, with keys of so many channels or the columns themselves for keys.

    z has `out` channels, by default as many as the maps.
    """

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    depth, wide = keys or channels, out or channels
    key = None if keys is None else new(keys, channels)
    weights = (new(depth, channels), new(depth), new(wide, channels), key)
    sources = [Source(new(2, channels, *size), *weights) for _ in range(count)]
    dz, value_bias = new(2, wide, *size), new(wide)
    contexts = attention._new_contexts(sources)
    with mock.patch.object(triton_tiles, "precision", lambda like: precision):
        launches = _launches_of(attention, lambda: attention.forward(sources, value_bias, save=True))
        launches += _launches_of(attention, lambda: attention.backward(dz, sources, contexts))
    name = {1: "self_attention", 2: "double_attention"}[count]
    for launch in launches:
        yield _case(f"{name} {dtype} {precision} C={channels} keys={keys} {size[0]}x{size[1]}", launch)


def aot_cases() -> Iterator[Case]:
    """Every launch of both operators, forward and backward, in the default configurations; and of odd sizes."""
    for channels in (64, 128):
        for keys in (16, None):
            yield from _attention_cases(torch.float32, "tf32", channels, keys, 2)
            yield from _attention_cases(torch.bfloat16, "ieee", channels, keys, 2)
            yield from _attention_cases(torch.float32, "ieee", channels, keys, 2)
    yield from _attention_cases(torch.float16, "ieee", 64, 16, 1)
    for dtype, precision in ((torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "ieee")):
        yield from _attention_cases(dtype, precision, 40, 5, 2, ODD_SIZE, 24)
    yield from _attention_cases(torch.float16, "ieee", 40, None, 1, ODD_SIZE, 41)
    for channels in (128, 256):
        yield from _attention_cases(torch.float32, "tf32", channels, channels, 2)
        yield from _attention_cases(torch.bfloat16, "ieee", channels, channels, 2)
    yield from _attention_cases(torch.float32, "tf32", 256, None, 2)
    yield from _attention_cases(torch.bfloat16, "ieee", 256, None, 2)
