"""The attention operators on the compiled kernels: attention_*.cpp in csrc/cpu, attention_*.cu in csrc/cuda."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops._attention import Context, Source, SourceGradients
from fastsam.ops._dispatch import arithmetic
from fastsam.ops._native import address, dense, map_fields, new_map, run, weights


def _readable(source: Source) -> Source:
    x, *rest = source
    return Source(dense(x), *(weights(weight, arithmetic(x.dtype)) for weight in rest))  # type: ignore[arg-type]


def _source_fields(source: Source) -> tuple[int, ...]:
    x, score, score_bias, value, key = source
    return (*map_fields(x), score.shape[0], address(score), address(score_bias), address(value), address(key))


def _sizes(h: Tensor, value_channels: int, window: Sequence[int]) -> tuple[int, ...]:
    batch, channels, height, width = h.shape
    if tuple(window) == (height, width):
        return batch, channels, value_channels, height * width, 0, 0, 0
    down, across = height // window[0], width // window[1]
    return batch * down * across, channels, value_channels, window[0] * window[1], across, down, window[1]


def forward(
    sources: Sequence[Source], value_bias: Tensor, save: bool, window: Sequence[int] | None = None
) -> tuple[Tensor, list[Context]]:
    """z, and the contexts for `backward` (empty unless `save`), of windows (height, width) on a GPU only.

    Raises:
        RuntimeError: a block has not the shared memory that so many channels need on the GPU; with `save`, for
            `backward` either.
    """
    h = sources[0].x
    window = window or h.shape[2:]
    z, contexts = new_map(h, value_bias.shape[0]), _new_contexts(sources, window, save)
    if z.numel() > 0:
        fields, _operands = _forward_fields(sources, value_bias, window, z, contexts)
        run("attention_forward", h, fields)
    return z, contexts


def forward_with_gates(
    sources: Sequence[Source], value_bias: Tensor, m: Tensor, pointwise: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor | None, list[Context]]:
    """h_hat and m_new of 1x1 gates on z and the first source, by the kernel that the GPU has for both.

    z is None, and the contexts are empty, unless `save`.
    """
    h = sources[0].x
    h_hat, m_new = new_map(h, h.shape[1]), new_map(h, h.shape[1])
    z, contexts = new_map(h, value_bias.shape[0]) if save else None, _new_contexts(sources, h.shape[2:], save)
    if h.numel() > 0:
        # The kernel reads a memory that is attended to once, where it is the same in memory.
        given, m = m, dense(m)
        sources = [source._replace(x=m) if source.x is given else source for source in sources]
        fields, _operands = _forward_fields(sources, value_bias, h.shape[2:], z, contexts)
        of_gates = [weights(tensor, arithmetic(h.dtype)) for tensor in (pointwise, bias)]
        fields += [*map_fields(m), *map(address, of_gates), address(h_hat), address(m_new)]
        run("attention_gates_forward", h, fields)
    return h_hat, m_new, z, contexts


def _new_contexts(sources: Sequence[Source], window: Sequence[int], save: bool) -> list[Context]:
    h = sources[0].x
    entries, channels, _, positions, *_ = _sizes(h, 0, window)
    shapes = ((entries, channels, *window), (entries, positions), (entries, channels))
    return [
        Context(*(torch.empty(shape, dtype=arithmetic(h.dtype), device=h.device) for shape in shapes))
        for _ in sources
        if save
    ]


def _forward_fields(
    sources: Sequence[Source],
    value_bias: Tensor,
    window: Sequence[int],
    z: Tensor | None,
    contexts: Sequence[Context],
) -> tuple[list[int], list[Any]]:
    """The fields of a forward pass, and the tensors that some of their addresses belong to, to be kept until it ran."""
    sources = [_readable(source) for source in sources]
    h = sources[0].x
    bias = weights(value_bias, arithmetic(h.dtype))
    fields = [*_sizes(h, value_bias.shape[0], window), len(sources)]
    for source in sources:
        fields += _source_fields(source)
    fields += [address(bias), address(z)]
    for kind in zip(*contexts, strict=True) if contexts else [[None] * len(sources)] * 3:
        fields += map(address, kind)
    return fields, [*sources, bias]


def backward(
    dz: Tensor, sources: Sequence[Source], contexts: Sequence[Context]
) -> tuple[list[Tensor], list[SourceGradients], Tensor]:
    """The gradients with respect to each source's map, each source's weights, and the value bias."""
    dz, sources = dense(dz), [_readable(source) for source in sources]
    h = sources[0].x
    maps = [new_map(h, h.shape[1]) for _ in sources]
    of_weights = [
        SourceGradients(*(None if weight is None else torch.empty_like(weight) for weight in source[1:]))  # type: ignore[arg-type]
        for source in sources
    ]
    dvalue_bias = torch.empty(dz.shape[1], dtype=arithmetic(dz.dtype), device=dz.device)
    if h.numel() == 0:
        for tensor in (dvalue_bias, *(gradient for of in of_weights for gradient in of if gradient is not None)):
            tensor.zero_()
        return maps, *_as(h.dtype, of_weights, dvalue_bias)
    fields = [*_sizes(h, dz.shape[1], contexts[0].r.shape[2:]), len(sources)]
    for source in sources:
        fields += _source_fields(source)
    fields += map_fields(dz)
    fields += [address(context.r) for context in contexts]
    fields += [address(context.lse) for context in contexts]
    fields += [address(context.shift) for context in contexts]
    for dx, of in zip(maps, of_weights, strict=True):
        fields += [address(dx), address(of.score), address(of.score_bias), address(of.value), address(of.key)]
    fields.append(address(dvalue_bias))
    run("attention_backward", h, fields)
    return maps, *_as(h.dtype, of_weights, dvalue_bias)


def _as(
    dtype: torch.dtype, of_weights: list[SourceGradients], dvalue_bias: Tensor
) -> tuple[list[SourceGradients], Tensor]:
    """The gradients of the weights in the dtype of the weights."""
    cast = [SourceGradients(*(None if g is None else g.to(dtype) for g in of)) for of in of_weights]  # type: ignore[arg-type]
    return cast, dvalue_bias.to(dtype)
