"""The forecaster: patches, the stack over time, scheduled sampling, attention maps."""

import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastsam.modules import SAM, BaseCell, ConvLSTMCell, Forecaster, RecurrentCell, SAConvLSTMCell, patchify, unpatchify

NAMES = ["convlstm", "base", "sa_convlstm"]


def small(cell: Any = "sa_convlstm", **options: Any) -> Forecaster:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channels": 2, "hidden_channels": (4, 6), "patch_size": 2, "kernel_size": 3}
    return Forecaster(cell, **(sizes | options))


def one_step(model: Forecaster, frame: Tensor, states: list[Any]) -> Tensor:
    """The next frame by the definition, for frames that patch_size divides."""
    x = model.embedding(patchify(frame, model.patch_size))
    for layer, cell in enumerate(model.cells):
        x, states[layer] = cell(x, states[layer])
    return unpatchify(model.output(x), model.patch_size)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patch_channels_are_row_column_channel(patch_size: int) -> None:
    p, channels = patch_size, 2
    frames = torch.arange(3 * channels * 6 * 12).reshape(3, channels, 6, 12)
    patches = patchify(frames, p)
    assert patches.shape == (3, p * p * channels, 6 // p, 12 // p)
    for row in range(p):
        for column in range(p):
            for c in range(channels):
                assert torch.equal(patches[:, (row * p + column) * channels + c], frames[:, c, row::p, column::p])


@pytest.mark.parametrize("height, width, patch_size", [(6, 12, 3), (8, 4, 4), (5, 7, 1), (5, 7, 2), (1, 1, 4)])
def test_unpatchify_inverts_patchify(height: int, width: int, patch_size: int) -> None:
    frames = torch.randn(2, 3, height, width)
    restored = unpatchify(patchify(frames, patch_size), patch_size)
    assert torch.equal(restored[..., :height, :width], frames)
    assert not restored[..., height:, :].any() and not restored[..., width:].any()


@pytest.mark.parametrize("cell", NAMES)
@pytest.mark.parametrize("embed_channels", [None, 5])
def test_free_running_prediction_feeds_predictions_back(
    cell: str, embed_channels: int | None, backend_name: str
) -> None:
    model = small(cell, embed_channels=embed_channels)
    frames = torch.randn(2, 3, 2, 4, 6)
    states: list[Any] = [None, None]
    expected = [one_step(model, frames[:, step], states) for step in range(3)]
    for _ in range(3):
        expected.append(one_step(model, expected[-1], states))
    torch.testing.assert_close(model(frames, 4), torch.stack(expected[2:], dim=1))
    torch.testing.assert_close(model(frames, 4, all_steps=True), torch.stack(expected, dim=1))


def test_layers_have_the_asked_sizes() -> None:
    model = Forecaster(SAConvLSTMCell, 3, [4, 6, 5], patch_size=2, embed_channels=7, kernel_size=3)
    assert [(cell.in_channels, cell.hidden_channels) for cell in model.cells] == [(7, 4), (4, 6), (6, 5)]
    assert model.embedding.weight.shape == (7, 12, 1, 1)
    assert model.output.weight.shape == (12, 5, 1, 1)
    assert Forecaster("convlstm", 3, (4,), patch_size=2).cells[0].in_channels == 12


def test_the_last_truth_read_is_the_one_before_the_last_prediction() -> None:
    model = small()
    frames, truth = torch.randn(2, 2, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    teacher_forced = model(torch.cat([frames, truth], dim=1), 1, all_steps=True)[:, 1:]
    torch.testing.assert_close(model(frames, 4, truth=truth), teacher_forced)
    longer = torch.cat([truth, torch.full_like(truth, torch.nan)], dim=1)
    torch.testing.assert_close(model(frames, 4, truth=longer), teacher_forced)


@pytest.mark.parametrize("per_sample", [False, True])
def test_truth_mask_chooses_for_each_step_what_is_read(per_sample: bool) -> None:
    model = small()
    frames, truth = torch.randn(2, 2, 2, 4, 4), torch.randn(2, 4, 2, 4, 4)
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    mask = mask if per_sample else mask[0]
    states: list[Any] = [None, None]
    one_step(model, frames[:, 0], states)
    prediction = one_step(model, frames[:, 1], states)
    expected = [prediction]
    for k in range(4):
        reads_truth = (mask[:, k] if per_sample else mask[k].expand(2)).tolist()
        read = torch.stack([truth[b, k] if reads_truth[b] else expected[-1][b] for b in range(2)])
        expected.append(one_step(model, read, states))
    torch.testing.assert_close(model(frames, 5, truth=truth, truth_mask=mask), torch.stack(expected, dim=1))


def test_a_mask_of_false_is_a_free_running_prediction() -> None:
    model, frames = small(), torch.randn(2, 2, 2, 4, 4)
    truth = torch.full((2, 3, 2, 4, 4), torch.nan)
    free = model(frames, 4)
    torch.testing.assert_close(model(frames, 4, truth=truth, truth_mask=torch.zeros(3, dtype=torch.bool)), free)
    none = torch.zeros(2, 0, dtype=torch.bool)
    torch.testing.assert_close(model(frames, 1, truth=truth, truth_mask=none), free[:, :1])


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (9, 4), (16, 10)])
def test_any_image_size_and_horizon(height: int, width: int) -> None:
    model = small(patch_size=4)
    assert model(torch.randn(2, 1, 2, height, width), 12).shape == (2, 12, 2, height, width)
    assert model(torch.randn(1, 3, 2, height, width), 1).shape == (1, 1, 2, height, width)
    assert model(torch.randn(0, 3, 2, height, width), 2).shape == (0, 2, 2, height, width)


def test_padding_is_zeros_at_every_step() -> None:
    model, frames = small(), torch.randn(1, 1, 2, 3, 5)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1, 0, 1))

    states: list[Any] = [None, None]
    first = one_step(model, pad(frames[:, 0]), states)[..., :3, :5]
    second = one_step(model, pad(first), states)[..., :3, :5]
    torch.testing.assert_close(model(frames, 2), torch.stack([first, second], dim=1))


def test_weights_are_folded_once_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = []
    original = SAM.fold
    monkeypatch.setattr(SAM, "fold", lambda sam: folds.append(sam) or original(sam))
    model = small()
    model(torch.randn(1, 3, 2, 4, 4), 4)
    assert folds == [cell.sam for cell in model.cells]


class Recording(ConvLSTMCell):
    """Counts the states of its own that are alive."""

    alive: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()
    most = 0

    def forward(self, x: Tensor, state: Any = None, weights: Any = None) -> Any:
        output, state = super().forward(x, state, weights)
        Recording.alive.add(state.c)
        Recording.most = max(Recording.most, len(Recording.alive))
        return output, state


def test_inference_keeps_no_past_states() -> None:
    Recording.alive, Recording.most = weakref.WeakSet(), 0
    with torch.no_grad():
        small(Recording)(torch.randn(1, 3, 2, 4, 4), 20)
    assert Recording.most <= 3  # one a layer, and the one being replaced


class Doubling(RecurrentCell):
    """A cell of the user's own: counts steps in its state, and takes any option."""

    def __init__(self, in_channels: int, hidden_channels: int, **options: Any) -> None:
        super().__init__()
        self.project = torch.nn.Conv2d(in_channels, hidden_channels, 1)

    def forward(self, x: Tensor, state: int | None = None, weights: None = None) -> tuple[Tensor, int]:
        step = (state or 0) + 1
        return self.project(x) * step, step


def test_a_cell_of_ones_own() -> None:
    model = Forecaster(Doubling, 1, (3,), anything=1)
    frames = torch.randn(1, 2, 1, 4, 4)
    expected = model.output(2 * model.cells[0].project(frames[:, 1]))
    torch.testing.assert_close(model(frames, 1)[:, 0], expected)


@pytest.mark.parametrize("cell", ["base", "sa_convlstm"])
def test_attention_maps_of_every_step_of_the_prediction(cell: str) -> None:
    model = small(cell)
    frames, points = torch.randn(2, 2, 2, 5, 6), torch.tensor([[0, 0], [2, 1], [1, 2]])
    maps = model.attention_maps(frames, 3, points)
    steps = 2 + 3 - 1
    assert maps.h.shape == (2, steps, 2, 3, 3, 3)
    assert not maps.h.requires_grad
    torch.testing.assert_close(maps.h.sum(dim=(-2, -1)), torch.ones(2, steps, 2, 3))
    read = torch.cat([frames, model(frames, 3)], dim=1)[:, :steps]
    states: list[Any] = [None, None]
    for step in range(steps):
        x = model.embedding(patchify(read[:, step], 2))
        for layer, one in enumerate(model.cells):
            expected = one.attention_maps(x, states[layer], points)
            torch.testing.assert_close(maps.h[layer, step], expected.h)
            if cell == "base":
                assert maps.m is None
            else:
                assert maps.m is not None
                torch.testing.assert_close(maps.m[layer, step], expected.m)
            x, states[layer] = one(x, states[layer])


def test_attention_maps_of_chosen_layers() -> None:
    model, frames = small(), torch.randn(1, 2, 2, 4, 4)
    every, some = (model.attention_maps(frames, 2, [(0, 1)], layers) for layers in (None, (1, 0)))
    torch.testing.assert_close(some.h, every.h.flip(0))
    assert model.attention_maps(frames, 2, [(0, 1)], [1]).h.shape[0] == 1


def test_cells_by_name_and_by_class_are_the_same() -> None:
    for name, cell in zip(NAMES, [ConvLSTMCell, BaseCell, SAConvLSTMCell], strict=True):
        assert all(type(layer) is cell for layer in small(name).cells)
        assert str(small(name)) == str(small(cell))


def test_autocast_trains() -> None:
    model, frames = small(layer_norm=True, embed_channels=3), torch.randn(2, 2, 2, 4, 4)
    truth, mask = torch.randn(2, 2, 2, 4, 4), torch.tensor([True, False])
    expected = model(frames, 3, truth=truth, truth_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(frames, 3, truth=truth, truth_mask=mask)
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)
    actual.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_double_precision_model() -> None:
    model = small(dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(1, 2, 2, 4, 4, dtype=torch.float64), 2).dtype == torch.float64
