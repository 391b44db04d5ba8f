"""The norms and gates of CMS-LSTM go into the operators; whatever else stands in the place of a norm is called."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import fastsam
from fastsam.modules import CMSLSTMCell, ContextEmbedding, SpatiotemporalExpression
from fastsam.modules.cms import NormalisedConvLSTMCell

SIZE = (6, 8)


def randomised(module: nn.Module) -> Any:
    """In float64 with random parameters, the norms' included."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def maps(*channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(2, count, *SIZE, generator=generator, dtype=torch.float64) for count in channels]
    return [draw.requires_grad_() for draw in draws]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """The calls of the gate operators: their names, and those of the norms that they are given."""
    seen: list[tuple[str, set[str]]] = []

    def recorded(name: str) -> Callable[..., Any]:
        def record(*values: Any, **options: Any) -> Any:
            seen.append((name, {key for key, value in options.items() if "norm" in key and value is not None}))
            return getattr(fastsam.ops, name)(*values, **options)

        return record

    for module, name in (("cms", "lstm_gates"), ("cms_blocks", "memory_gates"), ("cms_blocks", "norm_gate")):
        monkeypatch.setattr(f"fastsam.modules.{module}.{name}", recorded(name))
    return seen


ALL_NORMS = {"norm", "recurrent_norm", "state_norm"}


@pytest.mark.parametrize("map_size", [None, SIZE], ids=["channel", "position"])
def test_a_step_calls_the_fused_operators(
    map_size: Any, calls: list[tuple[str, set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five half-steps of CE, the ConvLSTM, SE; of all norms only that before SE's gates is PyTorch's."""
    cell = randomised(CMSLSTMCell(3, 4, scales=(1, 2), map_size=map_size))
    normalised = []
    for kind in (nn.GroupNorm, nn.LayerNorm):
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, f=forward: (normalised.append(self), f(self, x))[1])
    cell(*maps(3), maps(4, 4))
    expected = [*[("norm_gate", {"norm"})] * 5, ("lstm_gates", ALL_NORMS), ("memory_gates", ALL_NORMS)]
    assert calls == expected
    assert normalised == [cell.expression.merge_norm]


class Doubled(nn.Module):
    """Not a norm at all."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnNorm(nn.GroupNorm):
    """A norm with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked(channels: int) -> nn.Module:
    norm = nn.GroupNorm(1, channels)
    norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    return norm


REPLACEMENTS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda channels: nn.Identity(),
    "doubled": lambda channels: Doubled(),
    "own norm": lambda channels: OwnNorm(1, channels),
    "hooked": hooked,
    "another eps": lambda channels: nn.GroupNorm(1, channels, eps=0.3),
    "no weights": lambda channels: nn.GroupNorm(1, channels, affine=False),
    "positions": lambda channels: nn.LayerNorm((channels, *SIZE)),
    "two groups": lambda channels: nn.GroupNorm(2, channels),
}


def assert_same(actual: Any, expected: Any, wanted: list[Tensor]) -> None:
    """Values, and gradients of a function of them all."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    gradients = [
        torch.autograd.grad(sum(value.sin().sum() for value in values), wanted, retain_graph=True)
        for values in (actual, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("place", ["input_norm", "hidden_norm", "state_norm"])
def test_any_module_in_the_place_of_a_norm_of_the_cell(place: str, replacement: str, backend_name: str) -> None:
    cell = NormalisedConvLSTMCell(3, 4)
    setattr(cell, place, REPLACEMENTS[replacement](4 if place == "state_norm" else 16))
    randomised(cell)
    x, h, c = maps(3, 4, 4)
    gates = cell.input_norm(cell.input_conv(x)) + cell.hidden_norm(cell.hidden_conv(h))
    new = cell.state_norm(oracle.lstm_gates(gates, c, 1.0)[1])
    expected = gates[:, 12:].sigmoid() * new.tanh(), new
    assert_same(cell.recur(x, h, c), expected, [x, h, c, *cell.parameters()])


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("place", ["fused_norm", "hidden_norm", "state_norm"])
def test_any_module_in_the_place_of_a_norm_of_se(place: str, replacement: str, backend_name: str) -> None:
    block = SpatiotemporalExpression(4, (1, 2))
    setattr(block, place, REPLACEMENTS[replacement](4 if place == "state_norm" else 12))
    randomised(block)
    seen: dict[str, Tensor] = {}
    block.fused_gates.register_forward_hook(lambda module, inputs, output: seen.update(fused=output))
    h, c = maps(4, 4)
    actual = block(h, c)
    gates = block.fused_norm(seen["fused"]) + block.hidden_norm(block.hidden_gates(h))
    new = block.state_norm(oracle.memory_gates(gates, c)[1])
    assert_same(actual, (gates[:, 8:].sigmoid() * new, new), [h, c, *block.fused_gates.parameters()])


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_any_module_in_the_place_of_a_norm_of_ce(replacement: str, backend_name: str) -> None:
    block = ContextEmbedding(3, 4, steps=2)
    block.input_gate_norm, block.hidden_gate_norm = nn.Identity(), REPLACEMENTS[replacement](4)
    randomised(block)
    x, h = maps(3, 4)
    new_x = 2 * block.input_gate(h).sigmoid() * x
    new_h = 2 * block.hidden_gate_norm(block.hidden_gate(new_x)).sigmoid() * h
    assert_same(block(x, h), (new_x, new_h), [x, h, *block.parameters()])
