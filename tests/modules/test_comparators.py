"""The comparators against the naive forms of their equations, and as models: sizes, frames of any size, errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import naive_comparators as naive
import pytest
import torch
from torch import Tensor, nn

from fastsam.comparators import (
    E3DLSTM,
    MIM,
    PREDRNN_TRANSPLANT_ROWS,
    PREDRNN_TRANSPLANTS,
    QUOTED,
    MIMStar,
    PredRNN,
    PredRNNPlusPlus,
    TrajGRU,
    TransplantPredRNN,
)
from fastsam.models import Transplant
from fastsam.modules import ConvLSTMCell, Forecaster, TransplantCell, patchify, unpatchify
from fastsam.modules.causal_lstm import CausalLSTMCell, GradientHighwayUnit, HighwayCell
from fastsam.modules.e3d_lstm import E3DLSTMCell, WindowCell
from fastsam.modules.mim import CausalMIMCell, MIMCell
from fastsam.modules.predrnn import STLSTMCell, ZigzagForecaster
from fastsam.modules.traj_gru import TrajGRUCell

SIZES: dict[str, Any] = {"in_channels": 2, "hidden_channels": (4, 4), "patch_size": 2, "kernel_size": 3}
THREE: dict[str, Any] = {**SIZES, "hidden_channels": (4, 4, 4)}
ANY: dict[str, Any] = {"frame_size": None}
FRAME = (7, 9)
PLAIN: dict[str, Any] = {"layer_norm": False, "forget_bias": 0.25}

Case = tuple[type[Forecaster], dict[str, Any]]
CASES: dict[str, Case] = {
    "PredRNN": (PredRNN, SIZES),
    "PredRNN, plain": (PredRNN, {**SIZES, **PLAIN, "bias": True}),
    "PredRNN, shared": (PredRNN, {**SIZES, "shared_input": True, "bias": True}),
    "PredRNN++": (PredRNNPlusPlus, {**SIZES, "hidden_channels": (6, 4, 4)}),
    "PredRNN++, plain": (PredRNNPlusPlus, {**SIZES, **PLAIN, "bias": False, "highway": False}),
    "MIM": (MIM, {**THREE, "frame_size": FRAME}),
    "MIM, plain": (MIM, {**THREE, **PLAIN, **ANY, "bias": False}),
    "MIM*": (MIMStar, {**THREE, **ANY}),
    "TrajGRU": (TrajGRU, {**SIZES, "hidden_channels": (4, 3), "links": 3, "flow_channels": 5}),
    "E3D-LSTM": (E3DLSTM, SIZES),
    "E3D-LSTM, plain": (E3DLSTM, {**SIZES, **PLAIN, "bias": False, "depth": 3, "kernel_depth": 3, "history": 2}),
}
MODELS = [name for name in CASES if "plain" not in name]


def make(name: str, dtype: torch.dtype = torch.float32, **others: Any) -> Any:
    model, options = CASES[name]
    torch.manual_seed(0)
    return model(**{**options, "dtype": dtype, **others})


def make_random(name: str) -> Any:
    """A model in float64 with no parameter at a special value."""
    model = make(name, torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def naive_stack(model: Any, parameters: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The layers of a model in their naive form."""
    own = [naive.below(parameters, f"cells.{layer}") for layer in range(len(model.cells))]
    sizes, bias = list(model.hidden_channels), getattr(model.cells[-1], "forget_bias", None)
    if isinstance(model, TrajGRU):
        return naive.plain([partial(naive.traj_gru, p, links=model.cells[0].links) for p in own], sizes)
    if isinstance(model, E3DLSTM):
        own[0] = naive.below(own[0], "cell")
        steps: list[Any] = [lambda x, s, cells, p=p: naive.e3d_lstm(p, x, s, bias, cells) for p in own]
        return naive.e3d_stack(steps, sizes[0], model.cells[0].depth, model.cells[1].history)
    if isinstance(model, MIM):
        first, block = (
            (naive.causal_lstm, naive.causal_mim) if isinstance(model, MIMStar) else (naive.st_lstm, naive.mim)
        )
        steps = [lambda x, s: first(own[0], x, s, bias)]
        steps += [lambda x, s, difference, p=p: block(p, x, s, bias, difference) for p in own[1:]]
        return naive.mim_stack(steps, sizes[0])
    step: Any = naive.st_lstm if isinstance(model, PredRNN) else naive.causal_lstm
    steps = [partial(step, p, forget_bias=bias) for p in own]
    if isinstance(model.cells[0], HighwayCell):
        steps[0] = partial(naive.highway, own[0], forget_bias=bias)
    return naive.zigzag(steps, sizes, "hcmz")


@pytest.mark.parametrize("name", CASES)
def test_forecasts_and_gradients_equal_the_naive_form(name: str, backend_name: str) -> None:
    model = make_random(name)
    frames = torch.randn(2, 2, 2, *FRAME, dtype=torch.float64, requires_grad=True)
    parameters = dict(model.named_parameters())
    expected = naive.forecast(parameters, frames, 3, 2, naive_stack(model, parameters))
    actual = model(frames, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    wanted = [frames, *parameters.values()]
    gradients, exact = (torch.autograd.grad(made.sin().sum(), wanted) for made in (actual, expected))
    for key, gradient, right in zip(["frames", *parameters], gradients, exact, strict=True):
        error = (gradient - right).norm() / right.norm()
        assert error < 1e-9, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = make(name)
    model(torch.randn(2, 2, 2, *FRAME), 2).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 2)])
def test_frames_of_any_size(name: str, size: tuple[int, int]) -> None:
    model = make(name, **(ANY if name == "MIM" else {}))
    predictions = model(torch.randn(1, 2, 2, *size), 2)
    assert predictions.shape == (1, 2, 2, *size) and predictions.isfinite().all()


CELLS: dict[str, Callable[..., Any]] = {
    "ST-LSTM": partial(STLSTMCell, layer_norm=True),
    "shared ST-LSTM": partial(STLSTMCell, shared_input=True),
    "causal LSTM": partial(CausalLSTMCell, layer_norm=True),
    "MIM": partial(MIMCell, layer_norm=True),
    "causal MIM": CausalMIMCell,
    "TrajGRU": partial(TrajGRUCell, links=2),
    "E3D-LSTM": E3DLSTMCell,
}


def cell_and_inputs(name: str) -> tuple[nn.Module, Tensor, Any]:
    torch.manual_seed(0)
    cell = CELLS[name](3, 4, kernel_size=3, dtype=torch.float64)
    x = torch.randn(2, 3, *((2, 5, 6) if name == "E3D-LSTM" else (5, 6)), dtype=torch.float64)
    _, state = cell(x)
    return cell, x, tuple(torch.randn_like(value) for value in state)


@pytest.mark.parametrize("name", CELLS)
def test_no_state_starts_from_zeros(name: str) -> None:
    cell, x, state = cell_and_inputs(name)
    channels = 4
    zeros = tuple(x.new_zeros(2, channels, *x.shape[2:]) for _ in state)
    torch.testing.assert_close(cell(x), cell(x, zeros), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_trajectories_keep_their_place_in_bfloat16(autocast: bool) -> None:
    """On a map so wide that bfloat16 does not tell its columns apart, along flows that it holds exactly."""
    torch.manual_seed(0)
    cell = TrajGRUCell(2, 4, links=2)
    with torch.no_grad():
        cell.flow.weight.zero_()
        cell.flow.bias.copy_(torch.tensor([0.375, -1.25, 0.125, -0.625]))
    cell.bfloat16()
    parameters = {name: parameter.double() for name, parameter in cell.named_parameters()}
    x, h = torch.randn(1, 2, 3, 300).bfloat16(), torch.randn(1, 4, 3, 300).bfloat16()
    expected, _ = naive.traj_gru(parameters, x.double(), {"h": h.double()}, 2)
    if autocast:
        cell.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, _ = cell(x, (h,))
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 0.01, f"{error:.3f}"


@pytest.mark.parametrize("name", ["PredRNN", "MIM", "TrajGRU", "E3D-LSTM"])
def test_scheduled_sampling_reads_the_true_frames(name: str) -> None:
    model, frames = make(name), torch.randn(2, 5, 2, *FRAME)
    torch.testing.assert_close(
        model(frames[:, :2], 3, truth=frames[:, 2:4]),
        torch.stack([model(frames[:, :n], 1)[:, 0] for n in (2, 3, 4)], 1),
    )


@pytest.mark.parametrize("name", MODELS)
def test_embedding_and_no_attention_maps(name: str) -> None:
    model, frames = make(name, embed_channels=3), torch.randn(1, 2, 2, *FRAME)
    assert model(frames, 1).shape == (1, 1, 2, *FRAME)
    with pytest.raises(ValueError, match="has no attention to make maps of"):
        model.attention_maps(frames, 1, [[0, 0]])


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


TAXIBJ: dict[str, Any] = {"in_channels": 2, "patch_size": 2, "device": "meta"}


def test_published_parameter_counts() -> None:
    predrnn, mim = PredRNN(shared_input=True, bias=True, **TAXIBJ), MIM(frame_size=(32, 32), **TAXIBJ)
    assert (count(predrnn), count(mim)) == (4_599_560, 9_511_112)
    printed = {row.model: row.value for row in QUOTED if row.metric == "parameters"}
    for name, model in (("PredRNN", predrnn), ("MIM", mim), ("E3D-LSTM", E3DLSTM(device="meta"))):
        assert round(3e-6 * count(model), 3) == printed[name], name


def test_parameters_of_the_equations() -> None:
    """PredRNN in its paper's form, and PredRNN++, counted convolution by convolution."""
    unit = 64 * 64 * 25
    norms, output = 2 * 64, 64 * 16 + 16
    st_lstm = 7 * unit + 4 * unit + 3 * unit + 2 * unit + 2 * 64 * 64 + 15 * norms
    first = st_lstm - 7 * unit * 48 // 64
    assert count(PredRNN(device="meta")) == first + 3 * st_lstm + output
    causal = (7 + 2 * 3 + 4 + 4 + 1) * unit + 2 * 64 * 64 + 19 * (64 + norms) + 64
    first = causal - 7 * unit * 48 // 64
    highway = 4 * unit + 2 * (64 + norms)
    model = PredRNNPlusPlus(hidden_channels=(64, 64, 64, 64), device="meta")
    assert count(model) == first + 3 * causal + highway + output


@pytest.mark.parametrize("row", PREDRNN_TRANSPLANTS)
def test_transplants(row: str) -> None:
    """CE before every cell and SE behind it; the memory passes by SE."""
    torch.manual_seed(0)
    make_row, options = PREDRNN_TRANSPLANT_ROWS[row]
    model = make_row(**options, **SIZES, dtype=torch.float64)
    frames = torch.randn(1, 2, 2, 8, 16, dtype=torch.float64)
    memory, states, predictions = None, [None, None], []
    for step in range(3):
        x = patchify(frames[:, step] if step < 2 else predictions[-1], 2)
        for layer, cell in enumerate(model.cells):
            h, c, m = states[layer] or (x.new_zeros(1, 4, 4, 8),) * 3
            m = m if memory is None else memory
            if isinstance(model, TransplantPredRNN):
                x, h = (x, h) if cell.context is None else cell.context(x, h)
                _, (h, c, memory) = cell.cell(x, (h, c, m))
                h, c = (h, c) if cell.expression is None else cell.expression(h, c)
            else:
                _, (h, c, memory) = cell(x, (h, c, m))
            x, states[layer] = h, (h, c, memory)
        predictions.append(unpatchify(model.output(x), 2))
    torch.testing.assert_close(model(frames, 2), torch.stack(predictions[1:], 1), rtol=1e-9, atol=1e-11)


def test_recall_reads_only_the_history_it_is_told_to() -> None:
    cell = E3DLSTMCell(3, 4, 3, history=2, dtype=torch.float64)
    x, state = torch.randn(1, 3, 2, 5, 6, dtype=torch.float64), None
    for steps in (2, 2, 2):
        _, state = cell(x, state)
        assert state.history.shape[2] == 2 * steps
        assert torch.equal(state.history[:, :, -2:], state.c)


def test_quoted_numbers_agree_with_each_other() -> None:
    """Both papers print the same for the same model; an average is that of its four frames."""
    cells: dict[tuple[str, str, str], float] = {}
    for row in QUOTED:
        assert cells.setdefault((row.model, row.dataset, row.metric), row.value) == row.value, row
    averages = {model: value for (model, _, metric), value in cells.items() if metric == "MSE" and value < 1}
    assert len(averages) == 8
    del averages["ST-ResNet"]  # the paper prints 0.618 beside frames whose mean is 0.616
    for model, average in averages.items():
        frames = [cells[model, "TaxiBJ", f"MSE {k}"] for k in (1, 2, 3, 4) if (model, "TaxiBJ", f"MSE {k}") in cells]
        assert not frames or sum(frames) / 4 == pytest.approx(average, abs=6e-4), model
    assert {row.paper for row in QUOTED} == {"SA-ConvLSTM", "CMS-LSTM"}
    assert set(PREDRNN_TRANSPLANT_ROWS) == set(PREDRNN_TRANSPLANTS)


X = torch.zeros(2, 3, 4, 5)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: STLSTMCell(0, 4), ValueError, "STLSTMCell: in_channels must be at least 1, got 0"),
    (lambda: STLSTMCell(3, 4, 4), ValueError, "STLSTMCell: kernel_size must be odd, got 4"),
    (lambda: STLSTMCell(3, 4, shared_input=1), TypeError, "STLSTMCell: shared_input must be True or False, got 1"),
    (lambda: STLSTMCell(3, 4, bias="no"), TypeError, "STLSTMCell: bias must be True or False, got 'no'"),
    (lambda: CausalLSTMCell(3, 4, memory_channels=0), ValueError, "memory_channels must be at least 1, got 0"),
    (lambda: GradientHighwayUnit(4, 2), ValueError, "GradientHighwayUnit: kernel_size must be odd, got 2"),
    (lambda: MIMCell(3, 4, map_size=4), TypeError, r"map_size must be None or a pair \(height, width\), got 4"),
    (lambda: TrajGRUCell(3, 4, links=0), ValueError, "TrajGRUCell: links must be at least 1, got 0"),
    (lambda: E3DLSTMCell(3, 4, history=0), ValueError, "E3DLSTMCell: history must be at least 1, got 0"),
    (lambda: E3DLSTM(depth=0), ValueError, "WindowCell: depth must be at least 1, got 0"),
    (lambda: PredRNN(1, (4, 6)), ValueError, r"PredRNN: hidden_channels must be the same .* got \(4, 6\)"),
    (lambda: PredRNN(1, (4, 4), links=3), TypeError, "STLSTMCell has no option 'links'"),
    (lambda: MIM(1, (4,)), ValueError, r"MIM: hidden_channels must name at least two layers, .* got \(4,\)"),
    (lambda: MIM(1, (4, 4), frame_size=(0, 4)), ValueError, r"MIM: frame_size\[0\] must be at least 1, got 0"),
    (lambda: PredRNNPlusPlus(1, (4, 4), highway=1), TypeError, "highway must be True or False, got 1"),
    (lambda: STLSTMCell(3, 4)(X[:, :2]), ValueError, r"STLSTMCell: x must have shape \(B, 3, H, W\)"),
    (lambda: STLSTMCell(3, 4)(X.double()), TypeError, "x is torch.float64, the module's parameters are torch.float32"),
    (lambda: STLSTMCell(3, 4)(X, (X, X)), TypeError, r"maps \(h, c, m\), got 2 of them"),
    (lambda: STLSTMCell(3, 4)(X, X), TypeError, r"maps \(h, c, m\), got Tensor"),
    (lambda: STLSTMCell(3, 4)(X, (X, X, X)), ValueError, "STLSTMCell: the state's h must have shape"),
    (lambda: STLSTMCell(3, 4)(X, None, 1), TypeError, "weights must be None, there is nothing to fold here, got int"),
    (lambda: MIMCell(3, 4, map_size=(5, 4))(X), ValueError, "x must be a map of 5 x 4, .* got 4 x 5; map_size=None"),
    (lambda: MIMCell(3, 4)(X, None, None, X), ValueError, "MIMCell: difference must have shape"),
    (lambda: TrajGRUCell(3, 4)(X, (X, X)), TypeError, r"map \(h,\), got 2 of them"),
    (lambda: TrajGRUCell(3, 4)(X, (X,)), ValueError, "TrajGRUCell: the state's h must have shape"),
    (lambda: E3DLSTMCell(3, 4)(X), ValueError, r"E3DLSTMCell: x must have shape \(B, 3, D, H, W\)"),
    (lambda: WindowCell(E3DLSTMCell(3, 4), 2)(X, (X,)), TypeError, r"WindowCell: state must be .* got 1 of them"),
    (
        lambda: MIM(map_size=(16, 16)),
        TypeError,
        "MIM: it has no argument 'map_size', which it computes from frame_size",
    ),
    (lambda: MIMStar(causal=False), TypeError, "MIMStar: it has no argument 'causal', which is part of what the"),
    (lambda: TransplantPredRNN(backbone="convlstm"), TypeError, "TransplantPredRNN: it has no argument 'backbone'"),
    (
        lambda: Forecaster(STLSTMCell, **SIZES),
        TypeError,
        "^Forecaster: STLSTMCell reads the memory of the layer below, .* use fastsam.PredRNN, or .*TransplantPredRNN",
    ),
    (
        lambda: Transplant(backbone=STLSTMCell, scales=(1, 2), **SIZES),
        TypeError,
        "^Transplant: STLSTMCell reads the memory .* Transplant does not hand on, .*TransplantPredRNN",
    ),
    (lambda: Forecaster(CausalLSTMCell, **SIZES), TypeError, "reads the memory .* use fastsam.PredRNNPlusPlus$"),
    (lambda: Forecaster(E3DLSTMCell, **SIZES), TypeError, "reads the memory .* use fastsam.E3DLSTM$"),
    (
        lambda: Forecaster(MIMCell, **SIZES),
        TypeError,
        "MIMCell reads the memory and the difference of .* use fastsam.MIM$",
    ),
    (lambda: Transplant(backbone=CausalMIMCell, **SIZES), TypeError, "the difference of .* use fastsam.MIMStar$"),
    (lambda: ZigzagForecaster(MIMCell, **SIZES), TypeError, "^ZigzagForecaster: MIMCell reads the difference of"),
    (
        lambda: ZigzagForecaster(ConvLSTMCell, **SIZES),
        TypeError,
        "^ZigzagForecaster: ConvLSTMCell does not read the memory of the layer below, .* use fastsam.Forecaster$",
    ),
    (
        lambda: ZigzagForecaster(TransplantCell, backbone="sa_convlstm", **SIZES),
        TypeError,
        "SAConvLSTMCell does not read the memory of the layer below",
    ),
    (
        lambda: HighwayCell(CausalLSTMCell(3, 4), GradientHighwayUnit(4))(X, (X,)),
        TypeError,
        r"maps \(h, c, m, z\), got 1 of them",
    ),
]


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_errors_name_the_argument(index: int) -> None:
    call, kind, message = ERRORS[index]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("model", [PredRNN, PredRNNPlusPlus, MIM, MIMStar, E3DLSTM, TrajGRU, TransplantPredRNN])
def test_defaults(model: Any) -> None:
    made = model(device="meta")
    assert made.patch_size == 4 and len(made.hidden_channels) == 4 and isinstance(made.embedding, nn.Identity)
