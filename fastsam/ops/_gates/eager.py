"""Forward and backward pass of the gates in plain PyTorch, written out, for every `Update`."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsam.ops._gates.update import Term, Update, new_statistics

_SAMPLE = (1, 2, 3)  # all channels and positions


def normalise(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """The layer norm of a map over all channels and positions; the map itself for no norm.

    norm: weight and bias, both (channels,) or both (channels, H, W).
    """
    if norm is None:
        return x
    weight, bias = norm
    if weight.ndim == 1:
        return torch.group_norm(x, 1, weight, bias, eps)  # F.group_norm refuses a map of one number
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def forward(update: Update, terms: Sequence[Term], c: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """h, c_new where it is kept, and the statistics for `backward`."""
    norms = [None if weight is None or bias is None else (weight, bias) for _, weight, bias in terms]
    sums = [normalise(term.x, norm, eps) for term, norm in zip(terms, norms, strict=True)]
    h, c_new = _values(update, reduce(torch.add, sums), c)
    maps = [term.x for term in terms if term.weight is not None]
    statistics = new_statistics(c, len(maps))
    for x, of_map in zip(maps, statistics, strict=True):
        variance, mean = torch.var_mean(x.to(of_map.dtype), _SAMPLE, correction=0)
        of_map.copy_(torch.stack([mean, (variance + eps).rsqrt()], dim=1))
    return h.contiguous(), _own(c_new, terms) if update.keeps_state else None, statistics


def _values(update: Update, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h and c_new from the sum of the terms."""
    if update.kind == "product":
        return update.constant * _activated(update, a)[0] * c, a
    if update.kind == "lstm":
        i, f, g, o = a.chunk(4, dim=1)
        c_new = (f + update.constant).sigmoid() * c + i.sigmoid() * g.tanh()
    else:
        i, g, o = a.chunk(3, dim=1)
        i = i.sigmoid()
        c_new = (1 - i) * c + i * g.tanh()
    if update.form == "gate":
        return o.sigmoid(), c_new
    return o.sigmoid() * (c_new.tanh() if update.kind == "lstm" else c_new), c_new


def _own(state: Tensor, terms: Sequence[Term]) -> Tensor:
    """The state in memory of its own, which that of "product" without a norm is not."""
    state = state.contiguous()
    return state.clone() if any(state is term.x for term in terms) else state


def _activated(update: Update, a: Tensor) -> tuple[Tensor, Tensor | float]:
    """act(a) of "product", and its derivative."""
    if update.form == "identity":
        return a, 1.0
    act = a.tanh() if update.form == "tanh" else a.sigmoid()
    return act, 1 - act * act if update.form == "tanh" else act * (1 - act)


def backward(
    update: Update, dh: Tensor, dc_new: Tensor | None, terms: Sequence[Term], c: Tensor, statistics: Tensor
) -> tuple[list[Term], Tensor]:
    """The gradients with respect to the terms and to c, the activations computed again."""
    dtype, wide = c.dtype, statistics.dtype
    of_norms = iter(statistics)
    norms = [None if w is None or b is None else _Norm(x, w, b, next(of_norms)) for x, w, b in terms]
    outputs = [term.x.to(wide) if norm is None else norm.output() for term, norm in zip(terms, norms, strict=True)]
    upstream = dh.to(wide), None if dc_new is None else dc_new.to(wide)
    gradients_of = {"lstm": _lstm_gradients, "memory": _memory_gradients, "product": _product_gradients}[update.kind]
    da, dc = gradients_of(update, reduce(torch.add, outputs), c.to(wide), *upstream)
    gradients = [Term(da, None, None) if norm is None else norm.gradients(da) for norm in norms]
    return [Term(*(_narrow(value, dtype) for value in gradient)) for gradient in gradients], _narrow(dc, dtype)


def _lstm_gradients(update: Update, a: Tensor, c: Tensor, dh: Tensor, dc_new: Any) -> tuple[Tensor, Tensor]:
    i, f, g, o = a.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), (f + update.constant).sigmoid(), g.tanh(), o.sigmoid()
    dcell, do = dc_new, dh
    if update.form == "hidden":
        tanh_c = (f * c + i * g).tanh()
        dcell, do = dc_new + dh * o * (1 - tanh_c * tanh_c), dh * tanh_c
    di, df, dg = dcell * g * i * (1 - i), dcell * c * f * (1 - f), dcell * i * (1 - g * g)
    return torch.cat([di, df, dg, do * o * (1 - o)], dim=1), dcell * f


def _memory_gradients(update: Update, a: Tensor, c: Tensor, dh: Tensor, dc_new: Any) -> tuple[Tensor, Tensor]:
    i, g, o = a.chunk(3, dim=1)
    i, g, o = i.sigmoid(), g.tanh(), o.sigmoid()
    dcell, do = dc_new, dh
    if update.form == "hidden":
        dcell, do = dc_new + dh * o, dh * ((1 - i) * c + i * g)
    di, dg = dcell * (g - c) * i * (1 - i), dcell * i * (1 - g * g)
    return torch.cat([di, dg, do * o * (1 - o)], dim=1), dcell * (1 - i)


def _product_gradients(update: Update, a: Tensor, c: Tensor, dh: Tensor, dc_new: Any) -> tuple[Tensor, Tensor]:
    act, slope = _activated(update, a)
    da = update.constant * dh * c * slope
    return da if dc_new is None else da + dc_new, update.constant * dh * act


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
