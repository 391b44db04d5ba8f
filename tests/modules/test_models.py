"""The named models: sizes, rows of the ablation, gradients, data-parallel training."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from fastsam.comparators import E3DLSTM, MIM, MIMStar, PredRNN, PredRNNPlusPlus, TrajGRU
from fastsam.models import (
    ABLATION,
    CMSLSTM,
    MODELS,
    TRANSPLANTS,
    BaseModel,
    ConvLSTM,
    SAConvLSTM,
    Transplant,
    ablation,
    build,
    transplant,
)
from fastsam.modules import BaseCell, CMSLSTMCell, ConvLSTMCell, Forecaster, SAConvLSTMCell, TransplantCell

SMALL: dict[str, Any] = {"hidden_channels": (4, 6), "patch_size": 2, "embed_channels": 3, "kernel_size": 3}


def small_transplant(row: str) -> Forecaster:
    """The row for frames of 8 x 8."""
    size = {} if row.startswith("sa_") else {"frame_size": (8, 8)}
    return transplant(row, **SMALL, **size)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pointwise(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def convlstm_parameters(inputs: int, hidden: int, k: int = 5) -> int:
    """Both convolutions, one bias, and scale and shift of the norm of each."""
    gates = 4 * hidden
    return (inputs + hidden) * gates * k * k + gates + 2 * 2 * gates


def self_attention_parameters(channels: int, d: int = 16) -> int:
    return 2 * pointwise(channels, d) + 2 * pointwise(channels, channels)


def gate_parameters(gated: int, channels: int, k: int = 5) -> int:
    return gated * k * k + pointwise(gated, 3 * channels)


def expected_parameters(row: str, patch_channels: int = 16, c: int = 64, d: int = 16) -> int:
    cell = {
        "convlstm": 0,
        "base": 2 * self_attention_parameters(c, d),
        "memory": gate_parameters(c, c),
        "sa_convlstm_without_zm": 2 * pointwise(c, d) + 2 * pointwise(c, c) + gate_parameters(2 * c, c),
        "sa_convlstm": 3 * pointwise(c, d) + 2 * pointwise(c, c) + pointwise(2 * c, c) + gate_parameters(2 * c, c),
    }[row]
    return pointwise(patch_channels, c) + pointwise(c, patch_channels) + 4 * (convlstm_parameters(c, c) + cell)


@pytest.mark.parametrize("row", ABLATION)
def test_parameter_counts(row: str) -> None:
    assert count(ablation(row, device="meta")) == expected_parameters(row)
    assert count(ablation(row, device="meta", in_channels=2, patch_size=2)) == expected_parameters(row, 8)


@pytest.mark.parametrize("model, millions", [(BaseModel, 10.102), (SAConvLSTM, 10.471)])
def test_parameters_are_a_third_of_table_2(model: Any, millions: float) -> None:
    assert 3 * count(model(in_channels=2, patch_size=2, device="meta")) == pytest.approx(millions * 1e6, rel=5e-3)


@pytest.mark.parametrize("model, cell", [(ConvLSTM, ConvLSTMCell), (BaseModel, BaseCell), (SAConvLSTM, SAConvLSTMCell)])
def test_defaults_are_the_paper_s_configuration(model: Any, cell: Any) -> None:
    made = model(device="meta")
    assert isinstance(made, Forecaster)
    assert made.in_channels == 1 and made.patch_size == 4 and made.hidden_channels == (64, 64, 64, 64)
    for layer in made.cells:
        assert type(layer) is cell
        assert layer.kernel_size == 5 and layer.in_channels == 64
        assert isinstance(layer.input_norm, nn.GroupNorm) and isinstance(layer.hidden_norm, nn.GroupNorm)


def test_rows_of_the_ablation() -> None:
    kinds = {row: type(ablation(row, **SMALL)) for row in ABLATION}
    assert list(kinds.values()) == [ConvLSTM, BaseModel, SAConvLSTM, SAConvLSTM, SAConvLSTM]
    switches = [ablation(row, **SMALL).cells[0].sam for row in ("memory", "sa_convlstm_without_zm", "sa_convlstm")]
    assert [(sam.use_attention, sam.use_memory_attention) for sam in switches] == [
        (False, False),
        (True, False),
        (True, True),
    ]


def context_parameters(c: int, k: int, positions: int) -> int:
    """CE between equal numbers of channels; positions: how many scales and shifts a norm has a channel."""
    return 2 * c * c * k * k + 2 * 2 * c * positions


def expression_parameters(c: int, scales: int, positions: int, positions_of_both: int) -> int:
    attention = scales * (3 * pointwise(c, c) + 1)
    convolutions = (scales + 3 + 3) * c * c * 25 + c
    return attention + convolutions + pointwise(2 * c, c) + 2 * c * ((3 + 3 + 1) * positions + positions_of_both)


CMS_AND_SA = [row for row in TRANSPLANTS if not row.startswith("predrnn")]
"""The rows that are counted here; those of PredRNN have their tests with it."""


@pytest.mark.parametrize("row", CMS_AND_SA)
def test_parameter_counts_of_the_transplants(row: str) -> None:
    c, scales = 64, {"1": 1, "2": 2, "e": 3}[row[-1]] if "_se" in row else 0
    ends = pointwise(16, c) + pointwise(c, 16)
    if row.startswith("sa_"):
        k, positions = 5, (1, 1)
        cell = (expected_parameters("sa_convlstm") - ends) // 4
    else:
        k, positions = 3, (16 * 16, 16 * 32)
        cell = 2 * c * 4 * c * k * k + 2 * c * (4 + 4 + 1) * positions[0]
    cell += context_parameters(c, k, positions[0]) if "_ce" in row else 0
    cell += expression_parameters(c, scales, *positions) if scales else 0
    assert count(transplant(row, device="meta")) == ends + 4 * cell


def test_rows_of_the_transplants() -> None:
    models = {row: small_transplant(row) for row in CMS_AND_SA}
    assert {type(model.cells[0]) for row, model in models.items() if not row.startswith("sa_")} == {CMSLSTMCell}
    transplanted = {type(model.cells[0].cell) for model in models.values() if isinstance(model, Transplant)}
    assert transplanted == {SAConvLSTMCell} and type(models["sa_convlstm"]) is SAConvLSTM
    blocks = {
        row: (model.cells[0].context is not None, getattr(model.cells[0].expression, "scales", None))
        for row, model in models.items()
        if row != "sa_convlstm"
    }
    assert blocks == {
        "convlstm": (False, None),
        "convlstm_ce": (True, None),
        "convlstm_ce_se1": (True, (1,)),
        "convlstm_se": (False, (1, 2, 4)),
        "convlstm_ce_se2": (True, (1, 2)),
        "convlstm_ce_se": (True, (1, 2, 4)),
        "sa_convlstm_se": (False, (1, 2, 4)),
        "sa_convlstm_ce": (True, None),
        "sa_convlstm_ce_se": (True, (1, 2, 4)),
    }


def test_defaults_are_the_published_cms_lstm() -> None:
    model = CMSLSTM(device="meta")
    assert model.in_channels == 1 and model.patch_size == 4 and model.hidden_channels == (64, 64, 64, 64)
    for cell in model.cells:
        assert cell.context.kernel_size == cell.cell.kernel_size == 3 and cell.context.steps == 5
        assert cell.expression.scales == (1, 2, 4) and cell.cell.forget_bias == 1
        assert cell.expression.merge_norm.normalized_shape == (64, 16, 32)
    assert isinstance(CMSLSTM(frame_size=None, device="meta").cells[0].expression.merge_norm, nn.GroupNorm)
    assert CMSLSTM(frame_size=(61, 30), patch_size=4, device="meta").cells[0].cell.map_size == (16, 8)
    assert all(type(cell) is TransplantCell for cell in Transplant(device="meta").cells)


def test_rows_of_predrnn() -> None:
    kinds = {row: type(transplant(row, device="meta")).__name__ for row in TRANSPLANTS if row not in CMS_AND_SA}
    assert kinds.pop("predrnn") == "PredRNN"
    assert kinds == dict.fromkeys(["predrnn_ce", "predrnn_se", "predrnn_ce_se"], "TransplantPredRNN")
    assert transplant("predrnn_ce", device="meta").cells[0].expression is None


@pytest.mark.parametrize("row", CMS_AND_SA)
@pytest.mark.parametrize("read, horizon", [(1, 1), (2, 2)])
def test_every_parameter_of_a_transplant_has_a_gradient(row: str, read: int, horizon: int, backend_name: str) -> None:
    torch.manual_seed(0)
    model = small_transplant(row)
    model(torch.randn(2, read, 1, 8, 8), horizon).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        without_effect = name.endswith(("key.bias", "gamma"))
        if read > 1:
            assert parameter.grad.any() != without_effect, name


@pytest.mark.parametrize("row", ABLATION)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("read, horizon", [(1, 1), (2, 2)])
def test_every_parameter_has_a_gradient(row: str, layer_norm: bool, read: int, horizon: int, backend_name: str) -> None:
    torch.manual_seed(0)
    model = ablation(row, layer_norm=layer_norm, **SMALL)
    model(torch.randn(2, read, 1, 6, 6), horizon).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        cancels = name.endswith("key.bias")  # in the softmax
        if read > 1:
            assert parameter.grad.any() != cancels, name


def train_in_parallel(rank: int, rendezvous: str, results: str) -> None:
    """Two steps of each model in one of two processes; DDP raises at the second if a parameter had no gradient."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    norms = {}
    makers = {row: lambda row=row: ablation(row, layer_norm=True, **SMALL) for row in ABLATION}
    for row, make in (makers | {"cms": lambda: small_transplant("convlstm_ce_se")}).items():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(make())
        torch.manual_seed(rank)
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(1, 2, 1, 8, 8), 2).square().sum().backward()
        norms[row] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.save(norms, f"{results}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_data_parallel_training(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    arguments = os.fspath(tmp_path / "rendezvous"), os.fspath(tmp_path / "gradients")
    processes = [context.Process(target=train_in_parallel, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(f"{arguments[1]}-{rank}") for rank in range(2))
    assert len(first) == len(ABLATION) + 1
    for row in first:
        assert torch.equal(first[row], second[row])


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_every_model_has_a_name() -> None:
    classes = {CMSLSTM, PredRNN, PredRNNPlusPlus, MIM, MIMStar, E3DLSTM, TrajGRU}
    assert {MODELS[name].model for name in MODELS} >= classes
    assert ABLATION.keys() | TRANSPLANTS.keys() < MODELS.keys()
    assert {name for name in MODELS if MODELS[name].takes_frame_size} == {
        *("cms_lstm", "cms_lstm_without_blocks", "mim", "mim_star"),
        *("convlstm_ce", "convlstm_ce_se1", "convlstm_se", "convlstm_ce_se2", "convlstm_ce_se"),
    }


@pytest.mark.parametrize("name", MODELS)
def test_models_by_name_are_those_of_their_row(name: str) -> None:
    entry, made = MODELS[name], build(name, device="meta")
    assert type(made) is entry.model
    rows = {"SA-ConvLSTM, Table 1": (ablation, ABLATION), "CMS-LSTM, Table 3": (transplant, TRANSPLANTS)}
    if entry.paper in rows:
        make, labels = rows[entry.paper]
        (row,) = (row for row, label in labels.items() if label == entry.row)
        assert shapes(made) == shapes(make(row, device="meta"))
    else:
        assert shapes(made) == shapes(entry.model(device="meta"))


def test_rows_of_the_same_name() -> None:
    first, second = shapes(ablation("convlstm", device="meta")), shapes(transplant("convlstm", device="meta"))
    assert shapes(build("convlstm", device="meta")) == first != second
    assert shapes(build("cms_lstm_without_blocks", device="meta")) == second
    same = (shapes(make("sa_convlstm", device="meta")) for make in (ablation, transplant, build))
    assert next(same) == next(same) == next(same)


def test_build_passes_its_arguments_on() -> None:
    model = build("traj_gru", in_channels=2, hidden_channels=(4,), patch_size=2, links=3)
    assert model.in_channels == 2 and model.patch_size == 2 and model.cells[0].links == 3


@pytest.mark.parametrize(
    ("name", "overrides", "error", "message"),
    [
        (3, {}, TypeError, "build: name must be a string, one of 'convlstm', .*'traj_gru', got 3"),
        ("lstm", {}, ValueError, "build: there is no model 'lstm', known are 'convlstm', .*'traj_gru'$"),
        ("memory", {"use_attention": True}, TypeError, "use_attention is what makes the rows differ"),
        ("cms_lstm_without_blocks", {"scales": (1,)}, TypeError, "scales is what makes the rows differ"),
        ("mim", {"links": 3}, TypeError, "MIMCell has no option 'links'"),
    ],
)
def test_build_refuses(name: Any, overrides: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(name, **overrides)
