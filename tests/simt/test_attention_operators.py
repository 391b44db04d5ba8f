"""The Python operators on the CUDA kernels, which run on the host: windows, and attention with 1x1 gates."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import pytest
import torch
from attention_calls import WAYS
from call_fields import Way
from kernel_build import KernelFault, Kernels
from torch import Tensor

import fastsam
from fastsam.ops import _dispatch
from fastsam.ops._attention import gates, native
from fastsam.ops._attention.gates import attention_gates
from fastsam.ops.separable_gates import eager as eager_gates

MAIN = pytest.mark.parametrize("name", ["float64", "float32", "tf32", "half_8", "half_16", "bfloat16"])


class Card:
    """Stands for `fastsam.ops._native.run` on a card: what is called, and the way that it multiplies."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.way, self.multiprocessors = kernels, WAYS["float64"], 1
        self.calls: list[str] = []

    def run(self, name: str, like: Tensor, fields: Sequence[float]) -> None:
        direction = name.removeprefix("attention_").removesuffix("_forward")
        memory: list[Any] = []
        if direction == "backward":
            workspace = torch.full((1 << 20,), torch.nan, dtype=torch.float64)
            memory = [workspace, workspace.nbytes]
        self.calls.append(name)
        call = self.way.function(self.kernels, direction)
        call(numpy.array(fields), *memory, *self.way.card(self.multiprocessors))


@pytest.fixture(scope="module")
def built(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("attention.cu")


@pytest.fixture
def card(built: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The back end cuda for tensors on the CPU; backward passes of gates are those of the CPU or plain."""
    built.schedule(None)
    card = Card(built)
    monkeypatch.setattr(native, "run", card.run)
    monkeypatch.setattr(_dispatch, "choose", lambda operator, tensor, channels=None: "cuda")
    monkeypatch.setattr(gates, "gates_implementation", lambda backend: eager_gates)
    yield card


def test_the_stand_in_is_asked(card: Card) -> None:
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    fastsam.ops.self_attention(x, torch.eye(3).double(), x.new_zeros(3), torch.eye(3).double(), x.new_zeros(3))
    assert card.calls == ["attention_forward"]
    with pytest.raises(KernelFault, match="workspace"):
        card.way.function(card.kernels, "backward")(
            numpy.array([1, 3, 3, 4, 0, 0, 0, 1, *[0] * 40]), None, 0, *card.way.card(1)
        )


def _arguments(way: Way, seed: int = 0, keys: int | None = 3, channels: int = 5, out: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(way.dtype)

    rank = keys or channels
    arguments = {
        "x": draw(2, channels, 6, 16),
        "score": draw(rank, channels, scale=(channels * rank) ** -0.5),
        "score_bias": draw(rank, scale=rank**-0.5),
        "value": draw(out, channels, scale=channels**-0.5),
        "value_bias": draw(out),
    }
    return arguments if keys is None else {**arguments, "key": draw(keys, channels, scale=channels**-0.5)}


def _evaluate(function: Callable[..., Any], arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of all arguments, in `dtype`."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in arguments.items()}
    outputs = function(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], way: Way) -> None:
    # Where the kernels themselves are tested errors are measured; here a wrong place or factor must show.
    precision = torch.float16 if way.tf32 else way.dtype
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[precision]
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm()
        assert error <= bound, f"{name}: {error:.1e}"


@MAIN
@pytest.mark.parametrize("keys", [3, None])
@pytest.mark.parametrize("window", [(3, 8), (6, 2), (1, 16), (2, 1)])
def test_windows(card: Card, name: str, keys: int | None, window: tuple[int, int]) -> None:
    card.way = WAYS[name]
    arguments = _arguments(card.way, keys=keys)

    def windowed(**values: Tensor) -> Tensor:
        return fastsam.ops.self_attention(**values, window=window)

    actual = _evaluate(windowed, arguments, card.way.dtype)
    assert card.calls == ["attention_forward", "attention_backward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose", lambda operator, tensor, channels=None: "eager")
        expected = _evaluate(windowed, arguments, torch.float64)
    _assert_close(actual, expected, card.way)


def test_windows_of_strided_maps(card: Card) -> None:
    arguments = _arguments(card.way)
    wide = torch.full((2, 10, 6, 16), torch.nan, dtype=torch.float64)
    wide[:, 1::2] = arguments["x"]
    expected = fastsam.ops.self_attention(**arguments, window=(3, 4))
    assert torch.equal(fastsam.ops.self_attention(**{**arguments, "x": wide[:, 1::2]}, window=(3, 4)), expected)
    copied = arguments["x"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(fastsam.ops.self_attention(**{**arguments, "x": copied}, window=(3, 4)), expected)


def _gated(sources: int) -> Callable[..., Any]:
    def step(h: Tensor, m: Tensor, pointwise: Tensor, bias: Tensor, value_bias: Tensor, **weights: Tensor) -> Any:
        names = ("score", "score_bias", "value", "key")
        parts = [
            native.Source(x, *(weights.get(f"{name}_{i}") for name in names)) for i, x in enumerate((h, m)[:sources])
        ]
        return attention_gates(parts, value_bias, m, pointwise, bias)

    return step


def _gated_arguments(way: Way, sources: int, keys: int | None, channels: int, out: int) -> dict[str, Tensor]:
    drawn = [_arguments(way, seed, keys, channels, out) for seed in range(2)]
    generator = torch.Generator().manual_seed(5)
    arguments = {"h": drawn[0].pop("x"), "m": drawn[1].pop("x"), "value_bias": drawn[0].pop("value_bias")}
    for i in range(sources):
        arguments |= {f"{name}_{i}": value for name, value in drawn[i].items() if name != "value_bias"}
    inputs = channels + out
    arguments["pointwise"] = (torch.randn(3 * channels, inputs, 1, 1, generator=generator) * inputs**-0.5).to(way.dtype)
    arguments["bias"] = torch.randn(3 * channels, generator=generator).to(way.dtype)
    return arguments


@MAIN
@pytest.mark.parametrize("multiprocessors", [1, 1000], ids=["64_rows", "16_rows"])
@pytest.mark.parametrize(
    ("sources", "keys", "channels", "out"),
    [(2, 3, 5, 4), (1, None, 9, 20), (2, 6, 40, 40), (1, 4, 66, 30), (1, 100, 100, 7)],
)
def test_attention_and_gates_in_one_launch(
    card: Card, name: str, sources: int, keys: int | None, channels: int, out: int, multiprocessors: int
) -> None:
    card.way, card.multiprocessors = WAYS[name], multiprocessors
    step, arguments = _gated(sources), _gated_arguments(WAYS[name], sources, keys, channels, out)
    actual = _evaluate(step, arguments, card.way.dtype)
    assert card.calls == ["attention_gates_forward", "attention_backward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose", lambda operator, tensor, channels=None: "eager")
        expected = _evaluate(step, arguments, torch.float64)
    _assert_close(actual, expected, card.way)
    with torch.no_grad():
        without_gradients = step(**arguments)
    assert torch.equal(without_gradients[0], actual["output 0"]) and torch.equal(
        without_gradients[1], actual["output 1"]
    )


def test_sam_with_1x1_gates_is_one_launch(card: Card) -> None:
    torch.manual_seed(0)
    sam = fastsam.SAM(6, 2, kernel_size=None, dtype=torch.float64)
    h, m = torch.randn(2, 2, 6, 4, 5, dtype=torch.float64)
    actual = sam(h, m)
    assert card.calls == ["attention_gates_forward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose", lambda operator, tensor, channels=None: "eager")
        torch.testing.assert_close(actual, sam(h, m))


def test_wrong_weights_are_refused_before_the_launch(card: Card) -> None:
    sam, other = fastsam.SAM(6, 2, kernel_size=None), fastsam.SAM(5, 2, kernel_size=None)
    with pytest.raises(ValueError, match=r"double_attention: .* must"):
        sam(torch.zeros(1, 6, 3, 3), None, other.fold())
    assert card.calls == []


@pytest.mark.parametrize("name", ["h", "m", "score_0", "key_1", "value_bias", "pointwise", "bias"])
def test_second_derivatives_are_an_error(card: Card, name: str) -> None:
    """Also where one input alone requires a gradient: the gates are linear in none of them."""
    step, arguments = _gated(2), _gated_arguments(card.way, 2, 3, 5, 4)
    leaf = arguments[name].requires_grad_()
    (gradient,) = torch.autograd.grad(step(**arguments)[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), leaf)
