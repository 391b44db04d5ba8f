"""The autograd function that puts a compiled back end of the attention operators into PyTorch's graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops import _dispatch
from fastsam.ops._attention import Context, Source, implementation


def sources_of(arguments: Sequence[Tensor | None]) -> list[Source]:
    """The sources from the flat list x, score, score_bias, value, key of each."""
    return [Source(*arguments[start : start + 5]) for start in range(0, len(arguments), 5)]  # type: ignore[arg-type]


def flatten(sources: Sequence[Source]) -> tuple[Tensor | None, ...]:
    """The flat list that `sources_of` reads."""
    return tuple(tensor for source in sources for tensor in source)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, backend: str, window: Any, value_bias: Tensor, *flat: Tensor | None) -> Tensor:
        z, contexts = implementation(backend).forward(sources_of(flat), value_bias, save=True, window=window)
        ctx.operator, ctx.backend = operator, backend
        ctx.save_for_backward(*flat, *(tensor for context in contexts for tensor in context))
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        saved = ctx.saved_tensors
        count = len(saved) // 8
        flat, sources, contexts = saved[: 5 * count], sources_of(saved[: 5 * count]), contexts_of(saved[5 * count :])
        maps, weights, dvalue_bias = implementation(ctx.backend).backward(dz.detach(), sources, contexts)
        gradients = [dvalue_bias]
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
    """The output z of a compiled back end, with its gradient where one is wanted; `window` for the back end cuda."""
    flat = flatten(sources)
    if _dispatch.wants_gradient([value_bias, *flat]):
        return _Attention.apply(operator, backend, window, value_bias, *flat)
    return implementation(backend).forward(sources, value_bias, save=False, window=window)[0]
