"""fastsam.convert.sa_convlstm_cell against published cells, and PublishedSAConvLSTMCell, which it makes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_cells import (
    CellAroundPeepholes,
    CellOnCHM,
    CellOnHCM,
    CellToHCM,
    CellWithGatesInAnotherOrder,
    CellWithItsState,
    CellWithPeepholes,
    StackOfCells,
    step,
)
from published_sams import WithGatesInAnotherOrder
from torch import Tensor, nn

from fastsam.convert import sa_convlstm_cell
from fastsam.modules import Forecaster, PublishedSAConvLSTMCell, SAConvLSTMState

Make = Callable[..., nn.Module]

PUBLISHED: dict[str, Make] = {
    "hyona-yu": CellOnHCM,
    "CaiCandong": CellToHCM,
    "CaiCandong without bias": lambda inputs, channels: CellToHCM(inputs, channels, bias=False),
    "johnjaejunlee95": CellOnCHM,
    "jerrywn121": CellWithItsState,
    "jerrywn121, 5x5": lambda inputs, channels: CellWithItsState(inputs, channels, 5),
    "tsugumi-sys": CellWithPeepholes,
    "tsugumi-sys on CUDA": lambda inputs, channels: CellWithPeepholes(inputs, channels, parameters=False),
    "tsugumi-sys, earlier": CellAroundPeepholes,
    "tsugumi-sys, earlier, on CUDA": lambda inputs, channels: CellAroundPeepholes(inputs, channels, parameters=False),
    "tsugumi-sys, earlier, a function": lambda inputs, channels: CellAroundPeepholes(
        inputs, channels, activation=torch.tanh
    ),
}
NORMALISED = {
    "channel_norm": True,
    "sam_options": {"attention_channels": 3, "kernel_size": None, "fusion_channels": 16},
}


def made(name: str, inputs: int = 3, channels: int = 8, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    module = PUBLISHED[name](inputs, channels).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)  # farther from the means that small logits give
        for norm in module.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)
    return module


def maps(*channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(2, count, 5, 6, generator=generator, dtype=torch.float64) for count in channels]
    return [value.to(dtype) for value in drawn]


def recurrence(cell: nn.Module, inputs: list[Tensor], state: list[Tensor] | None) -> list[Tensor]:
    """The outputs of all steps, and the last state."""
    outputs = []
    for x in inputs:
        if isinstance(cell, PublishedSAConvLSTMCell):
            output, state = cell(x, state)
            assert output is state.h
        else:
            state = step(cell, x, state)
        outputs.append(state[0])
    return [*outputs, *state]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < tolerance


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("start", ["zeros", "state"])
def test_a_recurrence_and_its_gradients_are_those_of_the_original(name: str, start: str, backend_name: str) -> None:
    original = made(name)
    measured = []
    for of in (original, sa_convlstm_cell(original)):
        *inputs, h, c, m = (x.requires_grad_() for x in maps(3, 3, 3, 3, 8, 8, 8))
        state = [h, c, m] if start == "state" else None
        outputs = recurrence(of, inputs, state)
        loss = sum((k * output).sin().sum() for k, output in enumerate(outputs, 1))
        measured.append([*outputs, *torch.autograd.grad(loss, [*inputs, *(state or [])])])
    assert_close(measured[1], measured[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_norm_keeps_its_eps(name: str) -> None:
    original = made(name)
    norms = [module for module in original.modules() if isinstance(module, nn.GroupNorm)]
    for norm in norms:
        norm.eps = 1e-4
    cell, quiet = sa_convlstm_cell(original), [0.03 * x for x in maps(3, 3, 8, 8, 8)]
    assert_close(recurrence(cell, quiet[:2], quiet[2:]), recurrence(original, quiet[:2], quiet[2:]))
    assert [module.eps for module in cell.modules() if isinstance(module, nn.GroupNorm)] == [1e-4 for _ in norms]


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_goes_on_as_the_original_does(name: str) -> None:
    original = made(name)
    cell = sa_convlstm_cell(original)
    composed = name.startswith("tsugumi-sys")  # of whose values the gradients are others, and after a step all are
    inputs, (target,) = maps(3, 3, 3), maps(8)
    for of in (original, cell):
        optimizer = torch.optim.SGD(of.parameters(), 0.1)
        for _ in range(1 if composed else 3):
            optimizer.zero_grad()
            (recurrence(of, inputs, None)[2] - target).square().mean().backward()
            optimizer.step()
    before, trained = sa_convlstm_cell(made(name)).state_dict(), sa_convlstm_cell(original).state_dict()
    without_effect = {"sam.key.bias", "sam.memory_key.bias", *(["conv.bias"] if "norm.bias" in before else [])}
    own = ("sam.value", "sam.memory_value", *(["peephole"] if "on CUDA" in name else [])) if composed else ()
    for key, value in cell.state_dict().items():
        assert key in without_effect or not torch.equal(value, before[key]), key
        if not key.startswith(own):
            torch.testing.assert_close(value, trained[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    original = made(name, dtype=dtype)
    cell = sa_convlstm_cell(original)
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in cell.parameters())
    x, *state = maps(3, 8, 8, 8, dtype=dtype)
    exact = sa_convlstm_cell(original).double()
    assert_close(
        cell(x, state)[1], exact(x.double(), [value.double() for value in state])[1], 8 * torch.finfo(dtype).eps
    )
    assert torch.equal(exact.conv.weight.float(), cell.conv.weight.float())


def test_the_original_is_left_alone() -> None:
    for name in PUBLISHED:
        original = made(name)
        recurrence(original, maps(3), maps(8, 8, 8))  # jerrywn121's now holds a state with a gradient's history
        before, attributes = copy.deepcopy(original.state_dict()), {**vars(original)}
        state = torch.get_rng_state()
        cell = sa_convlstm_cell(original)
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.zero_()
        assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
        assert all(vars(original)[key] is value for key, value in attributes.items())
        assert torch.equal(torch.get_rng_state(), state)
        if name == "tsugumi-sys on CUDA":
            assert original.W_ci.shape == (8, 5, 6) and original.W_ci.abs().min() > 0


def stacks(name: str) -> tuple[nn.Module, Forecaster]:
    """Two published cells, and a Forecaster with what is made of them."""
    cells = [made(name, 1, 8), made(name, 8, 8)]
    options: dict[str, Any] = {"hidden_channels": (8, 8), "dtype": torch.float64}
    torch.manual_seed(2)
    forecaster = Forecaster(PublishedSAConvLSTMCell, **options)
    forecaster.cells = nn.ModuleList(sa_convlstm_cell(cell) for cell in cells)
    return StackOfCells("cells", cells), forecaster


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_forecaster_of_converted_cells(name: str) -> None:
    stack, forecaster = stacks(name)
    frames = maps(1, 1, 1)
    for _ in range(2):  # each prediction from all frames before it
        frames.append(forecaster.output(stack(torch.stack(frames, dim=1))[:, -1]))
    given = torch.stack(frames[:3], dim=1)
    prediction = forecaster(given, horizon=2)
    assert_close(prediction.unbind(1), frames[3:])
    prediction.square().sum().backward()
    assert all(parameter.grad is not None for parameter in forecaster.parameters())
    rows = forecaster.attention_maps(given, 2, [(0, 1), (4, 5), (2, 2)])
    assert rows.h.shape == rows.m.shape == (2, 4, 2, 3, 5, 6)
    torch.testing.assert_close(rows.h.sum(dim=(-2, -1)), torch.ones(2, 4, 2, 3, dtype=torch.float64))


OPTIONS: dict[str, dict[str, Any]] = {
    "hyona-yu": NORMALISED,
    "CaiCandong without bias": NORMALISED | {"bias": False},
    "jerrywn121, 5x5": {
        "kernel_size": 5,
        "sam_options": {
            **{"attention_channels": 3, "value_channels": 3, "fusion_channels": 3, "kernel_size": 5},
            **{"dense_gates": True, "scale": 3**-0.5},
        },
    },
    "tsugumi-sys": {"peephole_size": (5, 6), "sam_options": NORMALISED["sam_options"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_state_dict_make_it_again(name: str) -> None:
    _, converted = stacks(name)
    again = Forecaster(PublishedSAConvLSTMCell, 1, (8, 8), **OPTIONS[name], dtype=torch.float64)
    again.load_state_dict(converted.state_dict())
    frames = torch.stack(maps(1, 1), dim=1)
    torch.testing.assert_close(again(frames, 3), converted(frames, 3), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hyona-yu", "jerrywn121", "tsugumi-sys"])
def test_a_step_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    cell = sa_convlstm_cell(made(name))
    x, *state = maps(3, 8, 8, 8)
    results = []
    for call in (cell, torch.compile(cell, fullgraph=True, backend="aot_eager")):
        output, new = call(x, state)
        gradients = torch.autograd.grad(output.sin().sum() + new.c.square().sum(), list(cell.parameters()))
        results.append([output, *new, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["hyona-yu", "tsugumi-sys"])
def test_folded_weights_and_no_state(name: str) -> None:
    cell, (x, *state) = sa_convlstm_cell(made(name)), maps(3, 8, 8, 8)
    torch.testing.assert_close(cell(x, state, cell.fold()), cell(x, state), rtol=0, atol=0)
    output, new = cell(x)
    assert isinstance(new, SAConvLSTMState)
    zeros = torch.zeros_like(output)
    torch.testing.assert_close((output, new), cell(x, (zeros, zeros, zeros)), rtol=0, atol=0)


def test_attention_maps_are_those_of_the_step() -> None:
    cell, (x, h, c, m) = sa_convlstm_cell(made("tsugumi-sys")), maps(3, 8, 8, 8)
    original = made("tsugumi-sys")
    rows = cell.attention_maps(x, (h, c, m), [(0, 0), (3, 4)]).h.flatten(2)
    torch.testing.assert_close(rows, original(x, h, c, m)[3][:, [0, 3 * 6 + 4]], rtol=1e-9, atol=1e-11)


def test_a_last_layer_of_one_channel() -> None:
    original, (x, *state) = made("hyona-yu", 8, 1), maps(8, 1, 1, 1)  # as hyona-yu's models have it
    assert_close(sa_convlstm_cell(original)(x, state)[1], original(x, state)[1])


def test_large_frames_are_checked_on_small_maps() -> None:
    torch.manual_seed(0)
    cell = sa_convlstm_cell(CellWithPeepholes(2, 4, (300, 200)))  # 60,000 positions: a matrix of 29 GB in float64
    assert cell.peephole.shape == (12, 300, 200) and cell.peephole_size == (300, 200)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peepholes_that_went_to_a_card() -> None:
    original = CellWithPeepholes(3, 8, device="cuda").to("cuda")
    assert "W_ci" not in original.state_dict()
    cell = sa_convlstm_cell(original)
    assert all(parameter.is_cuda for parameter in cell.parameters())
    assert torch.equal(cell.peephole[16:], original.W_co)


class Scrambled(CellOnHCM):
    """A published cell with another forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__(3, 8)
        self.forward = forward


def with_another(name: str, key: str, value: Any) -> nn.Module:
    """A published cell with another parameter or submodule."""
    module = made(name, dtype=torch.float32)
    owner, _, attribute = key.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value) if isinstance(value, Tensor) else value)
    return module


def with_another_sam(cell: nn.Module) -> nn.Module:
    cell.attention_layer = WithGatesInAnotherOrder(8, 3)
    return cell


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (dict, TypeError, "sa_convlstm_cell: module must be a torch.nn.Module, a published cell, got dict"),
    (nn.Identity, ValueError, r"Identity is no SA-ConvLSTM cell that is known here. It holds no parameters; known are"),
    (
        lambda: nn.Sequential(made("hyona-yu")),
        ValueError,
        r"holds 0\.attention_layer\.layer_q\.weight, .*TianChi_AIEarth: conv, sa\n.*conv, W_ci, W_cf, W_co, a",
    ),
    (lambda: made("hyona-yu").attention_layer, ValueError, "WithLayersK2V2 is no SA-ConvLSTM cell that is known here"),
    (lambda: with_another("jerrywn121", "gamma", torch.ones(1)), ValueError, "CellWithItsState is no .*gamma"),
    (lambda: with_another("tsugumi-sys", "W_ci", None), ValueError, "CellWithPeepholes is no .* W_cf"),
    (
        lambda: CellWithPeepholes(3, 8, activation=nn.LeakyReLU()),
        ValueError,
        "the activation of CellWithPeepholes must be tanh, as in the paper, got LeakyReLU",
    ),
    (
        lambda: CellAroundPeepholes(3, 8, activation=torch.sigmoid),
        ValueError,
        "the activation of CellAroundPeepholes must be tanh, as in the paper, got sigmoid",
    ),
    (
        lambda: CellWithGatesInAnotherOrder(3, 8),
        ValueError,
        "CellWithGatesInAnotherOrder has the parameters of the cell of hyona-yu/SA-convlstm and its forks but computes "
        "something else: its output on random maps is off by",
    ),
    (
        lambda: with_another("hyona-yu", "conv2d.1", nn.GroupNorm(4, 32)),
        ValueError,
        "CellOnHCM has the .*computes something else",
    ),
    (
        lambda: CellWithPeepholes(3, 8, padding="valid"),
        ValueError,
        r"could not be run on maps x \(2, 3, 3, 4\), h \(2, 8, 3, 4\), .*: RuntimeError: ",
    ),
    (
        lambda: Scrambled(lambda x: x),
        ValueError,
        "Scrambled has the .* but could not be run on maps x .*TypeError: ",
    ),
    (
        lambda: Scrambled(lambda x, state: (x, state)),
        ValueError,
        r"Scrambled .* its output on random maps is of shape \(2, 3, 3, 4\), not \(2, 8, 3, 4\)",
    ),
    (
        lambda: Scrambled(lambda x, state: ("output", state)),
        ValueError,
        r"Scrambled .* its output on random maps is a str, not a tensor",
    ),
    (
        lambda: with_another_sam(made("hyona-yu")),
        ValueError,
        "WithGatesInAnotherOrder has the parameters of a known SAM",
    ),
    (lambda: made("hyona-yu").to("meta"), ValueError, "could not be run on maps .*: NotImplementedError: .*meta"),
    (
        lambda: with_another("hyona-yu", "conv2d.0", nn.Conv2d(11, 32, 2)),
        ValueError,
        r"conv2d.0.weight must have shape \(4C, I\+C, k, k\), C = 8, I at least 1 and k odd, got \(32, 11, 2, 2\)",
    ),
    (
        lambda: with_another("hyona-yu", "conv2d.0", nn.Conv2d(8, 32, 3)),
        ValueError,
        r"conv2d.0.weight must have shape \(4C, I\+C, k, k\), C = 8, I at least 1 and k odd, got \(32, 8, 3, 3\)",
    ),
    (
        lambda: with_another("jerrywn121", "conv", nn.Conv2d(11, 24, 3)),
        ValueError,
        r"conv.weight must have shape \(4C, I\+C, k, k\) = \(32, 11, 3, 3\), got \(24, 11, 3, 3\)",
    ),
    (
        lambda: with_another("CaiCandong", "conv.1", nn.GroupNorm(16, 16)),
        ValueError,
        r"conv.1.weight must have shape \(4C,\) = \(32,\), got \(16,\)",
    ),
    (
        lambda: with_another("tsugumi-sys", "W_cf", torch.ones(8, 5, 5)),
        ValueError,
        r"W_cf must have shape \(C, H, W\) = \(8, 5, 6\), got \(8, 5, 5\)",
    ),
    (
        lambda: with_another("jerrywn121", "conv", nn.Conv2d(11, 32, 3, padding=1, dtype=torch.float64)),
        TypeError,
        "the query of sa is torch.float32, it must be torch.float64 as conv.weight is",
    ),
]


@pytest.mark.parametrize("make, error, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_errors_name_what_is_wrong(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}") as raised:
        sa_convlstm_cell(make())
    assert str(raised.value).startswith(("sa_convlstm_cell: ", "SAM.from_module: "))


X, H = torch.zeros(2, 3, 5, 6), torch.zeros(2, 8, 5, 6)
CELL = PublishedSAConvLSTMCell(3, 8, peephole_size=(5, 6))
BAD_ARGUMENTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: PublishedSAConvLSTMCell(0, 8), ValueError, "in_channels must be at least 1, got 0"),
    (lambda: PublishedSAConvLSTMCell(3, 8.0), TypeError, "hidden_channels must be a positive integer, got 8.0"),
    (lambda: PublishedSAConvLSTMCell(3, 8, 4), ValueError, "kernel_size must be odd, got 4"),
    (lambda: PublishedSAConvLSTMCell(3, 8, bias=1), TypeError, "bias must be True or False, got 1"),
    (lambda: PublishedSAConvLSTMCell(3, 8, channel_norm="x"), TypeError, "channel_norm must be True or False, got 'x'"),
    (lambda: PublishedSAConvLSTMCell(3, 8, peephole_size=5), TypeError, "peephole_size must be None or a pair"),
    (lambda: PublishedSAConvLSTMCell(3, 8, peephole_size=(5, 0)), ValueError, r"peephole_size\[1\] must be at least 1"),
    (
        lambda: PublishedSAConvLSTMCell(3, 8, sam_options=3),
        TypeError,
        "sam_options must be None or a mapping .*, got 3",
    ),
    (lambda: PublishedSAConvLSTMCell(3, 8, dtype=torch.int8), TypeError, "dtype must be None or a floating-point"),
    (lambda: CELL(X[:, :2]), ValueError, r"x must have shape \(B, 3, 5, 6\), got \(2, 2, 5, 6\)"),
    (lambda: CELL(X[..., :5]), ValueError, r"x must have shape \(B, 3, 5, 6\), got \(2, 3, 5, 5\)"),
    (lambda: CELL(X.double()), TypeError, "x is torch.float64, the module's parameters are torch.float32"),
    (lambda: CELL(X, (H, H)), TypeError, r"state must be None or a tuple of the maps \(h, c, m\), got 2 of them"),
    (lambda: CELL(X, H), TypeError, r"state must be None or a tuple of the maps \(h, c, m\), got Tensor"),
    (lambda: CELL(X, (H, H[:1], H)), ValueError, r"the state's c must have shape \(2, 8, 5, 6\), got \(1, 8, 5, 6\)"),
    (lambda: CELL(X, (H, H, H.double())), TypeError, "the state's m is torch.float64"),
]


@pytest.mark.parametrize("call, error, message", BAD_ARGUMENTS, ids=[message[:40] for *_, message in BAD_ARGUMENTS])
def test_errors_of_the_cell(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"PublishedSAConvLSTMCell: {message}"):
        call()
