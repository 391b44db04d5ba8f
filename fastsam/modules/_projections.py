"""What the attention modules do with their 1x1 convolutions: fold them, and follow them from single positions."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.ops._dispatch import autocast_enabled


def projects_keys(channels: int, attention_channels: int) -> bool:
    """Whether the operator projects the keys itself (D channels a key) instead of folding them into the queries (C).

    A pair of positions costs D multiply-adds for its score with projected keys, C with folded ones; the projection of
    the keys has to be paid for, so it must save at least half.
    """
    return 2 * attention_channels < channels


def _autocast_off(parameter: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Composed weights multiply rounding errors: they are computed in the parameters' own dtype."""
    if autocast_enabled(parameter):
        return torch.autocast(parameter.device.type, enabled=False)
    return contextlib.nullcontext()


def _matrix(projection: nn.Conv2d) -> Tensor:
    """The weight of a 1x1 convolution as a matrix (outputs, inputs)."""
    return projection.weight.flatten(1)


def _bias(projection: nn.Conv2d) -> Tensor:
    if projection.bias is None:
        return projection.weight.new_zeros(projection.out_channels)
    return projection.bias


def _fold_scores(query: nn.Conv2d, key: nn.Conv2d, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Score weights, score bias, and key weights or None: e_ij up to terms in i alone, which the softmax cancels.

    e_ij = scale (W_q x_i + b_q) . (W_k y_j + b_k), where b_k meets only x_i: it cancels. Its zero gradient must exist
    (data-parallel training reduces every parameter's), hence the term that is zero.
    """
    weight, bias = scale * _matrix(query), scale * _bias(query) + 0.0 * _bias(key)
    if projects_keys(key.in_channels, key.out_channels):
        return weight, bias, _matrix(key)
    transposed_key = _matrix(key).T
    return transposed_key @ weight, transposed_key @ bias, None


def _fold_values(outer: Tensor, value: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The matrix and the bias of `outer` after the value projection."""
    return outer @ _matrix(value), outer @ _bias(value)


def _at(points: Tensor, x: Tensor) -> Tensor:
    """The columns of a map (B, C, H, W) at the points (P, 2), as a map (B, C, P, 1)."""
    rows, columns = points.to(x.device).unbind(dim=1)
    return x[:, :, rows, columns].unsqueeze(-1)


def _attention_rows(asked: Tensor, x: Tensor, query: nn.Conv2d, key: nn.Conv2d, scale: float) -> Tensor:
    """Attention (B, P, H, W) of the asked columns (B, C, P, 1) over the positions of x: equations 2 and 3."""
    q, k = scale * query(asked).flatten(2), key(x).flatten(2)
    return torch.softmax(q.mT @ k, dim=-1).unflatten(-1, x.shape[2:])
