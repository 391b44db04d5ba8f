"""The attention operators in plain PyTorch: the reference, and the backward pass of the registered operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.ops._attention import Context, Source, SourceGradients
from fastsam.ops._dispatch import arithmetic


def attend(query: Tensor, keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of x averaged with softmax weights, equations 2-4 without the value map.

    Args:
        query, keys: (B, D, N). x: (B, C, N).

    Returns:
        r (B, C, N), r_i = sum_j softmax_j(query_i . keys_j) x_j, and the scores (B, N, N).
    """
    scores = query.transpose(1, 2) @ keys
    r = x @ scores.softmax(dim=-1).transpose(1, 2)
    return r, scores


def _query(h: Tensor, source: Source) -> Tensor:
    return source.score @ h.flatten(2) + source.score_bias[:, None]


def _keys(source: Source, columns: Tensor) -> Tensor:
    return columns if source.key is None else source.key @ columns


def _finite_mean(x: Tensor) -> Tensor:
    """The mean of each sample's columns, (B, C), 0 where it would not be finite; in the dtype of the arithmetic."""
    mean = x.flatten(2).mean(dim=2)
    return torch.where(mean.isfinite(), mean, 0.0).to(arithmetic(x.dtype))


def _add_to_columns(columns: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Add shift (B, C) to every column of (B, C, N); rounded to the dtype after the sum."""
    return (columns + shift[:, :, None]).to(dtype)


def forward(sources: Sequence[Source], value_bias: Tensor, save: bool) -> tuple[Tensor, list[Context]]:
    """z = sum over the sources of value R + value_bias, and the contexts for `backward` (empty unless `save`)."""
    h = sources[0].x
    z = value_bias[:, None].expand(h.shape[0], -1, h.shape[2] * h.shape[3])
    contexts = []
    for source in sources:
        shift = _finite_mean(source.x)
        columns = _add_to_columns(source.x.flatten(2), -shift, h.dtype)
        r, scores = attend(_query(h, source), _keys(source, columns), columns)
        z = z + source.value @ _add_to_columns(r, shift, h.dtype)
        if save:
            r, scores = (value.to(shift.dtype) for value in (r, scores))
            contexts.append(Context(r.unflatten(2, h.shape[2:]), scores.logsumexp(dim=-1), shift.contiguous()))
    return z.unflatten(2, h.shape[2:]), contexts


def backward(
    dz: Tensor, sources: Sequence[Source], contexts: Sequence[Context]
) -> tuple[list[Tensor], list[SourceGradients], Tensor]:
    """The gradients with respect to each source's map, each source's weights, and the value bias.

    The softmax weights P are computed again from the log-sum-exps; with dR = value^T dz,
    dP = dR^T x, dE = P (dP - sum_c dR R), and E = query^T keys, where x and R are those without the context's shift.
    """
    h = sources[0].x
    dz_columns, hidden = dz.flatten(2), h.flatten(2)
    dx = [torch.zeros_like(source.x.flatten(2)) for source in sources]
    weights = []
    for index, (source, context) in enumerate(zip(sources, contexts, strict=True)):
        columns = _add_to_columns(source.x.flatten(2), -context.shift, h.dtype)
        query, keys = _query(h, source), _keys(source, columns)
        r = context.r.flatten(2).to(h.dtype)
        dr = source.value.T @ dz_columns
        p = (query.transpose(1, 2) @ keys - context.lse[:, :, None]).exp().to(r.dtype)
        delta = (dr * r).sum(1)
        de = p * (dr.transpose(1, 2) @ columns - delta[:, :, None])
        dquery = keys @ de.transpose(1, 2)
        dkeys = query @ de
        dx[index] = dx[index] + dr @ p + (dkeys if source.key is None else source.key.T @ dkeys)
        dx[0] = dx[0] + source.score.T @ dquery
        weights.append(
            SourceGradients(
                score=_sum_outer(dquery, hidden),
                score_bias=dquery.sum((0, 2)),
                value=_sum_outer(dz_columns, _add_to_columns(r, context.shift, h.dtype)),
                key=None if source.key is None else _sum_outer(dkeys, columns),
            )
        )
    maps = [gradient.unflatten(2, h.shape[2:]) for gradient in dx]
    return maps, weights, dz_columns.sum((0, 2))


def _sum_outer(left: Tensor, right: Tensor) -> Tensor:
    """sum over batch and positions of left_i right_i^T: (B, P, N), (B, Q, N) -> (P, Q)."""
    return (left @ right.transpose(1, 2)).sum(0)
