"""`lstm_gates`, `memory_gates` and `norm_gate` on the compiled kernels: lstm_gates*.cpp in csrc/cpu, lstm_gates.cu."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.ops._dispatch import arithmetic
from fastsam.ops._gates.update import Term, Update, new_statistics
from fastsam.ops._native import address, dense, map_fields, new_map, run, weights


def _readable(terms: Sequence[Term], c: Tensor) -> list[Term]:
    dtype = arithmetic(c.dtype) if c.device.type == "cpu" else c.dtype  # kernels on a GPU widen what they load
    return [Term(dense(term.x), weights(term.weight, dtype), weights(term.bias, dtype)) for term in terms]


def _input_fields(update: Update, terms: Sequence[Term], c: Tensor) -> list[float]:
    batch, channels, height, width = c.shape
    weights_have_positions = any(term.weight is not None and term.weight.ndim == 3 for term in terms)
    fields: list[float] = [batch, channels, height * width, int(weights_have_positions), *update.fields]
    for term in terms:
        fields += [*map_fields(term.x), address(term.weight), address(term.bias)]
    return [*fields, *[0] * (5 * (2 - len(terms))), *map_fields(c), float(update.constant)]


def _statistics_fields(terms: Sequence[Term], statistics: Tensor) -> list[int]:
    """The address of each term's statistics, which only those with a norm have."""
    of_norms = iter(statistics)
    fields = [0 if term.weight is None else address(next(of_norms)) for term in terms]
    return [*fields, *[0] * (2 - len(terms))]


def forward(update: Update, terms: Sequence[Term], c: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """h, c_new where it is kept, and the statistics for `backward`."""
    statistics = new_statistics(c, sum(term.weight is not None for term in terms))
    terms, c = _readable(terms, c), dense(c)
    h, c_new = new_map(c, c.shape[1]), new_map(c, c.shape[1]) if update.keeps_state else None
    fields = [*_input_fields(update, terms, c), float(eps), address(h), address(c_new)]
    run("lstm_gates_forward", c, [*fields, *_statistics_fields(terms, statistics)])
    return h, c_new, statistics


def backward(
    update: Update, dh: Tensor, dc_new: Tensor | None, terms: Sequence[Term], c: Tensor, statistics: Tensor
) -> tuple[list[Term], Tensor]:
    """The gradients with respect to the terms and to c. Two terms without norms get one tensor: theirs are equal."""
    terms, c, dh = _readable(terms, c), dense(c), dense(dh)
    dc_new = None if dc_new is None else dense(dc_new)
    same = len(terms) == 2 and terms[0].weight is None and terms[1].weight is None
    gradients = [Term(new_map(x, x.shape[1]), *map(_like, norm)) for x, *norm in (terms[:1] if same else terms)]
    dc = new_map(c, c.shape[1])
    fields = [*_input_fields(update, terms, c), *map_fields(dh), *map_fields(dc_new)]
    fields += _statistics_fields(terms, statistics)
    for of_term in gradients:
        fields += map(address, of_term)
    fields += [*[0] * (3 * (2 - len(gradients))), address(dc)]
    run("lstm_gates_backward", c, fields)
    gradients = [Term(x, *(_narrow(value, c.dtype) for value in norm)) for x, *norm in gradients]
    return gradients * 2 if same else gradients, dc


def _like(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _narrow(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)
