"""`lstm_gates`, `memory_gates` and `norm_gate` on Triton: kernels in triton_forward.py and triton_backward.py."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops._gates.triton_backward import ROWS_AT_ONCE, backward_kernel, norm_backward_kernel
from fastsam.ops._gates.triton_forward import forward_kernel, moments_kernel
from fastsam.ops._gates.triton_terms import PARTS_AT_ONCE
from fastsam.ops._gates.update import Term, Update, new_statistics
from fastsam.ops._native import dense, new_map, weights
from fastsam.ops._triton.configurations import MOST_PROBLEMS, Configuration, Result, distinct, launched
from fastsam.ops._triton.launch import ceil_div, padded, run, strides

_MOMENTS_TILE = 4096  # numbers a program has in registers at a time
_NO_TERM = Term(None, None, None)  # type: ignore[arg-type]
_OPERATORS = {"lstm": "lstm_gates", "memory": "memory_gates", "product": "norm_gate"}


def tile(rows: int, positions: int, numbers: int) -> Configuration:
    """A tile of a (rows, positions) map, of about so many numbers; as wide as can be, positions being contiguous."""
    position_tile = min(padded(positions), numbers)
    return {"ROW_TILE": min(padded(rows, 1), numbers // position_tile), "POSITION_TILE": position_tile}


@functools.lru_cache(MOST_PROBLEMS)
def candidates(channels: int, positions: int) -> tuple[Configuration, ...]:
    """Tiles of the state. A thread has all gates of each of its numbers in registers: 4 or 8 numbers a thread."""
    sizes = ((512, 4), (1024, 4), (1024, 8), (2048, 8))
    return distinct(
        {**tile(channels, positions, numbers), "num_warps": warps, "num_stages": 1} for numbers, warps in sizes
    )


def _readable(terms: Sequence[Term]) -> list[Term]:
    return [
        Term(dense(x), *(None if value is None else weights(value, value.dtype) for value in norm))
        for x, *norm in terms
    ]


def _of_positions(terms: Sequence[Term]) -> bool:
    return any(term.weight is not None and term.weight.ndim == 3 for term in terms)


def _tiles(choice: Configuration, rows: int, positions: int) -> int:
    return ceil_div(rows, choice["ROW_TILE"]) * ceil_div(positions, choice["POSITION_TILE"])


def _launched(
    update: Update, kernel: str, like: Tensor, sizes: tuple[int, ...], launch: Callable[[Configuration], Result]
) -> Result:
    """What a launch returns with the tile sizes for maps like this one."""
    operator, tiles = _OPERATORS[update.kind], candidates(like.shape[1], like.shape[2] * like.shape[3])
    return launched(operator, f"{operator}_{kernel}", like, sizes, tiles, launch)


def _constants(update: Update, c: Tensor, terms: Sequence[Term]) -> dict[str, Any]:
    constants = {"KIND": update.kind, "FORM": update.form, "GATES": update.gates, "C": c.shape[1]}
    return {**constants, "OF_POSITIONS": _of_positions(terms)}


def _moments(terms: Sequence[Term], c: Tensor) -> tuple[Tensor | None, int]:
    """The moments of each sample's parts, (B, terms with a norm, parts, 3), and the number of parts."""
    maps = [term.x for term in terms if term.weight is not None]
    if not maps:
        return None, 0
    batch, rows, positions = maps[0].shape[0], maps[0].shape[1], c.shape[2] * c.shape[3]
    sizes = tile(rows, positions, _MOMENTS_TILE)
    count = _tiles(sizes, rows, positions)
    parts = min(count, PARTS_AT_ONCE.value)
    moments = torch.empty((batch, len(maps), parts, 3), dtype=torch.float32, device=c.device)
    arguments = (maps[0], maps[-1], moments, *strides(maps[0], maps[-1]), positions, count, parts)
    constants = {"TERMS": len(maps), "ROWS": rows, **sizes, "num_warps": 8}
    run(moments_kernel, (batch * parts, len(maps)), c, *arguments, **constants)
    return moments, parts


def _norms(terms: Sequence[Term]) -> int:
    """How many of the terms are normalised."""
    return sum(term.weight is not None for term in terms)


def _sizes(rows: int, terms: Sequence[Term]) -> tuple[int, ...]:
    """What decides, next to the arithmetic and the positions, which tiles are the fastest."""
    return rows, _norms(terms), int(_of_positions(terms))


def forward(update: Update, terms: Sequence[Term], c: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """h, c_new (None where the update does not keep it), and the statistics for `backward`."""
    statistics = new_statistics(c, _norms(terms))
    terms, c = _readable(terms), dense(c)
    h, c_new = new_map(c, c.shape[1]), new_map(c, c.shape[1]) if update.keeps_state else None
    if c.numel() == 0:
        return h, c_new, statistics
    batch, channels, positions = c.shape[0], c.shape[1], c.shape[2] * c.shape[3]
    moments, parts = _moments(terms, c)
    first, second = (*terms, _NO_TERM)[:2]
    constants = _constants(update, c, terms)
    arguments: tuple[Any, ...] = (*first, *second, c, h, c_new, moments, statistics, *strides(first.x, second.x, c))
    arguments += (float(update.constant), float(eps), positions, batch, parts)

    def launch(choice: Configuration) -> None:
        grid = (batch * _tiles(choice, channels, positions),)
        run(forward_kernel, grid, c, *arguments, **constants, **choice)

    _launched(update, "forward", c, _sizes(channels, terms), launch)
    return h, c_new, statistics


def backward(
    update: Update, dh: Tensor, dc_new: Tensor | None, terms: Sequence[Term], c: Tensor, statistics: Tensor
) -> tuple[list[Term], Tensor]:
    """The gradients with respect to the terms and to c. Terms without norms get one tensor: theirs are equal."""
    terms, c, dh, dc_new = _readable(terms), dense(c), dense(dh), None if dc_new is None else dense(dc_new)
    dc, dgates = new_map(c, c.shape[1]), new_map(c, update.gates * c.shape[1])
    if c.numel() == 0:
        return [Term(dgates, *map(_zeros_like, norm)) for _, *norm in terms], dc
    batch, channels, positions = c.shape[0], c.shape[1], c.shape[2] * c.shape[3]
    constants = _constants(update, c, terms)
    first, second = (*terms, _NO_TERM)[:2]
    arguments: tuple[Any, ...] = (*first, *second, c, dh, dc_new, dgates, dc, statistics)
    rest = (*strides(first.x, second.x, c, dh, dc_new), float(update.constant), positions, batch)

    def launch(choice: Configuration) -> tuple[Tensor | None, Tensor | None]:
        tiles = _tiles(choice, channels, positions)
        sums = _new_sums(terms, c, tiles, batch * ceil_div(positions, choice["POSITION_TILE"]))
        run(backward_kernel, (batch * tiles,), c, *arguments, *sums, *rest, **constants, **choice)
        return sums

    of_samples, of_rows = _launched(update, "backward", c, _sizes(channels, terms), launch)
    if of_samples is None:
        return [Term(dgates, None, None)] * len(terms), dc
    return _through_norms(update, terms, dgates, statistics, of_samples, of_rows), dc


def _zeros_like(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)


def _new_sums(terms: Sequence[Term], c: Tensor, tiles: int, entries: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums of the first launch: of each tile of a sample, and, with weights of one a row, of each row."""
    norms = _norms(terms)
    if norms == 0:
        return None, None
    of_samples = torch.empty((c.shape[0], norms, tiles, 2), dtype=torch.float32, device=c.device)
    if _of_positions(terms):
        return of_samples, None
    return of_samples, torch.empty((norms, 2, entries, terms[0].x.shape[1]), dtype=torch.float32, device=c.device)


def _through_norms(
    update: Update,
    terms: Sequence[Term],
    dgates: Tensor,
    statistics: Tensor,
    of_samples: Tensor,
    of_rows: Tensor | None,
) -> list[Term]:
    """The second launch of the backward pass."""
    batch, rows, positions = dgates.shape[0], dgates.shape[1], dgates.shape[2] * dgates.shape[3]
    gradients, free = [], all(term.weight is not None for term in terms)
    for term in terms:  # dgates is the gradient of a term without norm, else the memory of the first term's
        in_place = term.weight is None or free
        free = free and not in_place
        weight, bias = (None if w is None else torch.empty_like(w) for w in term[1:])
        gradients.append(Term(dgates if in_place else torch.empty_like(dgates), weight, bias))
    (first, second), (of_first, of_second) = (*terms, _NO_TERM)[:2], (*gradients, _NO_TERM)[:2]
    arguments: tuple[Any, ...] = (*first[:2], *second[:2], dgates, *of_first, *of_second)
    arguments += (statistics, of_samples, of_rows, *strides(first.x, second.x))
    arguments += (positions, batch, of_samples.shape[2], 0 if of_rows is None else of_rows.shape[2])

    def launch(choice: Configuration) -> None:
        programs = _tiles(choice, rows, positions)
        if of_rows is not None:
            programs = programs * batch + ceil_div(rows, ROWS_AT_ONCE.value)
        constants = {"ROWS": rows, "OF_POSITIONS": of_rows is None}
        run(norm_backward_kernel, (programs,), dgates, *arguments, **constants, **choice)

    _launched(update, "norm_backward", dgates, _sizes(rows, terms), launch)
    return gradients
