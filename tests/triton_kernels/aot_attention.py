"""What the ahead-of-time test compiles of the attention operators: the launches of ordinary calls."""

from collections.abc import Iterator
from unittest import mock

import torch
from aot_gates import SIZE, Case, _case, _launches_of
from torch import Tensor

from fastsam.ops._attention import Source, triton_tiles
from fastsam.ops._attention import triton as attention


def _attention_cases(dtype: torch.dtype, precision: str, channels: int, keys: int | None, count: int) -> Iterator[Case]:
    """Forward and backward of so many sources, with keys of so many channels or the columns themselves for keys."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    depth = keys or channels
    key = None if keys is None else new(keys, channels)
    weights = (new(depth, channels), new(depth), new(channels, channels), key)
    sources = [Source(new(2, channels, *SIZE), *weights) for _ in range(count)]
    dz, value_bias = new(2, channels, *SIZE), new(channels)
    contexts = attention._new_contexts(sources)
    with mock.patch.object(triton_tiles, "precision", lambda like: precision):
        launches = _launches_of(attention, lambda: attention.forward(sources, value_bias, save=True))
        launches += _launches_of(attention, lambda: attention.backward(dz, sources, contexts))
    name = {1: "self_attention", 2: "double_attention"}[count]
    for launch in launches:
        yield _case(f"{name} {dtype} {precision} C={channels} keys={keys}", launch)


def aot_cases() -> Iterator[Case]:
    """Every launch of both operators, forward and backward, in the default configurations."""
    for channels in (64, 128):
        for keys in (16, None):
            yield from _attention_cases(torch.float32, "tf32", channels, keys, 2)
            yield from _attention_cases(torch.bfloat16, "ieee", channels, keys, 2)
    for keys in (16, None):
        yield from _attention_cases(torch.float32, "ieee", 64, keys, 2)
    yield from _attention_cases(torch.float16, "ieee", 64, 16, 1)
    for channels in (128, 256):
        yield from _attention_cases(torch.float32, "tf32", channels, channels, 2)
        yield from _attention_cases(torch.bfloat16, "ieee", channels, channels, 2)
