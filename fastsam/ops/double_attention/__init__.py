"""`double_attention`: queries from the hidden state attend to the hidden state and to the memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._attention import Source
from fastsam.ops._attention.autograd import (
    attention,
    backward,
    contexts_of,
    fake_contexts,
    forward,
    given_contexts,
    widest,
)
from fastsam.ops._check import Arguments
from fastsam.ops.double_attention import eager


def double_attention(
    h: Tensor,
    m: Tensor,
    score_h: Tensor,
    score_m: Tensor,
    score_bias_h: Tensor,
    score_bias_m: Tensor,
    value_h: Tensor,
    value_m: Tensor,
    value_bias: Tensor,
    *,
    key_h: Tensor | None = None,
    key_m: Tensor | None = None,
) -> Tensor:
    """The feature aggregation of SAM (SA-ConvLSTM paper, equations 2-7) with composed 1x1 maps.

    For every position i, with the maps as columns h_j and m_j of length C:

        e_h[i, j] = (score_h h_i + score_bias_h) . (key_h h_j)        R_h[:, i] = sum_j softmax_j(e_h[i, :])_j h_j
        e_m[i, j] = (score_m h_i + score_bias_m) . (key_m m_j)        R_m[:, i] = sum_j softmax_j(e_m[i, :])_j m_j
        z = value_h R_h + value_m R_m + value_bias

    Memory is O(N), N = H*W, on every back end but eager. The back end `cuda` serves up to 256 value channels, and as
    many channels as a block's shared memory holds: 128 on every card (float64: 64 on compute capability 6.1, 80 on
    7.5); where a gradient is wanted and the backward pass has no room, the forward pass says so. The back end `triton`
    serves up to 256 channels of maps and of queries.

    Args:
        h: hidden state, (B, C, H, W); read without a copy when its last two dimensions are dense.
        m: memory, (B, C, H, W).
        score_h, score_m: query maps, (C, C), or (D, C) where keys are given.
        score_bias_h, score_bias_m: (C,), or (D,) where keys are given.
        value_h, value_m: value maps, (Cz, C).
        value_bias: (Cz,).
        key_h, key_m: key maps, (D, C); both or none. None means that h and m are the keys as they are, with the key
            map folded into the query map, score = key^T query.

    Returns:
        z, (B, Cz, H, W), contiguous.

    Raises:
        TypeError: an argument is no tensor, not floating-point, or of another dtype than h.
        ValueError: a shape or device does not fit, or only one of key_h and key_m is given.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    arguments = (h, m, score_h, score_m, score_bias_h, score_bias_m, value_h, value_m, value_bias, key_h, key_m)
    if isinstance(h, Tensor) and _dispatch.autocast_enabled(h):
        return _dispatch.without_autocast(_double_attention, *arguments)
    return _double_attention(*arguments)


def _double_attention(*arguments: Any) -> Tensor:
    check_arguments(*arguments)
    *required, key_h, key_m = arguments
    if _dispatch.needs_registered_operator(arguments) and backends.selected() != "eager":
        return torch.ops.fastsam.double_attention(*arguments, _dispatch.keeps_context(arguments))[0]
    sources, value_bias = _sources(*arguments)
    backend = _dispatch.choose("double_attention", arguments[0], widest(sources, value_bias))
    if backend == "eager":
        return eager.double_attention(*required, key_h=key_h, key_m=key_m)
    return attention("double_attention", backend, sources, value_bias)


def check_arguments(
    h: Any,
    m: Any,
    score_h: Any,
    score_m: Any,
    score_bias_h: Any,
    score_bias_m: Any,
    value_h: Any,
    value_m: Any,
    value_bias: Any,
    key_h: Any,
    key_m: Any,
) -> None:
    check = Arguments("double_attention")
    check.tensor("h", h, "B", "C", "H", "W")
    check.tensor("m", m, "B", "C", "H", "W")
    if (key_h is None) != (key_m is None):
        given, missing = ("key_m", "key_h") if key_h is None else ("key_h", "key_m")
        raise ValueError(f"double_attention: {given} is given but {missing} is None; give both key maps or none")
    queries = "C" if key_h is None else "D"
    if key_h is not None:
        check.tensor("key_h", key_h, "D", "C")
        check.tensor("key_m", key_m, "D", "C")
    check.tensor("score_h", score_h, queries, "C")
    check.tensor("score_m", score_m, queries, "C")
    check.tensor("score_bias_h", score_bias_h, queries)
    check.tensor("score_bias_m", score_bias_m, queries)
    check.tensor("value_h", value_h, "Cz", "C")
    check.tensor("value_m", value_m, "Cz", "C")
    check.tensor("value_bias", value_bias, "Cz")


def _sources(
    h: Tensor,
    m: Tensor,
    score_h: Tensor,
    score_m: Tensor,
    score_bias_h: Tensor,
    score_bias_m: Tensor,
    value_h: Tensor,
    value_m: Tensor,
    value_bias: Tensor,
    key_h: Tensor | None,
    key_m: Tensor | None,
) -> tuple[list[Source], Tensor]:
    return [
        Source(h, score_h, score_bias_h, value_h, key_h),
        Source(m, score_m, score_bias_m, value_m, key_m),
    ], value_bias


def _implementation(*arguments_and_keep: Any) -> tuple[Tensor, ...]:
    *arguments, keep = arguments_and_keep
    check_arguments(*arguments)
    sources, value_bias = _sources(*arguments)
    backend = backends.choose("double_attention", arguments[0], widest(sources, value_bias))
    z, contexts = forward(backend, sources, value_bias, keep)
    return z, *given_contexts(contexts, z, 2)


def _fake(*arguments_and_keep: Any) -> tuple[Tensor, ...]:
    h, *_, value_bias, _, _, keep = arguments_and_keep
    z = h.new_empty(h.shape[0], value_bias.shape[0], *h.shape[2:])
    return z, *fake_contexts(h.shape, h, 2 * keep, 2)


def _backward_implementation(dz: Tensor, *saved: Any) -> list[Tensor]:
    arguments, contexts = saved[:11], contexts_of(saved[11:])
    sources, value_bias = _sources(*arguments)
    backend = backends.choose("double_attention", arguments[0], widest(sources, value_bias))
    (dh, dm), (of_h, of_m), dvalue_bias = backward(backend, dz, sources, contexts)
    gradients = [dh, dm, of_h.score, of_m.score, of_h.score_bias, of_m.score_bias, of_h.value, of_m.value, dvalue_bias]
    return [*gradients, *(key for key in (of_h.key, of_m.key) if key is not None)]


def _backward_fake(dz: Tensor, *saved: Any) -> list[Tensor]:
    return _dispatch.empty_gradients(saved[:11])


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *arguments, ctx.keep = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*arguments, *output[1:])


def _backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _dispatch.check_context_kept("double_attention", ctx.keep)
    gradients = torch.ops.fastsam.double_attention_backward(dz, *ctx.saved_tensors)
    return (*gradients, *([None] * (12 - len(gradients))))


_ARGUMENTS = (
    "Tensor h, Tensor m, Tensor score_h, Tensor score_m, Tensor score_bias_h, Tensor score_bias_m, "
    "Tensor value_h, Tensor value_m, Tensor value_bias"
)

_KEYS = "Tensor? key_h=None, Tensor? key_m=None"
_CONTEXT = "Tensor r_h, Tensor lse_h, Tensor shift_h, Tensor r_m, Tensor lse_m, Tensor shift_m"

_dispatch.register(
    "double_attention",
    f"({_ARGUMENTS}, {_KEYS}, bool keep=True) -> (Tensor z, {_CONTEXT})",
    f"(Tensor dz, {_ARGUMENTS}, Tensor? key_h, Tensor? key_m, {_CONTEXT}) -> Tensor[]",
    implementation=_implementation,
    fake=_fake,
    backward_implementation=_backward_implementation,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
