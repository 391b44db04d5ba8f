"""The attention operators on the compiled kernels: csrc/cpu/attention_forward.cpp, attention_backward.cpp."""

from collections.abc import Sequence

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


def _sizes(h: Tensor, value_channels: int) -> tuple[int, int, int, int]:
    batch, channels, height, width = h.shape
    return batch, channels, value_channels, height * width


def forward(sources: Sequence[Source], value_bias: Tensor, save: bool) -> tuple[Tensor, list[Context]]:
    """z, and the contexts for `backward` (empty unless `save`)."""
    sources = [_readable(source) for source in sources]
    h = sources[0].x
    wide = arithmetic(h.dtype)
    bias = weights(value_bias, wide)
    z = new_map(h, value_bias.shape[0])
    shapes = (h.shape, (h.shape[0], h.shape[2] * h.shape[3]), h.shape[:2])
    contexts = [
        Context(*(torch.empty(shape, dtype=wide, device=h.device) for shape in shapes)) for _ in sources if save
    ]
    if z.numel() > 0:
        fields = [*_sizes(h, value_bias.shape[0]), len(sources)]
        for source in sources:
            fields += _source_fields(source)
        fields += [address(bias), address(z)]
        fields += [address(context.r) for context in contexts] or [0] * len(sources)
        fields += [address(context.lse) for context in contexts] or [0] * len(sources)
        fields += [address(context.shift) for context in contexts] or [0] * len(sources)
        run("attention_forward", h, fields)
    return z, contexts


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
    fields = [*_sizes(h, dz.shape[1]), len(sources)]
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
