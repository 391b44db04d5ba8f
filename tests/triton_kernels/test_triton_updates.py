"""Every update and form of the gate kernels on Triton, through their module, against plain PyTorch in float64.

The public operators use them in some combinations only: `lstm_gates` with a norm of its state is two of these calls.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from accuracy import Results, assert_accurate
from cases import channels_last
from on_device import DEVICE
from oracle import normalise
from torch import Tensor

pytest.importorskip("triton")

from fastsam.ops._gates import triton as gates
from fastsam.ops._gates.update import Term, Update, terms_of
from fastsam.ops._triton.configurations import forced

pytestmark = pytest.mark.usefixtures("triton_backend")
UPDATES = [
    Update("lstm", "hidden", 0.75),
    Update("lstm", "gate", -0.5),
    Update("memory", "hidden"),
    Update("memory", "gate"),
    Update("product", "identity", 1.0),
    Update("product", "tanh", -1.5),
    Update("product", "sigmoid", 2.0, keeps_state=False),
]
EACH_UPDATE = pytest.mark.parametrize("update", UPDATES, ids=lambda update: f"{update.kind}-{update.form}")
EACH_KIND = pytest.mark.parametrize("update", [UPDATES[0], UPDATES[3], UPDATES[6]], ids=["lstm", "memory", "product"])
"""One update of each: the interpreter is slow, and forms differ in the arithmetic of a number only."""

NORMS = [("none",), ("none", "none"), ("channel",), ("position", "none"), ("none", "channel"), ("position", "position")]
"""Of the first term, and of the second where there is one."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
EPS = 1e-5


class Arguments:
    """Terms, state and upstream gradients of order one.

    In half types they are the rounded numbers of the same draw.
    """

    def __init__(
        self,
        update: Update,
        norms: Sequence[str] = ("channel",),
        dtype: torch.dtype = torch.float32,
        *,
        batch: int = 2,
        channels: int = 5,
        size: tuple[int, int] = (5, 6),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.update, rows = update, update.gates * channels
        shapes = {"channel": (rows,), "position": (rows, *size)}
        self.tensors: list[Tensor | None] = []
        for norm in norms:
            self.tensors.append(draw(batch, rows, *size))
            self.tensors += [draw(*shapes[norm]) if norm in shapes else None for _ in range(2)]
        self.tensors += [None] * (6 - len(self.tensors))
        self.c, self.dh, dc_new = (draw(batch, channels, *size) for _ in range(3))
        self.dc_new = dc_new if update.keeps_state else None

    def changed(self, function: Callable[[Tensor], Tensor]) -> "Arguments":
        """The same with every tensor changed: laid out differently, or in another dtype."""
        other = object.__new__(Arguments)
        other.update = self.update
        other.tensors = [None if tensor is None else function(tensor) for tensor in self.tensors]
        other.c, other.dh = function(self.c), function(self.dh)
        other.dc_new = None if self.dc_new is None else function(self.dc_new)
        return other

    def terms(self) -> list[Term]:
        first, weight, bias, second, *second_norm = self.tensors
        assert first is not None
        return terms_of(first, second, weight, bias, *second_norm)


def naive(update: Update, terms: Sequence[Term], c: Tensor) -> tuple[Tensor, Tensor]:
    """The equations of `Update`, in plain PyTorch."""
    a = sum(normalise(x, None if weight is None or bias is None else (weight, bias), EPS) for x, weight, bias in terms)
    assert isinstance(a, Tensor)
    if update.kind == "product":
        return update.constant * ACTIVATIONS[update.form](a) * c, a
    i, *f, g, o = a.chunk(update.gates, dim=1)
    if update.kind == "lstm":
        c_new = torch.sigmoid(f[0] + update.constant) * c + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.tanh(c_new)
    else:
        c_new = (1 - torch.sigmoid(i)) * c + torch.sigmoid(i) * torch.tanh(g)
        hidden = c_new
    return torch.sigmoid(o) * (hidden if update.form == "hidden" else 1.0), c_new


def on_triton(arguments: Arguments) -> Results:
    """Outputs and gradients, by names that are the same as those of `reference`."""
    update, terms, c = arguments.update, arguments.terms(), arguments.c
    h, c_new, statistics = gates.forward(update, terms, c, EPS)
    of_terms, dc = gates.backward(update, arguments.dh, arguments.dc_new, terms, c, statistics)
    assert (c_new is not None) == update.keeps_state and len(of_terms) == len(terms)
    flat = [tensor for term in of_terms for tensor in term]
    return _named(h, c_new, [*flat, *[None] * (6 - len(flat)), dc])


def reference(arguments: Arguments) -> Results:
    """The same by plain PyTorch, in the dtype of the arguments."""
    leaves = arguments.changed(lambda tensor: tensor.detach().clone().requires_grad_())
    h, c_new = naive(arguments.update, leaves.terms(), leaves.c)
    outputs, upstream = [h], [arguments.dh]
    if arguments.dc_new is not None:
        outputs, upstream = [h, c_new], [arguments.dh, arguments.dc_new]
    inputs = [*leaves.tensors, leaves.c]
    found = iter(torch.autograd.grad(outputs, [leaf for leaf in inputs if leaf is not None], upstream))
    gradients = [None if leaf is None else next(found) for leaf in inputs]
    return _named(h.detach(), c_new.detach() if arguments.update.keeps_state else None, gradients)


def _named(h: Tensor, c_new: Tensor | None, gradients: Sequence[Tensor | None]) -> Results:
    names = ("x", "weight", "bias", "recurrent", "recurrent_weight", "recurrent_bias", "c")
    named = {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: value for name, value in {"h": h, "c_new": c_new, **named}.items() if value is not None}


def check(draws: Sequence[Arguments]) -> None:
    """Not twice as far from the float64 results as plain PyTorch is in the same dtype."""
    exact = [reference(draw.changed(Tensor.double)) for draw in draws]
    assert_accurate([on_triton(draw) for draw in draws], exact, [reference(draw) for draw in draws])


def _draws(update: Update, *options: Any, count: int = 2, **sizes: Any) -> list[Arguments]:
    return [Arguments(update, *options, seed=seed, **sizes) for seed in range(count)]


@EACH_UPDATE
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_float32(poison, update, norms):
    check(_draws(update, norms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_UPDATE
def test_half_types(poison, update, dtype):
    check(_draws(update, ("channel", "none") if dtype == torch.bfloat16 else ("position",), dtype))


@EACH_KIND
def test_one_position(poison, update):
    check(_draws(update, ("position", "position"), channels=3, size=(1, 1), count=4))


@EACH_KIND
def test_several_tiles(poison, monkeypatch, update):
    """33 channels of 19 positions in tiles that divide neither, with their moments and sums in several parts."""
    kernel = {"lstm": "lstm_gates", "memory": "memory_gates", "product": "norm_gate"}[update.kind]
    small = {"POSITION_TILE": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(gates, "_MOMENTS_TILE", 128)
    with ExitStack() as stack:
        for launch, rows in (("forward", 8), ("backward", 8), ("norm_backward", 16)):
            stack.enter_context(forced(f"{kernel}_{launch}", {**small, "ROW_TILE": rows}))
        check(_draws(update, ("channel",), channels=33, size=(19, 1), count=1))


def _slices_of_channels() -> Callable[[Tensor], Tensor]:
    """Makes each map a slice of the channels of a larger one, all of different strides; leaves weights as they are."""
    around = itertools.count(1)

    def slice_of(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        beside = torch.full_like(tensor[:, :1], 7.0).expand(-1, next(around), -1, -1)
        return torch.cat([beside, tensor, beside], 1)[:, beside.shape[1] : -beside.shape[1]]

    return slice_of


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "expanded_batch": lambda tensor: tensor[:1].expand_as(tensor) if tensor.ndim == 4 else tensor,
    "slices_of_channels": _slices_of_channels(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_KIND
def test_layouts(poison, update, layout):
    """The same bits as from contiguous maps of the same numbers."""
    strided = Arguments(update, ("channel", "none")).changed(LAYOUTS[layout])
    assert not strided.c.is_contiguous()
    expected = on_triton(strided.changed(lambda tensor: tensor.clone(memory_format=torch.contiguous_format)))
    for name, value in on_triton(strided).items():
        assert torch.equal(value, expected[name]), name
        assert value.is_contiguous(), name


@EACH_KIND
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_empty_batch(update, norms):
    arguments = Arguments(update, norms, batch=0)
    results = on_triton(arguments)
    expected = reference(arguments)
    assert {name: value.shape for name, value in results.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert not any(value.any() for value in results.values())


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_a_state_that_is_not_kept(poison, form):
    """The results are those of a state that is kept and has no gradient."""
    kept = Arguments(Update("product", form, 1.25), ("channel", "none"))
    assert kept.dc_new is not None
    kept.dc_new.zero_()
    expected = on_triton(kept)
    del expected["c_new"]
    kept.update, kept.dc_new = kept.update._replace(keeps_state=False), None
    results = on_triton(kept)
    assert results.keys() == expected.keys()
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@EACH_UPDATE
def test_saturated_gates(poison, update):
    """Gates of +-1e3 saturate the activations exactly, and their gradients are finite."""
    arguments = Arguments(update, ("none",))
    arguments.tensors[0] = 1e3 * torch.sign(arguments.terms()[0].x)
    results = on_triton(arguments)
    assert all(value.isfinite().all() for value in results.values())
    for name, value in reference(arguments.changed(Tensor.double)).items():
        torch.testing.assert_close(results[name].double(), value, rtol=1e-6, atol=1e-6, msg=name)
