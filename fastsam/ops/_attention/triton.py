"""The attention operators on the Triton kernels of triton_forward.py and triton_backward.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops._attention import Context, Source, SourceGradients
from fastsam.ops._attention import triton_tiles as tiles
from fastsam.ops._attention.triton_backward import attention_column_gradients, attention_query_gradients
from fastsam.ops._attention.triton_forward import attention_forward
from fastsam.ops._attention.triton_tiles import Sizes, whole
from fastsam.ops._attention.triton_weights import attention_sum_parts
from fastsam.ops._dispatch import arithmetic
from fastsam.ops._native import dense, new_map, weights
from fastsam.ops._triton.configurations import Configuration, launched
from fastsam.ops._triton.launch import ceil_div, run, strides

POSITIONS_OF_PART = 512
"""So many positions of the batch share a part of the weights' gradients, which is not much larger than they are."""

MOST_PARTS = 64
"""Larger maps have longer parts, not more of them."""

SUMS = 256
"""Elements of the weights' gradients that a program of the last launch adds up."""

_NO_SOURCE = Source(*[None] * 5)  # type: ignore[arg-type]
_NO_CONTEXT = Context(*[None] * 3)  # type: ignore[arg-type]
_NO_GRADIENTS = SourceGradients(*[None] * 4)  # type: ignore[arg-type]


def forward(
    sources: Sequence[Source], value_bias: Tensor, save: bool, window: Sequence[int] | None = None
) -> tuple[Tensor, list[Context]]:
    """z, and the contexts for `backward` (empty unless `save`).

    Raises:
        DoesNotFitError: more than 256 channels of maps or queries, or no room for any tiles on this card.
        ValueError: a window that is not the whole map; callers cut maps into windows for this back end.
    """
    h = sources[0].x
    if window is not None and tuple(window) != tuple(h.shape[2:]):
        raise ValueError(f"attention_forward: window must be the whole map {tuple(h.shape[2:])}, got {tuple(window)}")
    z, contexts = new_map(h, value_bias.shape[0]), _new_contexts(sources) if save else []
    if z.numel() == 0:
        return z, contexts
    sizes, positions = Sizes.of(sources, value_bias.shape[0]), h.shape[2] * h.shape[3]
    of_h, of_m = _two([_readable(source) for source in sources], _NO_SOURCE)
    arguments = [*_map(of_h.x), *_map(of_m.x), *of_h[1:], *of_m[1:], weights(value_bias, h.dtype), z]
    arguments += [*_tensors_of(contexts), positions, len(sources)]

    def launch(choice: Configuration) -> None:
        grid = (h.shape[0] * ceil_div(positions, choice["BLOCK_QUERIES"]),)
        constants = {**sizes.constants(), **choice, "SAVE": save, "WHOLE": whole(positions, choice)}
        run(attention_forward, grid, h, *arguments, **constants)

    launched(sizes.operator, "attention_forward", h, sizes.numbers, tiles.forward(sizes), launch)
    return z, contexts


def backward(
    dz: Tensor, sources: Sequence[Source], contexts: Sequence[Context]
) -> tuple[list[Tensor], list[SourceGradients], Tensor]:
    """The gradients with respect to each source's map, each source's weights, and the value bias."""
    h = sources[0].x
    maps = [new_map(h, h.shape[1]) for _ in sources]
    gradients = [_new_gradients(source) for source in sources]
    dvalue_bias = dz.new_empty(dz.shape[1])
    if h.numel() == 0:
        for tensor in (dvalue_bias, *(gradient for of in gradients for gradient in of if gradient is not None)):
            tensor.zero_()
        return maps, gradients, dvalue_bias
    dz, sources, sizes = dense(dz), [_readable(source) for source in sources], Sizes.of(sources, dz.shape[1])
    rows = _query_gradients(sizes, dz, sources, contexts)
    parts = _column_gradients(sizes, dz, sources, contexts, rows, maps)
    _sum_parts(sizes, parts, gradients, dvalue_bias)
    return maps, gradients, dvalue_bias


def _query_gradients(
    sizes: Sizes, dz: Tensor, sources: Sequence[Source], contexts: Sequence[Context]
) -> tuple[Tensor, ...]:
    """The first launch: query, dR, dquery and delta of every position of every source."""
    batch, _, height, width = dz.shape
    positions, constants = height * width, sizes.constants()
    channels, depth = constants["CHANNELS"], constants["DEPTH"]
    query, dr, dquery = (dz.new_empty(len(sources), batch, positions, size) for size in (depth, channels, depth))
    delta = dz.new_empty((len(sources), batch, positions), dtype=arithmetic(dz.dtype))
    rows = (query, dr, dquery, delta)
    of_h, of_m = _two(sources, _NO_SOURCE)
    arguments = [*_map(of_h.x), *_map(of_m.x), *of_h[1:], *of_m[1:], *_map(dz), *_tensors_of(contexts)]
    arguments += [*rows, batch, positions]

    def launch(choice: Configuration) -> None:
        grid = (len(sources) * batch * ceil_div(positions, choice["BLOCK_QUERIES"]),)
        fits = {"WHOLE": whole(positions, choice)}
        run(attention_query_gradients, grid, dz, *arguments, **constants, **choice, **fits)

    launched(sizes.operator, "attention_query_gradients", dz, sizes.numbers, tiles.query_gradients(sizes), launch)
    return rows


def _column_gradients(
    sizes: Sizes,
    dz: Tensor,
    sources: Sequence[Source],
    contexts: Sequence[Context],
    rows: Sequence[Tensor],
    maps: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The second launch: the maps' gradients, and parts of the weights' and of the key maps' gradients."""
    batch, _, height, width = dz.shape
    positions, wide = height * width, arithmetic(dz.dtype)
    splits = min(ceil_div(batch * positions, POSITIONS_OF_PART), MOST_PARTS)
    elements = len(sources) * ((sizes.D + sizes.CZ) * sizes.C + sizes.D) + sizes.CZ
    parts = dz.new_empty((splits, elements), dtype=wide)
    dkeys = torch.empty_like(rows[0]) if sizes.HAS_KEYS else None
    of_h, of_m = _two(sources, _NO_SOURCE)
    arguments = [*_map(of_h.x), *_map(of_m.x), of_h.score, of_m.score, of_h.key, of_m.key, *_map(dz)]
    arguments += [*_tensors_of(contexts), *rows, dkeys, *_two(maps, None), parts]

    def launch(choice: Configuration) -> Tensor | None:
        blocks, key_parts = batch * ceil_div(positions, choice["BLOCK_COLUMNS"]), None
        if sizes.HAS_KEYS:
            key_parts = dz.new_empty((blocks, len(sources), sizes.D, sizes.C), dtype=wide)
        down = ceil_div(sizes.D, choice["SCORE_TILE"]) + ceil_div(sizes.CZ, choice["VALUE_TILE"])
        grid = (len(sources) * (blocks + splits * down * ceil_div(sizes.C, choice["CHANNEL_TILE"])),)
        constants = {**sizes.constants(), **choice, "WHOLE": whole(positions, choice)}
        run(attention_column_gradients, grid, dz, *arguments, key_parts, batch, positions, splits, **constants)
        return key_parts

    candidates = tiles.column_gradients(sizes)
    return parts, launched(sizes.operator, "attention_column_gradients", dz, sizes.numbers, candidates, launch)


def _sum_parts(
    sizes: Sizes, parts: tuple[Tensor, Tensor | None], gradients: Sequence[SourceGradients], dvalue_bias: Tensor
) -> None:
    """The third launch: the weights' gradients."""
    of_positions, of_columns = parts
    programs, count = ceil_div(of_positions.shape[1], SUMS), 0
    if of_columns is not None:
        programs, count = programs + ceil_div(of_columns[0].numel(), SUMS), of_columns.shape[0]
    of_h, of_m = _two(gradients, _NO_GRADIENTS)
    arguments = [of_positions, of_positions.shape[0], of_columns, count, *of_h, *of_m, dvalue_bias]
    constants = {name: getattr(sizes, name) for name in ("C", "D", "CZ", "SOURCES", "HAS_KEYS")}
    run(attention_sum_parts, (programs,), dvalue_bias, *arguments, BLOCK=SUMS, **constants)


def _map(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A map and its strides of batch and channel."""
    return (x, *strides(x))  # type: ignore[return-value]


def _two(items: Sequence[Any], none: Any) -> Sequence[Any]:
    """What belongs to h and to m, `none` for what is not there."""
    return [*items, none, none][:2]


def _tensors_of(contexts: Sequence[Context]) -> list[Tensor | None]:
    return [tensor for context in _two(contexts, _NO_CONTEXT) for tensor in context]


def _readable(source: Source) -> Source:
    x, *rest = source
    return Source(dense(x), *(weights(weight, x.dtype) for weight in rest))  # type: ignore[arg-type]


def _new_contexts(sources: Sequence[Source]) -> list[Context]:
    h = sources[0].x
    batch, channels, height, width = h.shape
    shapes = (h.shape, (batch, height * width), (batch, channels))
    wide = arithmetic(h.dtype)
    return [Context(*(h.new_empty(shape, dtype=wide) for shape in shapes)) for _ in sources]


def _new_gradients(source: Source) -> SourceGradients:
    """Contiguous, unlike perhaps the weights."""
    new = (None if weight is None else weight.new_empty(weight.shape) for weight in source[1:])
    return SourceGradients(*new)  # type: ignore[arg-type]
