"""Attention and 1x1 gates as one step: one launch on a GPU, the two operators one after the other elsewhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._attention import Context, Source, implementation, native
from fastsam.ops._attention.autograd import contexts_of, fake_contexts, flatten, given_contexts, sources_of, widest
from fastsam.ops.double_attention import check_arguments as check_double_attention
from fastsam.ops.double_attention import double_attention
from fastsam.ops.self_attention import check_arguments as check_self_attention
from fastsam.ops.self_attention import self_attention
from fastsam.ops.separable_gates import check_arguments as check_separable_gates
from fastsam.ops.separable_gates import implementation as gates_implementation
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
    source; the back end `cuda` has one kernel for both, and z is kept for the backward pass only.

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
    if _dispatch.needs_registered_operator(tensors) and backends.selected() != "eager":
        _check(sources, value_bias, m, pointwise, bias)
        given = [*tensors, *[None] * (_INPUTS - len(tensors)), _dispatch.keeps_context(tensors)]
        return torch.ops.fastsam.attention_gates(*given)[:2]
    operator = _operator(sources)
    if _dispatch.choose(operator, m, widest(sources, value_bias)) != "cuda":
        z = aggregate(sources, value_bias)
        return separable_gates(z, sources[0].x, m, None, pointwise, bias)
    _check(sources, value_bias, m, pointwise, bias)
    if _dispatch.wants_gradient(tensors):
        return _AttentionGates.apply(operator, *tensors)
    h_hat, m_new, *_ = _forward("cuda", sources, value_bias, m, pointwise, bias, save=False)
    return h_hat, m_new


def _operator(sources: Sequence[Source]) -> str:
    return "self_attention" if len(sources) == 1 else "double_attention"


def _operands(sources: Sequence[Source], value_bias: Tensor) -> list[Any]:
    """The arguments of an attention operator but for the key maps, in its order: kind by kind."""
    return [part for parts in list(zip(*sources, strict=True))[:4] for part in parts] + [value_bias]


def _check(sources: Sequence[Source], value_bias: Tensor, m: Tensor, pointwise: Tensor, bias: Tensor | None) -> None:
    check = check_self_attention if len(sources) == 1 else check_double_attention
    check(*_operands(sources, value_bias), *(source.key for source in sources))
    h = sources[0].x
    z = h.new_empty(1).expand(h.shape[0], value_bias.shape[0], *h.shape[2:])
    check_separable_gates(z, h, m, None, pointwise, bias)


def _of_gates(attention: str, m: Tensor) -> Any:
    """The gates' implementation beside an attention's back end: cuda has both in one, else each is chosen by itself."""
    return gates_implementation(attention if attention == "cuda" else backends.choose("separable_gates", m))


def _forward(
    backend: str,
    sources: Sequence[Source],
    value_bias: Tensor,
    m: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, list[Context]]:
    """h_hat, m_new, and z and the contexts for `_backward`, None and empty unless `save`."""
    if backend == "cuda":
        return native.forward_with_gates(sources, value_bias, m, pointwise, bias, save)
    z, contexts = implementation(backend).forward(sources, value_bias, save=save)
    h_hat, m_new = _of_gates(backend, m).forward(z, sources[0].x, m, None, pointwise, bias)
    return h_hat, m_new, z.contiguous() if save else None, contexts


def _backward(
    backend: str,
    upstream: Sequence[Tensor],
    sources: Sequence[Source],
    m: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    z: Tensor,
    contexts: Sequence[Context],
) -> list[Any]:
    """The gradients with respect to m, pointwise, bias, value_bias, and the sources as `flatten` has them."""
    of_gates = _of_gates(backend, m).backward(*upstream, z, sources[0].x, m, None, pointwise, bias)
    dz, dh, dm, _, dpointwise, dbias = of_gates
    maps, weights, dvalue_bias = implementation(backend).backward(dz, sources, contexts)
    maps[0] = maps[0] + dh
    of_sources = (Source(dx, *of_weights) for dx, of_weights in zip(maps, weights, strict=True))
    return [dm, dpointwise, dbias, dvalue_bias, *flatten(list(of_sources))]


class _AttentionGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: str, m: Tensor, pointwise: Tensor, bias: Tensor | None, value_bias: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor]:
        h_hat, m_new, z, contexts = _forward("cuda", sources_of(flat), value_bias, m, pointwise, bias, save=True)
        ctx.operator, ctx.count = operator, len(flat)
        kept = (tensor for context in contexts for tensor in context)
        ctx.save_for_backward(m, pointwise, bias, value_bias, z, *flat, *kept)
        return h_hat, m_new

    @staticmethod
    def backward(ctx: Any, dh_hat: Tensor, dm_new: Tensor) -> Any:
        m, pointwise, bias, value_bias, z, *saved = ctx.saved_tensors
        flat, contexts = saved[: ctx.count], contexts_of(saved[ctx.count :])
        upstream = dh_hat.detach(), dm_new.detach()
        gradients = _backward("cuda", upstream, sources_of(flat), m, pointwise, bias, z, contexts)
        inputs = [dh_hat, dm_new, m, pointwise, bias, value_bias, *flat]
        return (None, *_dispatch.first_derivative_only(ctx.operator, gradients, inputs))


# The registered operator: its second source is None where there is one only, and its contexts are empty then.
_INPUTS = 14


def _given(flat: Sequence[Tensor | None]) -> list[Source]:
    """The sources of the arguments."""
    return sources_of(flat if flat[5] is not None else flat[:5])


def _implementation(
    m: Tensor, pointwise: Tensor, bias: Tensor | None, value_bias: Tensor, *flat_and_keep: Any
) -> tuple[Tensor, ...]:
    *flat, keep = flat_and_keep
    sources = _given(flat)
    _check(sources, value_bias, m, pointwise, bias)
    backend = backends.choose(_operator(sources), m, widest(sources, value_bias))
    h_hat, m_new, z, contexts = _forward(backend, sources, value_bias, m, pointwise, bias, keep)
    return h_hat, m_new, m.new_empty(0) if z is None else z, *given_contexts(contexts, m, 2)


def _fake(m: Tensor, pointwise: Tensor, bias: Tensor | None, value_bias: Tensor, *flat_and_keep: Any) -> Any:
    *flat, keep = flat_and_keep
    z = m.new_empty(m.shape[0], value_bias.shape[0], *m.shape[2:]) if keep else m.new_empty(0)
    kept = len(_given(flat)) if keep else 0
    return m.new_empty(m.shape), m.new_empty(m.shape), z, *fake_contexts(m.shape, m, kept, 2)


def _backward_implementation(dh_hat: Tensor, dm_new: Tensor, *saved: Any) -> list[Tensor]:
    m, pointwise, bias, value_bias, *flat = saved[:_INPUTS]
    z, *kept = saved[_INPUTS:]
    sources = _given(flat)
    contexts = contexts_of(kept)[: len(sources)]
    backend = backends.choose(_operator(sources), m, widest(sources, value_bias))
    gradients = _backward(backend, (dh_hat, dm_new), sources, m, pointwise, bias, z, contexts)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(dh_hat: Tensor, dm_new: Tensor, *saved: Any) -> list[Tensor]:
    return _dispatch.empty_gradients(saved[:_INPUTS])


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *arguments, ctx.keep = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*arguments, *output[2:])


def _registered_backward(ctx: Any, dh_hat: Tensor, dm_new: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _dispatch.check_context_kept("attention_gates", ctx.keep)
    gradients = iter(torch.ops.fastsam.attention_gates_backward(dh_hat, dm_new, *saved))
    return *(None if tensor is None else next(gradients) for tensor in saved[:_INPUTS]), None


_ARGUMENTS = (
    "Tensor m, Tensor pointwise, Tensor? bias, Tensor value_bias, "
    "Tensor h, Tensor score_h, Tensor score_bias_h, Tensor value_h, Tensor? key_h"
)
_SECOND = ("attended_m", "score_m", "score_bias_m", "value_m", "key_m")
_CONTEXT = "Tensor z, Tensor r_h, Tensor lse_h, Tensor shift_h, Tensor r_m, Tensor lse_m, Tensor shift_m"

_dispatch.register(
    "attention_gates",
    f"({_ARGUMENTS}, {', '.join(f'Tensor? {name}=None' for name in _SECOND)}, bool keep=True) "
    f"-> (Tensor h_hat, Tensor m_new, {_CONTEXT})",
    f"(Tensor dh_hat, Tensor dm_new, {_ARGUMENTS}, {', '.join(f'Tensor? {name}' for name in _SECOND)}, {_CONTEXT}) "
    "-> Tensor[]",
    implementation=_implementation,
    fake=_fake,
    backward_implementation=_backward_implementation,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_registered_backward,
)
