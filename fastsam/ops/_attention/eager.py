"""The attention operators in plain PyTorch: the reference, and the backward pass of the registered operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.ops._attention import Context, Source, SourceGradients


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


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of x without their mean, and the mean (B, C, 1), which is 0 where it would not be finite."""
    columns = x.flatten(2)
    mean = columns.mean(dim=2, keepdim=True)
    mean = torch.where(mean.isfinite(), mean, 0.0)
    return columns - mean, mean


def forward(sources: Sequence[Source], value_bias: Tensor, save: bool) -> tuple[Tensor, list[Context]]:
    """z = sum over the sources of value R + value_bias, and the contexts for `backward` (empty unless `save`)."""
    h = sources[0].x
    z = value_bias[:, None].expand(h.shape[0], -1, h.shape[2] * h.shape[3])
    contexts = []
    for source in sources:
        columns, mean = _centred(source.x)
        r, scores = attend(_query(h, source), _keys(source, columns), columns)
        z = z + source.value @ (r + mean)
        if save:
            r, scores = (value.float() if value.dtype.itemsize < 4 else value for value in (r, scores))
            contexts.append(Context(r.unflatten(2, h.shape[2:]), scores.logsumexp(dim=-1)))
    return z.unflatten(2, h.shape[2:]), contexts


def backward(
    dz: Tensor, sources: Sequence[Source], contexts: Sequence[Context]
) -> tuple[list[Tensor], list[SourceGradients], Tensor]:
    """The gradients with respect to each source's map, each source's weights, and the value bias.

    The softmax weights P are computed again from the log-sum-exps; with dR = value^T dz,
    dP = dR^T x, dE = P (dP - sum_c dR R), and E = query^T keys, where x and R are centred.
    """
    h = sources[0].x
    dz_columns, hidden = dz.flatten(2), h.flatten(2)
    dx = [torch.zeros_like(source.x.flatten(2)) for source in sources]
    weights = []
    for index, (source, context) in enumerate(zip(sources, contexts, strict=True)):
        columns, mean = _centred(source.x)
        query, keys = _query(h, source), _keys(source, columns)
        r = context.r.flatten(2).to(columns.dtype)
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
                value=_sum_outer(dz_columns, r + mean),
                key=None if source.key is None else _sum_outer(dkeys, columns),
            )
        )
    maps = [gradient.unflatten(2, h.shape[2:]) for gradient in dx]
    return maps, weights, dz_columns.sum((0, 2))


def _sum_outer(left: Tensor, right: Tensor) -> Tensor:
    """sum over batch and positions of left_i right_i^T: (B, P, N), (B, Q, N) -> (P, Q)."""
    return (left @ right.transpose(1, 2)).sum(0)
