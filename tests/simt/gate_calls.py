"""Calls of the gate kernels: random arguments, the naive forms, and running the kernels on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import oracle
import torch
from accuracy import Results, assert_accurate
from call_fields import addresses, map_fields
from kernel_build import Kernels
from torch import Tensor

from fastsam.ops._gates.update import Update

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EPS = 1e-5
LSTM = Update("lstm", "hidden", 0.5)


@dataclass(frozen=True)
class Draw:
    """The arguments of one call with G gates. x: one or two maps (B, G C, H, W); norms: their weights and biases, or
    None; dc_new: None where c_new is not kept."""

    update: Update
    x: tuple[Tensor, ...]
    norms: tuple[tuple[Tensor, Tensor] | None, ...]
    c: Tensor
    dh: Tensor
    dc_new: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Draw":
        """The same call with every tensor changed."""
        norms = tuple(None if norm is None else (function(norm[0]), function(norm[1])) for norm in self.norms)
        dc_new = None if self.dc_new is None else function(self.dc_new)
        return Draw(self.update, tuple(map(function, self.x)), norms, function(self.c), function(self.dh), dc_new)


def draw(
    norms: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    update: Update = LSTM,
) -> Draw:
    """Random arguments. A letter of `norms` a term: "-" no norm, "c" a weight a channel, "p" a weight a position."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    rows = update.gates * channels

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    weights = {"c": (rows,), "p": (rows, height, width)}
    pairs = tuple(None if n == "-" else (1 + random(*weights[n]) / 4, random(*weights[n]) / 4) for n in norms)
    x = tuple(2 * random(batch, rows, height, width) + 0.3 for _ in norms)
    c, dh, dc_new = (random(*shape) for _ in range(3))
    return Draw(update, x, pairs, c, dh, dc_new if update.keeps_state else None)


def naive(call: Draw) -> dict[str, Tensor]:
    """h, and c_new where it is kept, in plain PyTorch."""
    kind, form, constant, keeps_state = call.update
    terms = [oracle.normalise(x, norm, EPS) for x, norm in zip(call.x, call.norms, strict=True)]
    a = sum(terms[1:], terms[0])
    if kind == "product":
        act: Callable[[Tensor], Tensor] = {"identity": torch.clone, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[form]
        return {"h": constant * act(a) * call.c, **({"c_new": a} if keeps_state else {})}
    if kind == "memory":
        i, g, o = a.chunk(3, dim=1)
        seen = c_new = (1 - i.sigmoid()) * call.c + i.sigmoid() * g.tanh()
    else:
        i, f, g, o = a.chunk(4, dim=1)
        c_new = (f + constant).sigmoid() * call.c + i.sigmoid() * g.tanh()
        seen = c_new.tanh()
    return {"h": o.sigmoid() if form == "gate" else o.sigmoid() * seen, "c_new": c_new}


def plain(call: Draw, dtype: torch.dtype) -> Results:
    """The results of the naive form in `dtype`."""
    call = call.map(lambda tensor: tensor.to(dtype).requires_grad_())
    leaves = {f"gradient of x[{i}]": x for i, x in enumerate(call.x)} | {"gradient of c": call.c}
    for i, norm in enumerate(call.norms):
        if norm is not None:
            leaves |= {f"gradient of weight[{i}]": norm[0], f"gradient of bias[{i}]": norm[1]}
    outputs = naive(call)
    upstream = [gradient for gradient in (call.dh, call.dc_new) if gradient is not None]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    named = dict(zip(leaves, gradients, strict=True))
    return {**{name: output.detach() for name, output in outputs.items()}, **named}


def run(kernels: Kernels, call: Draw, multiprocessors: int = 2) -> Results:
    """The results of the kernels, forward and backward, on a card with so many multiprocessors.

    Two terms without norms get one gradient, as fastsam/ops/_gates/native.py has it: theirs are equal.
    """
    dtype = call.c.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    norms = [None if n is None else tuple(tensor.contiguous() for tensor in n) for n in call.norms]
    h, c_new, dc = (torch.full_like(call.c, torch.nan, memory_format=torch.contiguous_format) for _ in range(3))
    batch, channels, height, width = call.c.shape
    statistics = [None if n is None else torch.full((batch, 2), torch.nan, dtype=wide) for n in norms]
    same = norms == [None, None]
    dx = [None if i > 0 and same else torch.full(x.shape, torch.nan, dtype=dtype) for i, x in enumerate(call.x)]
    dnorms = [None if n is None else tuple(torch.full_like(tensor, torch.nan) for tensor in n) for n in norms]
    workspace = torch.full((1 << 16,), torch.nan, dtype=torch.float64)
    space = (workspace, workspace.nbytes, multiprocessors)
    constant = call.update.constant

    has_positions = any(norm is not None and norm[0].ndim == 3 for norm in norms)
    inputs = [batch, channels, height * width, int(has_positions), *call.update.fields]
    for x, norm in zip(call.x, norms, strict=True):
        inputs += [*map_fields(x), *addresses(norm or (None, None))]
    inputs += [*[0] * 5 * (2 - len(call.x)), *map_fields(call.c)]
    kept = [*addresses(statistics), *[0] * (2 - len(statistics))]
    states = [h, c_new if call.update.keeps_state else None]
    fields = numpy.array([*inputs, *addresses(states), *kept])
    getattr(kernels, f"forward_{str(dtype)[6:]}")(fields, constant, EPS, *space)

    fields_backward = [*inputs, *map_fields(call.dh), *map_fields(call.dc_new), *kept]
    for of_x, of_norm in zip(dx, dnorms, strict=True):
        fields_backward += [*addresses([of_x, *(of_norm or (None, None))])]
    fields_backward += [*[0] * 3 * (2 - len(dx)), *addresses([dc])]
    getattr(kernels, f"backward_{str(dtype)[6:]}")(numpy.array(fields_backward), constant, *space)

    results: dict[str, Any] = {"h": h, **({"c_new": c_new} if call.update.keeps_state else {})}
    results |= {f"gradient of x[{i}]": dx[0] if value is None else value for i, value in enumerate(dx)}
    results["gradient of c"] = dc
    for i, of_norm in enumerate(dnorms):
        if of_norm is not None:
            results |= {f"gradient of weight[{i}]": of_norm[0], f"gradient of bias[{i}]": of_norm[1]}
    return {name: value.to(dtype) for name, value in results.items()}


def check(kernels: Kernels, draws: Sequence[Draw], multiprocessors: int = 2) -> None:
    """Run the calls and compare with the naive form, in float64 and in their own dtype."""
    dtype = draws[0].c.dtype
    limits = None if dtype == torch.float64 else [plain(call, dtype) for call in draws]
    exact = [plain(call, torch.float64) for call in draws]
    assert_accurate([run(kernels, call, multiprocessors) for call in draws], exact, limits)


def spaced(x: Tensor, channel_gap: int, batch_gap: int) -> Tensor:
    """The same map with unused numbers after each channel and each sample."""
    batch, channels, height, width = x.shape
    stride = height * width + channel_gap
    strides = (channels * stride + batch_gap, stride, width, 1)
    storage = torch.full((batch * strides[0],), torch.nan, dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)
