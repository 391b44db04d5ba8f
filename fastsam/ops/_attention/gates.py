"""Attention and 1x1 gates as one step: one launch on a GPU, the two operators one after the other elsewhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops import _dispatch
from fastsam.ops._attention import Source, native
from fastsam.ops._attention.autograd import contexts_of, flatten, sources_of
from fastsam.ops.double_attention import check_arguments as check_double_attention
from fastsam.ops.double_attention import double_attention
from fastsam.ops.self_attention import check_arguments as check_self_attention
from fastsam.ops.self_attention import self_attention
from fastsam.ops.separable_gates import check_arguments as check_separable_gates
from fastsam.ops.separable_gates import native as native_gates
from fastsam.ops.separable_gates import separable_gates


def aggregate(sources: Sequence[Source], value_bias: Tensor) -> Tensor:
    """z, (B, Cz, H, W), by the attention operator for so many sources, one or two."""
    operands, keys = _operands(sources, value_bias), [source.key for source in sources]
    if len(sources) == 1:
        return self_attention(*operands, key=keys[0])
    return double_attention(*operands, key_h=keys[0], key_m=keys[1])


def attention_gates(
    sources: Sequence[Source], value_bias: Tensor, m: Tensor, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The feature aggregation and the memory update of SAM (SA-ConvLSTM paper, equations 2-9) with 1x1 gates.

    The same as `separable_gates(z, h, m, None, pointwise, bias)` of the attention operators' z, h being the first
    source; the back end `cuda` has one kernel for both, and z is kept for the backward pass only. Compiled code
    (torch.compile, torch.export) calls the two registered operators.

    Args:
        sources: one (`self_attention`) or two (`double_attention`) sources and their weights.
        value_bias: (Cz,).
        m: the memory to update, (B, C, H, W).
        pointwise: (3C, Cz + C, 1, 1), gate order i, g, o. bias: (3C,) or None.

    Returns:
        h_hat and m_new, both (B, C, H, W), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as those operators.
    """
    arguments: tuple[Any, ...] = (m, pointwise, bias, value_bias, *flatten(sources))
    if _dispatch.autocast_enabled(m):
        return _dispatch.without_autocast(_attention_gates, *arguments)
    return _attention_gates(*arguments)


def _attention_gates(
    m: Tensor, pointwise: Tensor, bias: Tensor | None, value_bias: Tensor, *flat: Any
) -> tuple[Tensor, Tensor]:
    sources = sources_of(flat)
    tensors = (m, pointwise, bias, value_bias, *flat)
    operator = "self_attention" if len(sources) == 1 else "double_attention"
    if _dispatch.needs_registered_operator(tensors) or _dispatch.choose(operator, m) != "cuda":
        z = aggregate(sources, value_bias)
        return separable_gates(z, sources[0].x, m, None, pointwise, bias)
    _check(sources, value_bias, m, pointwise, bias)
    if _dispatch.wants_gradient(tensors):
        return _AttentionGates.apply(operator, *tensors)
    h_hat, m_new, *_ = native.forward_with_gates(sources, value_bias, m, pointwise, bias, save=False)
    return h_hat, m_new


def _operands(sources: Sequence[Source], value_bias: Tensor) -> list[Any]:
    """The arguments of an attention operator but for the key maps, in its order: kind by kind."""
    return [part for parts in list(zip(*sources, strict=True))[:4] for part in parts] + [value_bias]


def _check(sources: Sequence[Source], value_bias: Tensor, m: Tensor, pointwise: Tensor, bias: Tensor | None) -> None:
    check = check_self_attention if len(sources) == 1 else check_double_attention
    check(*_operands(sources, value_bias), *(source.key for source in sources))
    h = sources[0].x
    z = h.new_empty(1).expand(h.shape[0], value_bias.shape[0], *h.shape[2:])
    check_separable_gates(z, h, m, None, pointwise, bias)


class _AttentionGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: str, m: Tensor, pointwise: Tensor, bias: Tensor | None, value_bias: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor]:
        sources = sources_of(flat)
        h_hat, m_new, z, contexts = native.forward_with_gates(sources, value_bias, m, pointwise, bias, save=True)
        ctx.operator, ctx.count = operator, len(flat)
        kept = (tensor for context in contexts for tensor in context)
        ctx.save_for_backward(m, pointwise, bias, value_bias, z, *flat, *kept)
        return h_hat, m_new

    @staticmethod
    def backward(ctx: Any, dh_hat: Tensor, dm_new: Tensor) -> Any:
        m, pointwise, bias, value_bias, z, *saved = ctx.saved_tensors
        flat, contexts = saved[: ctx.count], contexts_of(saved[ctx.count :])
        of_gates: list[Any] = native_gates.backward(
            dh_hat.detach(), dm_new.detach(), z, flat[0], m, None, pointwise, bias
        )
        dz, dh, dm, _, dpointwise, dbias = of_gates
        maps, weights, dvalue_bias = native.backward(dz, sources_of(flat), contexts)
        maps[0] = maps[0] + dh
        gradients = [dm, dpointwise, dbias, dvalue_bias]
        for dx, (dscore, dscore_bias, dvalue, dkey) in zip(maps, weights, strict=True):
            gradients += [dx, dscore, dscore_bias, dvalue, dkey]
        inputs = [dh_hat, dm_new, m, pointwise, bias, value_bias, *flat]
        return (None, *_dispatch.first_derivative_only(ctx.operator, gradients, inputs))
