"""The cells against naive transcriptions of figure 2 and equation 1."""

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.modules import BaseCell, ConvLSTMCell, ConvLSTMState, RecurrentCell, SAConvLSTMCell, SAConvLSTMState
from fastsam.ops import lstm_gates

CELLS = [ConvLSTMCell, BaseCell, SAConvLSTMCell]
Maps = tuple[Tensor, ...]


def parameters_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The parameters below a prefix, without it, as the oracle wants them."""
    named = dict(module.named_parameters())
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def naive_convolution(p: dict[str, Tensor], which: str, x: Tensor) -> Tensor:
    weight = p[f"{which}_conv.weight"]
    y = F.conv2d(x, weight, p.get(f"{which}_conv.bias"), padding=weight.shape[-1] // 2)
    if f"{which}_norm.weight" not in p:
        return y
    mean = y.mean(dim=(1, 2, 3), keepdim=True)
    variance = (y - mean).square().mean(dim=(1, 2, 3), keepdim=True)
    scale, shift = (p[f"{which}_norm.{name}"][:, None, None] for name in ("weight", "bias"))
    return (y - mean) / (variance + 1e-5).sqrt() * scale + shift


def naive_convlstm(cell: nn.Module, forget_bias: float, x: Tensor, h: Tensor, c: Tensor) -> Maps:
    p = dict(cell.named_parameters())
    i, f, g, o = (naive_convolution(p, "input", x) + naive_convolution(p, "hidden", h)).chunk(4, dim=1)
    c = torch.sigmoid(f + forget_bias) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def naive_step(cell: nn.Module, forget_bias: float, x: Tensor, state: Maps) -> Maps:
    """The next state, written for each kind of cell from the paper."""
    if isinstance(cell, SAConvLSTMCell):
        h, c, m = state
        h, c = naive_convlstm(cell, forget_bias, x, h, c)
        h, m = oracle.sam(parameters_of(cell, "sam."), h, m)
        return h, c, m
    h, c = state
    if isinstance(cell, BaseCell):
        x = oracle.self_attention_module(parameters_of(cell, "input_attention."), x)
        h = oracle.self_attention_module(parameters_of(cell, "hidden_attention."), h)
    return naive_convlstm(cell, forget_bias, x, h, c)


@pytest.mark.parametrize("cell_class", CELLS)
@pytest.mark.parametrize(
    "options",
    [{}, {"layer_norm": True, "forget_bias": 0.25}, {"bias": False, "kernel_size": 3}],
    ids=["default", "layer norm", "no bias"],
)
def test_three_steps_equal_the_equations(cell_class: Any, options: dict[str, Any], backend_name: str) -> None:
    torch.manual_seed(0)
    cell = cell_class(3, 6, **options, dtype=torch.float64)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.3)
    frames = torch.randn(3, 2, 3, 5, 7, dtype=torch.float64)
    state: Any = None
    count = 3 if cell_class is SAConvLSTMCell else 2
    expected: Maps = (torch.zeros(2, 6, 5, 7, dtype=torch.float64),) * count
    weights = cell.fold()
    for x in frames:
        output, state = cell(x, state, weights)
        expected = naive_step(cell, options.get("forget_bias", 1.0), x, expected)
        assert output is state.h
        torch.testing.assert_close(tuple(state), expected, rtol=1e-10, atol=1e-12)
    actual_loss, expected_loss = (sum(value.sin().sum() for value in maps) for maps in (state, expected))
    gradients, naive = (torch.autograd.grad(loss, list(cell.parameters())) for loss in (actual_loss, expected_loss))
    torch.testing.assert_close(gradients, naive, rtol=1e-9, atol=1e-11)


def _norms(kind: str, **options: Any) -> nn.Module:
    """A norm for the 24 gate channels of a cell with 6 channels on maps of 5 x 7."""
    made: dict[str, Any] = {
        "group": lambda: nn.GroupNorm(1, 24, **options),
        "two groups": lambda: nn.GroupNorm(2, 24, **options),
        "layer": lambda: nn.LayerNorm([24, 5, 7], **options),
        "rows": lambda: nn.LayerNorm([7], **options),
        "batch": lambda: nn.BatchNorm2d(24, **options),
        "identity": nn.Identity,
    }
    return made[kind]()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("input_norm", "hidden_norm", "folded"),
    [
        (("group", {}), ("group", {}), (True, True)),
        (("group", {"eps": 0.5}), ("group", {"eps": 0.5}), (True, True)),
        (("group", {"eps": 0.5}), ("group", {}), (True, False)),
        (("group", {"affine": False}), ("group", {}), (False, True)),
        (("layer", {}), ("layer", {}), (True, True)),
        (("layer", {"bias": False}), ("layer", {}), (False, True)),
        (("layer", {"elementwise_affine": False}), ("identity", {}), (False, False)),
        (("group", {}), ("layer", {}), (True, False)),
        (("identity", {}), ("layer", {}), (False, True)),
        (("group", {}), ("identity", {}), (True, False)),
        (("two groups", {}), ("rows", {}), (False, False)),
        (("batch", {}), ("batch", {}), (False, False)),
    ],
    ids=str,
)
def test_any_module_in_the_place_of_a_norm(
    input_norm: Any, hidden_norm: Any, folded: Any, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the operator serves go into it, others are called; the result is that of calling them."""
    torch.manual_seed(0)
    cell = ConvLSTMCell(3, 6, 3, layer_norm=True)
    cell.input_norm, cell.hidden_norm = (_norms(kind, **options) for kind, options in (input_norm, hidden_norm))
    cell.double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.5)
    seen = {}

    def record(*values: Any, **options: Any) -> Maps:
        seen.update(options)
        return lstm_gates(*values, **options)

    monkeypatch.setattr("fastsam.modules.cells.lstm_gates", record)
    x, h, c = (torch.randn(2, channels, 5, 7, dtype=torch.float64, requires_grad=True) for channels in (3, 6, 6))
    actual = cell.recur(x, h, c)
    assert tuple(seen[name] is not None for name in ("norm", "recurrent_norm")) == folded
    gates = cell.input_norm(cell.input_conv(x)) + cell.hidden_norm(cell.hidden_conv(h))
    expected = oracle.lstm_gates(gates, c, 1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    wanted = [x, h, c, *cell.parameters()]
    gradients, naive = (
        torch.autograd.grad(maps[0].sin().sum() + maps[1].square().sum(), wanted) for maps in (actual, expected)
    )
    torch.testing.assert_close(gradients, naive, rtol=1e-9, atol=1e-11)


def test_layer_norm_is_two_group_norms_by_name() -> None:
    """What a saved state dict of such a cell holds."""
    norms = {f"{which}_norm.{name}" for which in ("input", "hidden") for name in ("weight", "bias")}
    with_norm, without = (ConvLSTMCell(3, 6, layer_norm=flag).state_dict().keys() for flag in (True, False))
    assert with_norm - without == norms


@pytest.mark.parametrize("option", ["use_attention", "use_memory_attention"])
def test_ablated_cells_equal_the_equations(option: str, backend_name: str) -> None:
    torch.manual_seed(0)
    cell = SAConvLSTMCell(3, 6, **{option: False}, dtype=torch.float64)
    x, *state = (torch.randn(2, channels, 4, 5, dtype=torch.float64) for channels in (3, 6, 6, 6))
    _, actual = cell(x, tuple(state))
    torch.testing.assert_close(tuple(actual), naive_step(cell, 1.0, x, tuple(state)), rtol=1e-10, atol=1e-12)


def test_without_sam_the_sa_convlstm_is_the_convlstm() -> None:
    cell, plain = SAConvLSTMCell(3, 6), ConvLSTMCell(3, 6)
    plain.load_state_dict({name: value for name, value in cell.state_dict().items() if not name.startswith("sam.")})
    x, h, c = (torch.randn(2, channels, 4, 5) for channels in (3, 6, 6))
    torch.testing.assert_close(cell.recur(x, h, c), tuple(plain(x, (h, c))[1]), rtol=0, atol=0)


@pytest.mark.parametrize("cell_class", CELLS)
def test_shared_and_own_weights_and_plain_tuples_give_the_same(cell_class: Any) -> None:
    cell, x = cell_class(3, 8), torch.randn(2, 3, 4, 5)
    _, state = cell(x)
    assert isinstance(state, SAConvLSTMState if cell_class is SAConvLSTMCell else ConvLSTMState)
    for folded in (None, cell.fold()):
        torch.testing.assert_close(cell(x, tuple(state), folded), cell(x, state), rtol=0, atol=0)


@pytest.mark.parametrize("cell_class", CELLS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_step_compiles_into_one_graph(cell_class: Any, layer_norm: bool) -> None:
    torch.compiler.reset()
    cell = cell_class(3, 8, 3, layer_norm=layer_norm)
    step = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, weights = torch.randn(2, 3, 4, 5), cell.fold()
    _, state = cell(x)
    actual = step(x, state, weights)
    torch.testing.assert_close(actual, cell(x, state, weights))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(step(x, actual[1], weights), cell(x, actual[1], weights))


@pytest.mark.parametrize("cell_class", CELLS)
def test_two_steps_under_autocast_stay_close(cell_class: Any, backend_name: str) -> None:
    torch.manual_seed(0)
    cell, x = cell_class(3, 8, layer_norm=True), torch.randn(2, 3, 4, 5)
    expected = cell(x, cell(x)[1])[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = cell(x, cell(x)[1])[0]
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)
    actual.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


def test_attention_maps_are_those_of_the_step_itself() -> None:
    torch.manual_seed(0)
    points = [(0, 1), (3, 4)]
    x, h, c, m = (torch.randn(2, channels, 4, 5) for channels in (3, 6, 6, 6))
    cell = SAConvLSTMCell(3, 6)
    before_sam, _ = naive_convlstm(cell, 1.0, x, h, c)
    torch.testing.assert_close(
        cell.attention_maps(x, (h, c, m), points), cell.sam.attention_maps(before_sam, m, points)
    )
    base = BaseCell(3, 6)
    maps = base.attention_maps(x, (h, c), points)
    torch.testing.assert_close(maps.h, base.hidden_attention.attention_maps(h, points))
    assert maps.m is None


def test_attention_maps_need_attention() -> None:
    x = torch.randn(1, 3, 4, 5)
    with pytest.raises(ValueError, match="ConvLSTMCell has no attention"):
        ConvLSTMCell(3, 6).attention_maps(x, None, [(0, 0)])
    with pytest.raises(ValueError, match="use_attention=False"):
        SAConvLSTMCell(3, 6, use_attention=False).attention_maps(x, None, [(0, 0)])


def test_a_cell_of_ones_own_has_nothing_to_fold() -> None:
    assert RecurrentCell().fold() is None


def test_a_norm_with_a_hook_is_called() -> None:
    cell = ConvLSTMCell(2, 3, layer_norm=True)
    calls = []
    cell.input_norm.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 2, 4, 5)
    with_hook, _ = cell(x)
    assert calls == [1]
    cell.input_norm._forward_hooks.clear()
    torch.testing.assert_close(cell(x)[0], with_hook)


def test_a_norm_of_another_dtype_is_left_to_pytorch() -> None:
    """bfloat16 maps and a norm kept in float32, as PyTorch's own GroupNorm takes them on a CPU."""
    cell = ConvLSTMCell(2, 3, layer_norm=True, dtype=torch.bfloat16)
    cell.input_norm.float()
    cell.hidden_norm.float()
    h, _ = cell(torch.randn(1, 2, 4, 5, dtype=torch.bfloat16))
    assert h.dtype == torch.bfloat16 and h.isfinite().all()
