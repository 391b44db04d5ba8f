"""How the attention operators use a back end: windows, PyTorch's graph, and the contexts of registered operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops import _dispatch
from fastsam.ops._attention import Context, Source, SourceGradients, implementation, windows
from fastsam.ops._dispatch import arithmetic


def sources_of(arguments: Sequence[Tensor | None]) -> list[Source]:
    """The sources from the flat list x, score, score_bias, value, key of each."""
    return [Source(*arguments[start : start + 5]) for start in range(0, len(arguments), 5)]  # type: ignore[arg-type]


def flatten(sources: Sequence[Source]) -> tuple[Tensor | None, ...]:
    """The flat list that `sources_of` reads."""
    return tuple(tensor for source in sources for tensor in source)


def widest(sources: Sequence[Source], value_bias: Tensor) -> int:
    """The largest number of channels of the maps, the queries and the values, by which a kernel finds room or none."""
    return max(sources[0].x.shape[1], value_bias.shape[0], *(source.score.shape[0] for source in sources))


def forward(
    backend: str, sources: Sequence[Source], value_bias: Tensor, save: bool, window: tuple[int, int] | None = None
) -> tuple[Tensor, list[Context]]:
    """z, and the contexts for `backward` (empty unless `save`), of each window by itself.

    The back end `cuda` reads and writes windows where they lie, the others get a batch of them.
    """
    if window is None or backend == "cuda" or window == tuple(sources[0].x.shape[2:]):
        of_windows = {"window": window} if backend == "cuda" else {}
        return implementation(backend).forward(sources, value_bias, save=save, **of_windows)
    z, contexts = implementation(backend).forward(_cut(sources, window), value_bias, save=save)
    return windows.merge(z, sources[0].x.shape), contexts


def backward(
    backend: str, dz: Tensor, sources: Sequence[Source], contexts: Sequence[Context]
) -> tuple[list[Tensor], list[SourceGradients], Tensor]:
    """The gradients with respect to each source's map, each source's weights, and the value bias."""
    height, width = contexts[0].r.shape[2:]
    if backend == "cuda" or (height, width) == tuple(dz.shape[2:]):
        return implementation(backend).backward(dz, sources, contexts)
    cut = windows.split(dz, (height, width)), _cut(sources, (height, width)), contexts
    maps, *of_weights = implementation(backend).backward(*cut)
    return [windows.merge(dx, dz.shape) for dx in maps], *of_weights


def _cut(sources: Sequence[Source], window: tuple[int, int]) -> list[Source]:
    return [source._replace(x=windows.split(source.x, window)) for source in sources]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, backend: str, window: Any, value_bias: Tensor, *flat: Tensor | None) -> Tensor:
        z, contexts = forward(backend, sources_of(flat), value_bias, True, window)
        ctx.operator, ctx.backend = operator, backend
        ctx.save_for_backward(*flat, *(tensor for context in contexts for tensor in context))
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        saved = ctx.saved_tensors
        count = len(saved) // 8
        flat, sources, contexts = saved[: 5 * count], sources_of(saved[: 5 * count]), contexts_of(saved[5 * count :])
        maps, weights, dvalue_bias = backward(ctx.backend, dz.detach(), sources, contexts)
        gradients: list[Tensor | None] = [dvalue_bias]
        for dx, (dscore, dscore_bias, dvalue, dkey) in zip(maps, weights, strict=True):
            gradients += [dx, dscore, dscore_bias, dvalue, dkey]
        return (None, None, None, *_dispatch.first_derivative_only(ctx.operator, gradients, [dz, *flat]))


def contexts_of(tensors: Sequence[Tensor]) -> list[Context]:
    """The contexts from the flat list r, lse, shift of each source."""
    return [Context(*tensors[start : start + 3]) for start in range(0, len(tensors), 3)]


def attention(
    operator: str,
    backend: str,
    sources: Sequence[Source],
    value_bias: Tensor,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """The output z of a compiled back end, with its gradient where one is wanted."""
    flat = flatten(sources)
    if _dispatch.wants_gradient([value_bias, *flat]):
        return _Attention.apply(operator, backend, window, value_bias, *flat)
    return forward(backend, sources, value_bias, False, window)[0]


def given_contexts(contexts: Sequence[Context], like: Tensor, sources: int) -> list[Tensor]:
    """The flat list of contexts that a registered operator returns, for so many sources: empty what was not kept."""
    kept = [tensor for context in contexts for tensor in context]
    return kept + [like.new_empty(0, dtype=arithmetic(like.dtype)) for _ in range(3 * sources - len(kept))]


def fake_contexts(shape: Sequence[Any], like: Tensor, kept: int, sources: int) -> list[Tensor]:
    """`given_contexts` without their numbers, for maps of the shape (B, C, H, W) and so many kept ones."""
    batch, channels, height, width = shape
    shapes = ((batch, channels, height, width), (batch, height * width), (batch, channels))
    tensors = [like.new_empty(of, dtype=arithmetic(like.dtype)) for _ in range(kept) for of in shapes]
    return given_contexts(contexts_of(tensors), like, sources)
