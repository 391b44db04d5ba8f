"""`lstm_gates` on Triton: the kernels are in triton_forward.py and triton_backward.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.ops._native import dense, new_map, weights
from fastsam.ops._triton.configurations import Configuration, configuration
from fastsam.ops._triton.launch import ceil_div, padded, run
from fastsam.ops.lstm_gates._term import Term, new_statistics
from fastsam.ops.lstm_gates.triton_backward import ROWS_AT_ONCE, backward_kernel, norm_backward_kernel
from fastsam.ops.lstm_gates.triton_forward import forward_kernel, moments_kernel
from fastsam.ops.lstm_gates.triton_terms import PARTS_AT_ONCE

_MOMENTS_TILE = 4096  # numbers a program has in registers at a time
_NO_TERM = Term(None, None, None)  # type: ignore[arg-type]


def tile(rows: int, positions: int, numbers: int) -> Configuration:
    """A tile of a (rows, positions) map, of about so many numbers; as wide as can be, positions being contiguous."""
    position_tile = min(padded(positions), numbers)
    return {"ROW_TILE": min(padded(rows, 1), numbers // position_tile), "POSITION_TILE": position_tile}


def candidates(channels: int, positions: int) -> list[Configuration]:
    """Tiles of the state. A thread has the four gates of each of its numbers in registers: 4 or 8 numbers a thread."""
    sizes = ((512, 4), (1024, 4), (1024, 8), (2048, 8))
    return [{**tile(channels, positions, numbers), "num_warps": warps, "num_stages": 1} for numbers, warps in sizes]


def _readable(terms: Sequence[Term]) -> list[Term]:
    return [
        Term(dense(x), *(None if value is None else weights(value, value.dtype) for value in norm))
        for x, *norm in terms
    ]


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of batch and channel."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _of_positions(terms: Sequence[Term]) -> bool:
    return any(term.weight is not None and term.weight.ndim == 3 for term in terms)


def _tiles(choice: Configuration, rows: int, positions: int) -> int:
    return ceil_div(rows, choice["ROW_TILE"]) * ceil_div(positions, choice["POSITION_TILE"])


def _moments(terms: Sequence[Term], c: Tensor) -> tuple[Tensor | None, int]:
    """The moments of each sample's parts, (B, terms with a norm, parts, 3), and the number of parts."""
    maps = [term.x for term in terms if term.weight is not None]
    if not maps:
        return None, 0
    batch, channels, positions = c.shape[0], c.shape[1], c.shape[2] * c.shape[3]
    sizes = tile(4 * channels, positions, _MOMENTS_TILE)
    count = _tiles(sizes, 4 * channels, positions)
    parts = min(count, PARTS_AT_ONCE.value)
    moments = torch.empty((batch, len(maps), parts, 3), dtype=torch.float32, device=c.device)
    arguments = (maps[0], maps[-1], moments, *_strides(maps[0]), *_strides(maps[-1]), positions, count, parts)
    constants = {"TERMS": len(maps), "ROWS": 4 * channels, **sizes, "num_warps": 8}
    run(moments_kernel, (batch * parts, len(maps)), c, *arguments, **constants)
    return moments, parts


def _norms(terms: Sequence[Term]) -> int:
    """How many of the terms are normalised."""
    return sum(term.weight is not None for term in terms)


def forward(terms: Sequence[Term], c: Tensor, forget_bias: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h, c_new, and the statistics for `backward`."""
    statistics = new_statistics(c, sum(term.weight is not None for term in terms))
    terms, c = _readable(terms), dense(c)
    h, c_new = new_map(c, c.shape[1]), new_map(c, c.shape[1])
    if c.numel() == 0:
        return h, c_new, statistics
    batch, channels, positions = c.shape[0], c.shape[1], c.shape[2] * c.shape[3]
    moments, parts = _moments(terms, c)
    first, second = (*terms, _NO_TERM)[:2]
    choice = configuration("lstm_gates_forward", c, (channels, _norms(terms)), candidates(channels, positions))
    arguments: tuple[Any, ...] = (*first, *second, c, h, c_new, moments, statistics)
    arguments += (*_strides(first.x), *_strides(second.x), *_strides(c))
    arguments += (float(forget_bias), float(eps), positions, batch, parts)
    grid = (batch * _tiles(choice, channels, positions),)
    run(forward_kernel, grid, c, *arguments, C=channels, OF_POSITIONS=_of_positions(terms), **choice)
    return h, c_new, statistics


def backward(
    dh: Tensor, dc_new: Tensor, terms: Sequence[Term], c: Tensor, forget_bias: float, statistics: Tensor
) -> tuple[list[Term], Tensor]:
    """The gradients with respect to the terms and to c. Terms without norms get one tensor: theirs are equal."""
    terms, c, dh, dc_new = _readable(terms), dense(c), dense(dh), dense(dc_new)
    dc, dgates = new_map(c, c.shape[1]), new_map(c, 4 * c.shape[1])
    if c.numel() == 0:
        return [Term(dgates, *map(_zeros_like, norm)) for _, *norm in terms], dc
    batch, channels, positions = c.shape[0], c.shape[1], c.shape[2] * c.shape[3]
    choice = configuration("lstm_gates_backward", c, (channels, _norms(terms)), candidates(channels, positions))
    sums = _tiles(choice, channels, positions)
    of_samples, of_rows = _sums(terms, c, sums, batch * ceil_div(positions, choice["POSITION_TILE"]))
    first, second = (*terms, _NO_TERM)[:2]
    arguments: tuple[Any, ...] = (*first, *second, c, dh, dc_new, dgates, dc, statistics, of_samples, of_rows)
    for x in (first.x, second.x, c, dh, dc_new):
        arguments += _strides(x)
    arguments += (float(forget_bias), positions, batch)
    constants = {"C": channels, "OF_POSITIONS": _of_positions(terms)}
    run(backward_kernel, (batch * sums,), c, *arguments, **constants, **choice)
    if all(term.weight is None for term in terms):
        return [Term(dgates, None, None)] * len(terms), dc
    return _through_norms(terms, dgates, statistics, of_samples, of_rows, choice), dc


def _zeros_like(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)


def _sums(terms: Sequence[Term], c: Tensor, sums: int, entries: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums of the first launch: of each tile of a sample, and, with weights of one a row, of each row."""
    norms = sum(term.weight is not None for term in terms)
    if norms == 0:
        return None, None
    of_samples = torch.empty((c.shape[0], norms, sums, 2), dtype=torch.float32, device=c.device)
    if _of_positions(terms):
        return of_samples, None
    return of_samples, torch.empty((norms, 2, entries, 4 * c.shape[1]), dtype=torch.float32, device=c.device)


def _through_norms(
    terms: Sequence[Term],
    dgates: Tensor,
    statistics: Tensor,
    of_samples: Tensor | None,
    of_rows: Tensor | None,
    first_launch: Configuration,
) -> list[Term]:
    batch, rows, positions = dgates.shape[0], dgates.shape[1], dgates.shape[2] * dgates.shape[3]
    gradients, free = [], all(term.weight is not None for term in terms)
    for term in terms:  # dgates is the gradient of a term without norm, else the memory of the first term's
        in_place = term.weight is None or free
        free = free and not in_place
        weight, bias = (None if w is None else torch.empty_like(w) for w in term[1:])
        gradients.append(Term(dgates if in_place else torch.empty_like(dgates), weight, bias))
    choice = configuration("lstm_gates_norm_backward", dgates, (rows,), candidates(rows, positions))
    programs, entries = _tiles(choice, rows, positions), 0
    if of_rows is not None:
        programs = programs * batch + ceil_div(rows, ROWS_AT_ONCE.value)
        entries = of_rows.shape[2]
    (first, second), (of_first, of_second) = (*terms, _NO_TERM)[:2], (*gradients, _NO_TERM)[:2]
    arguments: tuple[Any, ...] = (*first[:2], *second[:2], dgates, *of_first, *of_second)
    arguments += (statistics, of_samples, of_rows, *_strides(first.x), *_strides(second.x))
    arguments += (positions, batch, _tiles(first_launch, rows // 4, positions), entries)
    run(norm_backward_kernel, (programs,), dgates, *arguments, ROWS=rows, OF_POSITIONS=of_rows is None, **choice)
    return gradients
