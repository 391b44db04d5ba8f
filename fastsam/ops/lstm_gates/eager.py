"""The gate arithmetic of ConvLSTM in plain PyTorch, to be read beside equation 1 of the SA-ConvLSTM paper."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsam.ops.lstm_gates._term import Term, new_statistics

_SAMPLE = (1, 2, 3)  # all channels and positions


def lstm_gates(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    *,
    recurrent: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    recurrent_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """See `fastsam.ops.lstm_gates`."""
    a = _normalised(gates, norm, eps)
    if recurrent is not None:
        a = a + _normalised(recurrent, recurrent_norm, eps)
    i, f, g, o = a.chunk(4, dim=1)
    c_new = (f + forget_bias).sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c_new.tanh()).contiguous(), c_new.contiguous()


def _normalised(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    if norm is None:
        return x
    weight, bias = norm
    if weight.ndim == 1:
        return F.group_norm(x, 1, weight, bias, eps)
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def forward(terms: Sequence[Term], c: Tensor, forget_bias: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h, c_new, and the statistics for `backward`."""
    norms = [None if weight is None or bias is None else (weight, bias) for _, weight, bias in terms]
    second: dict[str, Any] = {"recurrent": terms[1].x, "recurrent_norm": norms[1]} if len(terms) == 2 else {}
    h, c_new = lstm_gates(terms[0].x, c, forget_bias, norm=norms[0], eps=eps, **second)
    maps = [term.x for term in terms if term.weight is not None]
    statistics = new_statistics(c, len(maps))
    for x, of_map in zip(maps, statistics, strict=True):
        variance, mean = torch.var_mean(x.to(of_map.dtype), _SAMPLE, correction=0)
        of_map.copy_(torch.stack([mean, (variance + eps).rsqrt()], dim=1))
    return h, c_new, statistics


def backward(
    dh: Tensor, dc_new: Tensor, terms: Sequence[Term], c: Tensor, forget_bias: float, statistics: Tensor
) -> tuple[list[Term], Tensor]:
    """The gradients with respect to the terms and to c, the activations computed again."""
    dtype, wide = c.dtype, statistics.dtype
    dh, dc_new, c = dh.to(wide), dc_new.to(wide), c.to(wide)
    of_norms = iter(statistics)
    norms = [None if w is None or b is None else _Norm(x, w, b, next(of_norms)) for x, w, b in terms]
    outputs = [term.x.to(wide) if norm is None else norm.output() for term, norm in zip(terms, norms, strict=True)]
    i, f, g, o = functools.reduce(torch.add, outputs).chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), (f + forget_bias).sigmoid(), g.tanh(), o.sigmoid()
    tanh_c = (f * c + i * g).tanh()
    dc = dc_new + dh * o * (1 - tanh_c * tanh_c)
    di, df, dg, do = dc * g, dc * c, dc * i, dh * tanh_c
    da = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], dim=1)
    gradients = [Term(da, None, None) if norm is None else norm.gradients(da) for norm in norms]
    return [Term(*(_narrow(value, dtype) for value in gradient)) for gradient in gradients], _narrow(dc * f, dtype)


def _narrow(gradient: Tensor | None, dtype: torch.dtype) -> Any:
    return None if gradient is None else gradient.to(dtype).contiguous()


class _Norm:
    """The normalisation of a term, from its statistics (B, 2): y = (x - mean) rstd, output y weight + bias."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor) -> None:
        mean, self.rstd = statistics[:, :, None, None, None].unbind(1)
        self.y = (x.to(statistics.dtype) - mean) * self.rstd
        self.per_channel = weight.ndim == 1
        self.weight, self.bias = (weight[:, None, None], bias[:, None, None]) if self.per_channel else (weight, bias)

    def output(self) -> Tensor:
        return self.y * self.weight + self.bias

    def gradients(self, da: Tensor) -> Term:
        """With dy = da weight: dx = rstd (dy - mean(dy) - y mean(dy y)), the means over the sample."""
        dy = da * self.weight
        dx = self.rstd * (dy - dy.mean(_SAMPLE, keepdim=True) - self.y * (dy * self.y).mean(_SAMPLE, keepdim=True))
        summed = (0, 2, 3) if self.per_channel else (0,)
        return Term(dx, (da * self.y).sum(summed), da.sum(summed))
