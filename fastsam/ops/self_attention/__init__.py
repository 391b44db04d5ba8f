"""`self_attention`: a map attends to itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam import backends
from fastsam.ops import _dispatch
from fastsam.ops._attention import Source, windows
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
from fastsam.ops.self_attention import eager


def self_attention(
    x: Tensor,
    score: Tensor,
    score_bias: Tensor,
    value: Tensor,
    value_bias: Tensor,
    *,
    key: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Self-attention over the positions of a map (SA-ConvLSTM paper, equations 2-4) with composed 1x1 maps.

    For every position i, with the map as columns x_j of length C:

        e[i, j] = (score x_i + score_bias) . (key x_j)        R[:, i] = sum_j softmax_j(e[i, :])_j x_j
        z = value R + value_bias

    Memory is O(N), N = H*W, on every back end but eager.

    Args:
        x: (B, C, H, W); read without a copy when its last two dimensions are dense.
        score: query map, (C, C), or (D, C) where a key map is given.
        score_bias: (C,), or (D,) where a key map is given.
        value: value map, (Cz, C).
        value_bias: (Cz,).
        key: key map, (D, C). None means that x is the key as it is, with the key map folded into the query map,
            score = key^T query.
        window: (height, width) that divide (H, W): positions attend to those of their own window only, as the
            multi-scale attention of CMS-LSTM does (its section 3.2). None is one window, the whole map. The back end
            `cuda` reads and writes the windows where they lie; others copy the map into a batch of windows, once in
            each pass.

    Returns:
        z, (B, Cz, H, W), contiguous.

    Raises:
        TypeError: an argument is no tensor, not floating-point, or of another dtype than x; window is no pair of
            integers.
        ValueError: a shape or device does not fit, or the map is no whole number of windows.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    arguments = (x, score, score_bias, value, value_bias, key, window)
    if isinstance(x, Tensor) and _dispatch.autocast_enabled(x):
        return _dispatch.without_autocast(_self_attention, *arguments)
    return _self_attention(*arguments)


def _self_attention(*arguments_and_window: Any) -> Tensor:
    *arguments, window = arguments_and_window
    check_arguments(*arguments)
    if window is not None:
        windows.check(window, arguments[0])
    if _dispatch.needs_registered_operator(arguments) and backends.selected() != "eager":
        return torch.ops.fastsam.self_attention(*arguments, window, _dispatch.keeps_context(arguments))[0]
    sources, value_bias = _sources(*arguments)
    backend = _dispatch.choose("self_attention", arguments[0], widest(sources, value_bias))
    if backend == "eager":
        *required, key = arguments
        return eager.self_attention(*required, key=key, window=window)
    return attention("self_attention", backend, sources, value_bias, window)


def check_arguments(x: Any, score: Any, score_bias: Any, value: Any, value_bias: Any, key: Any) -> None:
    check = Arguments("self_attention")
    check.tensor("x", x, "B", "C", "H", "W")
    queries = "C" if key is None else "D"
    if key is not None:
        check.tensor("key", key, "D", "C")
    check.tensor("score", score, queries, "C")
    check.tensor("score_bias", score_bias, queries)
    check.tensor("value", value, "Cz", "C")
    check.tensor("value_bias", value_bias, "Cz")


def _sources(
    x: Tensor, score: Tensor, score_bias: Tensor, value: Tensor, value_bias: Tensor, key: Tensor | None
) -> tuple[list[Source], Tensor]:
    return [Source(x, score, score_bias, value, key)], value_bias


def _implementation(*arguments_and_options: Any) -> tuple[Tensor, ...]:
    *arguments, window, keep = arguments_and_options
    check_arguments(*arguments)
    if window is not None:
        window = tuple(window)
        windows.check(window, arguments[0])
    sources, value_bias = _sources(*arguments)
    backend = backends.choose("self_attention", arguments[0], widest(sources, value_bias))
    z, contexts = forward(backend, sources, value_bias, keep, window)
    return z, *given_contexts(contexts, z, 1)


def _fake(*arguments_and_options: Any) -> tuple[Tensor, ...]:
    x, *_, value_bias, _, window, keep = arguments_and_options
    batch, channels, height, width = x.shape
    down, across = window or (height, width)
    of_windows = (batch * (height // down) * (width // across), channels, down, across)
    return x.new_empty(batch, value_bias.shape[0], height, width), *fake_contexts(of_windows, x, int(keep), 1)


def _backward_implementation(dz: Tensor, *saved: Any) -> list[Tensor]:
    arguments, contexts = saved[:6], contexts_of(saved[6:])
    sources, value_bias = _sources(*arguments)
    backend = backends.choose("self_attention", arguments[0], widest(sources, value_bias))
    (dx,), (of_x,), dvalue_bias = backward(backend, dz, sources, contexts)
    gradients = [dx, of_x.score, of_x.score_bias, of_x.value, dvalue_bias]
    return gradients if of_x.key is None else [*gradients, of_x.key]


def _backward_fake(dz: Tensor, *saved: Any) -> list[Tensor]:
    return _dispatch.empty_gradients(saved[:6])


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *arguments, _, ctx.keep = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*arguments, *output[1:])


def _backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _dispatch.check_context_kept("self_attention", ctx.keep)
    gradients = torch.ops.fastsam.self_attention_backward(dz, *ctx.saved_tensors)
    return (*gradients, *([None] * (8 - len(gradients))))


_ARGUMENTS = "Tensor x, Tensor score, Tensor score_bias, Tensor value, Tensor value_bias"
_CONTEXT = "Tensor r, Tensor lse, Tensor shift"

_dispatch.register(
    "self_attention",
    f"({_ARGUMENTS}, Tensor? key=None, SymInt[]? window=None, bool keep=True) -> (Tensor z, {_CONTEXT})",
    f"(Tensor dz, {_ARGUMENTS}, Tensor? key, {_CONTEXT}) -> Tensor[]",
    implementation=_implementation,
    fake=_fake,
    backward_implementation=_backward_implementation,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
