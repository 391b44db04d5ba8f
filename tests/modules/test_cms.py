"""CMS-LSTM, its blocks around other cells, and its published checkpoints, against the naive form."""

import warnings
from collections.abc import Callable
from typing import Any

import naive_cms
import pytest
import torch
from torch import Tensor, nn

import fastsam
from fastsam.convert import cms_lstm
from fastsam.modules import (
    CellWithBlocks,
    CMSLSTMCell,
    ContextEmbedding,
    ConvLSTMCell,
    ConvLSTMState,
    Forecaster,
    RecurrentCell,
    SAConvLSTMCell,
    SAConvLSTMState,
    SpatiotemporalExpression,
    TransplantCell,
)

SIZE = (8, 12)


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """In float64 with random parameters, the norms' included."""
    torch.manual_seed(seed)
    module.double()
    for name, parameter in module.named_parameters():
        is_scale = parameter.ndim == 3 and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.3)
    return module


def maps(*channels: int, size: tuple[int, int] = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, count, *size, generator=generator, dtype=torch.float64) for count in channels]


def naive(**options: Any) -> naive_cms.NaiveCMSLSTM:
    sizes: dict[str, Any] = {"in_channels": 2, "hidden_channels": 4, "layers": 3, "patch_size": 2, "size": SIZE}
    return randomised(naive_cms.NaiveCMSLSTM(**(sizes | options)))


def model_like(reference: naive_cms.NaiveCMSLSTM, **options: Any) -> fastsam.CMSLSTM:
    """The model that holds the converted weights of the naive one."""
    layers, p = len(reference.lstm), reference.patch_size
    model = fastsam.CMSLSTM(
        reference.embed.in_channels // p**2,
        (reference.hidden_channels,) * layers,
        patch_size=p,
        embed_channels=reference.hidden_channels,
        frame_size=(SIZE[0] * p, SIZE[1] * p),
        dtype=torch.float64,
        **options,
    )
    model.load_state_dict(cms_lstm(reference.state_dict(), patch_size=p))
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": 5, "scales": (2,), "layers": 1}, {"in_channels": 3, "patch_size": 1, "layers": 2}],
    ids=["default", "kernel 5", "no patches"],
)
def test_converted_checkpoints_forecast_the_same(options: dict[str, Any], backend_name: str) -> None:
    reference = naive(**options)
    mine = {name: options[key] for name, key in (("kernel_size", "kernel"), ("scales", "scales")) if key in options}
    model = model_like(reference, **mine)
    p, channels = reference.patch_size, reference.embed.in_channels // reference.patch_size**2
    torch.manual_seed(2)
    frames = torch.rand(2, 3, channels, SIZE[0] * p, SIZE[1] * p, dtype=torch.float64, requires_grad=True)
    expected, actual = reference(frames, 3), model(frames, 3)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(forecast.sin().sum(), frames)[0] for forecast in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_parameter_gradients_equal_the_naive_ones(backend_name: str) -> None:
    reference = naive(layers=2)
    model = model_like(reference)
    frames = torch.rand(1, 2, 2, 16, 24, dtype=torch.float64)
    for forecaster in (reference, model):
        forecaster(frames, 2).sin().sum().backward()
    of_naive = {
        name: torch.zeros(1, dtype=torch.float64) if parameter.grad is None else parameter.grad
        for name, parameter in reference.named_parameters()
    }
    expected = cms_lstm(of_naive, patch_size=2)
    for name, parameter in model.named_parameters():
        if name.endswith(("key.bias", "gamma")):
            assert parameter.grad is not None and not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9, msg=name)


def test_parameter_counts_are_the_published_ones() -> None:
    def count(**options: Any) -> int:
        return sum(parameter.numel() for parameter in fastsam.CMSLSTM(device="meta", **options).parameters())

    assert count() == 7_967_580
    assert count(kernel_size=5) == 10_589_020


def test_the_published_model_has_the_shapes_of_the_default_one() -> None:
    """All names and shapes of the MovingMNIST model, without its data."""
    with torch.device("meta"):
        published = naive_cms.NaiveCMSLSTM(1, 64, 4, 4, (16, 16)).state_dict()
        fastsam.CMSLSTM(device="meta").load_state_dict(cms_lstm(published), assign=True)


def test_names_of_a_model_in_data_parallel() -> None:
    published = naive(layers=1)
    expected, actual = (cms_lstm(of.state_dict(), patch_size=2) for of in (published, nn.DataParallel(published)))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_the_unused_gammas_may_be_absent() -> None:
    published = naive(layers=1).state_dict()
    expected = cms_lstm(published, patch_size=2)
    without = {name: value for name, value in published.items() if not name.endswith("gamma")}
    assert len(without) == len(published) - 3
    actual = cms_lstm(without, patch_size=2)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    assert not any(value.any() for name, value in actual.items() if name.endswith("gamma"))


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_context_embedding_takes_turns(steps: int) -> None:
    block = randomised(ContextEmbedding(3, 6, 3, steps=steps, map_size=SIZE))
    x, h = maps(3, 6)
    expected_x, expected_h = x, h
    for step in range(steps):
        if step in (0, 2, 4):
            expected_x = 2 * torch.sigmoid(block.input_gate_norm(block.input_gate(expected_h))) * expected_x
        else:
            expected_h = 2 * torch.sigmoid(block.hidden_gate_norm(block.hidden_gate(expected_x))) * expected_h
    torch.testing.assert_close(block(x, h), (expected_x, expected_h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x), block(x, torch.zeros_like(h)), rtol=0, atol=0)


@pytest.mark.parametrize("scales, size", [((1,), (5, 7)), ((3, 1), (3, 9)), ((1, 2, 4), SIZE), ([2, 2], (2, 2))])
def test_expression_with_channel_norms_is_the_naive_one(scales: Any, size: Any, backend_name: str) -> None:
    """GroupNorm(1, C) is LayerNorm((C, H, W)) whose scale and shift are the same at every position."""
    block = randomised(SpatiotemporalExpression(4, scales))
    reference = naive_cms.SE(4, size, scales).double()
    pairs = [("merge", "conv_bn.0"), ("merge_norm", "conv_bn.1"), ("fusion", "w_z"), ("state_norm", "norm_mem")]
    pairs += [("fused_gates", "w_z2h.0"), ("fused_norm", "w_z2h.1")]
    pairs += [("hidden_gates", "w_h2h.0"), ("hidden_norm", "w_h2h.1")]
    for scale in range(len(scales)):
        pairs += [(f"attentions.{scale}.{kind}", f"stages.{scale}.f_{kind}") for kind in ("query", "key", "value")]
    with torch.no_grad():
        for mine, theirs in pairs:
            for name, target in reference.get_submodule(theirs).named_parameters():
                source = block.get_submodule(mine).get_parameter(name)
                is_norm = source.ndim == 1 and target.ndim == 3
                target.copy_(source[:, None, None].expand_as(target) if is_norm else source)
    h, c = maps(4, 4, size=size)
    torch.testing.assert_close(block(h, c), reference(h, c), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block(h, c, block.fold()), block(h, c), rtol=0, atol=0)


def test_every_scale_reads_one_map_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(x: Tensor, *weights: Tensor, window: tuple[int, int], **options: Any) -> Tensor:
        seen.append((x.data_ptr(), x.is_contiguous(), tuple(x.shape), window))
        return fastsam.ops.self_attention(x, *weights, window=window, **options)

    monkeypatch.setattr("fastsam.modules.cms_blocks.self_attention", record)
    SpatiotemporalExpression(4, dtype=torch.float64)(*maps(4, 4))
    assert len({address for address, *_ in seen}) == 1
    assert [(contiguous, shape) for _, contiguous, shape, _ in seen] == [(True, (2, 4, 16, 12))] * 3
    assert [window for *_, window in seen] == [(16, 12), (8, 6), (4, 3)]


CELLS: dict[str, Callable[..., RecurrentCell]] = {
    "cms_lstm": CMSLSTMCell,
    "cms_lstm of a size": lambda *sizes, **options: CMSLSTMCell(*sizes, map_size=SIZE, **options),
    "cms_lstm without ce": lambda *sizes, **options: CMSLSTMCell(*sizes, use_context=False, **options),
    "convlstm": lambda *sizes, **options: TransplantCell(*sizes, layer_norm=True, kernel_size=3, **options),
    "sa_convlstm": lambda *sizes, **options: TransplantCell(
        *sizes, backbone="sa_convlstm", kernel_size=3, attention_channels=3, **options
    ),
    "sa_convlstm without se": lambda *sizes, **options: TransplantCell(
        *sizes, backbone=SAConvLSTMCell, scales=None, layer_norm=True, **options
    ),
}


@pytest.mark.parametrize("name", ["convlstm", "base", "sa_convlstm"])
@pytest.mark.parametrize("blocks", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_blocks_stand_before_and_after_the_cell(name: str, blocks: tuple[bool, bool]) -> None:
    """Three steps written out with the blocks and the cell themselves."""
    use_context, use_expression = blocks
    cell = TransplantCell(
        3, 6, backbone=name, use_context=use_context, scales=(1, 2) if use_expression else None, kernel_size=3
    )
    randomised(cell)
    state: Any = None
    expected: Any = None
    for x in maps(3, 3, 3):
        output, state = cell(x, state)
        assert output is state.h
        if use_context:
            x, h = cell.context(x, None if expected is None else expected[0])
            expected = None if expected is None else (h, *expected[1:])
        _, expected = cell.cell(x, expected)
        assert type(state) is type(expected) and len(state) == (3 if name == "sa_convlstm" else 2)
        if use_expression:
            expected = (*cell.expression(*expected[:2]), *expected[2:])
        torch.testing.assert_close(tuple(state), tuple(expected), rtol=1e-12, atol=1e-12)


def test_blocks_go_around_a_cell_that_exists() -> None:
    """What TransplantCell makes of a class, made of modules."""
    made = TransplantCell(3, 6, context_kernel_size=3, scales=(1, 4))
    wrapped = CellWithBlocks(ConvLSTMCell(3, 6), ContextEmbedding(3, 6, 3), SpatiotemporalExpression(6, (1, 4)))
    wrapped.load_state_dict(made.state_dict())
    x, h, c = (value.float() for value in maps(3, 6, 6))
    torch.testing.assert_close(wrapped(x, (h, c)), made(x, ConvLSTMState(h, c)), rtol=0, atol=0)


class PlainCell(RecurrentCell):
    """A cell of one's own: no option but its kernel size, and a plain tuple for a state."""

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 3, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels + hidden_channels, hidden_channels, kernel_size, padding="same", device=device, dtype=dtype
        )

    def forward(self, x: Tensor, state: Any = None, weights: Any = None) -> Any:
        h, c = state or 2 * (x.new_zeros(len(x), self.conv.out_channels, *x.shape[2:]),)
        h = torch.tanh(self.conv(torch.cat([x, h], dim=1)) + c)
        return h, (h, c + h)


def test_transplants_into_a_cell_of_ones_own() -> None:
    cell = randomised(TransplantCell(3, 6, backbone=PlainCell, scales=(1, 2)))
    x, h, c = maps(3, 6, 6)
    output, state = cell(x, (h, c))
    embedded, after = cell.context(x, h)
    expected = cell.expression(*cell.cell(embedded, (after, c))[1])
    assert type(state) is tuple and output is state[0]
    torch.testing.assert_close(state, tuple(expected), rtol=0, atol=0)
    model = fastsam.Transplant(hidden_channels=(4, 4), embed_channels=None, backbone=PlainCell, scales=(1, 2))
    model(torch.rand(1, 2, 1, 16, 16), 1).sum().backward()


def test_models_with_windows_are_traced() -> None:
    class NextFrame(fastsam.Transplant):
        def forward(self, frames: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(frames, 1)

    model = NextFrame(hidden_channels=(4,), embed_channels=None, kernel_size=3, scales=(1, 2))
    frames = torch.rand(2, 3, 1, 16, 24)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace is for one size
        traced = torch.jit.trace(model, (frames,))
        torch.testing.assert_close(traced(2 * frames), model(2 * frames))


def test_attention_maps_are_those_of_the_cell_after_ce() -> None:
    cell = randomised(TransplantCell(3, 6, backbone="sa_convlstm", kernel_size=3))
    x, h, c, m = maps(3, 6, 6, 6)
    points = [(0, 1), (7, 11)]
    embedded_x, embedded_h = cell.context(x, h)
    expected = cell.cell.attention_maps(embedded_x, (embedded_h, c, m), points)
    torch.testing.assert_close(cell.attention_maps(x, SAConvLSTMState(h, c, m), points), expected)
    with pytest.raises(ValueError, match="NormalisedConvLSTMCell has no attention"):
        CMSLSTMCell(3, 6, dtype=torch.float64).attention_maps(x, None, points)


@pytest.mark.parametrize("name", CELLS)
def test_back_ends_agree(name: str) -> None:
    cell = randomised(CELLS[name](3, 6))
    x, *later = maps(3, 3)
    results = []
    for backend in ("eager", "auto"):
        with fastsam.backend(backend):
            _, state = cell(x, None)
            output, state = cell(*later, state, cell.fold())
            loss = output.square().sum() + sum(value.sin().sum() for value in state)
            results.append([*state, *torch.autograd.grad(loss, list(cell.parameters()))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "name, backend_name",
    [("cms_lstm of a size", "eager"), ("cms_lstm", "cpu"), ("convlstm", "cpu"), ("sa_convlstm", "cpu")],
    indirect=["backend_name"],
)
def test_a_step_compiles_into_one_graph(name: str, backend_name: str) -> None:
    torch.compiler.reset()
    cell = randomised(CELLS[name](3, 4))
    step = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, results = maps(3)[0], []
    for one in (step, cell):
        weights, (_, state) = cell.fold(), cell(x)
        output, after = one(x, state, weights)
        gradients = torch.autograd.grad(output.sin().sum(), list(cell.parameters()), retain_graph=True)
        results.append([*after, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(step(x, after, weights), cell(x, after, weights), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_two_steps_under_autocast_stay_close(name: str, backend_name: str) -> None:
    torch.manual_seed(0)
    cell, x = CELLS[name](3, 8), maps(3)[0].float()
    expected = cell(x, cell(x)[1])[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = cell(x, cell(x)[1])[0]
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.1)
    actual.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


@pytest.mark.parametrize("scales, sizes", [((1,), [(9, 15), (13, 7), (1, 1)]), ((1, 2), [(11, 10), (6, 17)])], ids=str)
def test_frames_of_any_size_whose_patches_the_scales_divide(scales: Any, sizes: Any, backend_name: str) -> None:
    """One model for all of them; a frame that 3 x 3 patches do not divide is padded."""
    torch.manual_seed(0)
    model = fastsam.CMSLSTM(1, (4, 4), patch_size=3, embed_channels=4, frame_size=None, scales=scales)
    for size in sizes:
        forecast = model(torch.rand(1, 2, 1, *size), 2)
        assert forecast.shape == (1, 2, 1, *size) and forecast.isfinite().all()


def test_the_model_is_a_forecaster_of_its_cell() -> None:
    options: dict[str, Any] = {"hidden_channels": (4,), "patch_size": 2, "embed_channels": 4}
    model = fastsam.CMSLSTM(frame_size=(8, 16), **options)
    by_name = Forecaster("cms_lstm", map_size=(4, 8), **options)
    by_name.load_state_dict(model.state_dict())
    frames = torch.rand(1, 2, 1, 8, 16)
    torch.testing.assert_close(by_name(frames, 2), model(frames, 2), rtol=0, atol=0)
