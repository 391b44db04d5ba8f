"""Automatic mixed precision on a CPU, bfloat16: close to float32, and gradients in the dtype of the parameters."""

import pytest
import torch
from torch import Tensor, nn

import fastsam
from fastsam.modules import CMSLSTMCell

SIZE = (6, 4)


def _maps(*channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, count, *SIZE, generator=generator) for count in channels]


def _close(actual: Tensor, expected: Tensor, tolerance: float = 0.03) -> None:
    """Within the rounding of bfloat16 (2 ** -8) and a few operations."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"relative error {error:.3f}"


def _train_step(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    output = module(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    output.float().square().mean().backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


MODULES = {
    "sam": (lambda: fastsam.SAM(8, 3, 3), (8, 8)),
    "sam-folded": (lambda: fastsam.SAM(8, 8, 3), (8, 8)),
    "sam-without_attention": (lambda: fastsam.SAM(8, 8, 3, use_attention=False), (8, 8)),
    "self_attention": (lambda: fastsam.SelfAttention(8, 4), (8,)),
    "convlstm_cell": (lambda: fastsam.ConvLSTMCell(4, 8, 3), (4,)),
    "convlstm_cell-layer_norm": (lambda: fastsam.ConvLSTMCell(4, 8, 3, layer_norm=True), (4,)),
    "base_cell": (lambda: fastsam.BaseCell(4, 8, 3, attention_channels=4), (4,)),
    "sam-dense_gates": (lambda: fastsam.SAM(8, 3, 3, dense_gates=True), (8, 8)),
    "cms_lstm_cell": (lambda: CMSLSTMCell(4, 8, scales=(1, 2)), (4,)),
    "cms_lstm_cell-position_norms": (lambda: CMSLSTMCell(4, 8, scales=(1,), map_size=SIZE), (4,)),
    "sa_convlstm_cell": (lambda: fastsam.SAConvLSTMCell(4, 8, 3, attention_channels=4), (4,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(backend_name, name):
    torch.manual_seed(0)
    make, channels = MODULES[name]
    module, inputs = make(), _maps(*channels)
    expected, expected_gradients = _train_step(module, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, gradients = _train_step(module, *inputs)
    _close(actual, expected)
    largest = max(float(gradient.norm()) for gradient in expected_gradients.values())
    for parameter, gradient in gradients.items():
        assert gradient.dtype == torch.float32, parameter
        error = float((gradient - expected_gradients[parameter]).norm())
        assert error < 0.1 * float(expected_gradients[parameter].norm()) + 0.01 * largest, parameter
        assert bool(gradient.any()) == bool(expected_gradients[parameter].any()), parameter


@pytest.mark.parametrize("name", ["sam", "sa_convlstm_cell"])
def test_bfloat16_inputs(backend_name, name):
    """What the layer before hands over under autocast, and the module's own outputs fed back."""
    torch.manual_seed(0)
    make, channels = MODULES[name]
    module, inputs = make(), _maps(*channels)
    expected = module(*inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = module(*(x.bfloat16() for x in inputs))
        _close(output, expected)
        again = module(inputs[0].bfloat16(), state)
        assert again[0].isfinite().all()


@pytest.mark.parametrize("model_class", [fastsam.ConvLSTM, fastsam.BaseModel, fastsam.SAConvLSTM])
def test_models(backend_name, model_class):
    torch.manual_seed(0)
    model = model_class(hidden_channels=(8, 8), embed_channels=4, kernel_size=3)
    frames = torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(frames, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(frames, 2)
        loss = (output.float() - 0.5).square().mean()
    _close(output, expected, tolerance=0.05)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()


def test_compiled_under_autocast(backend_name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    sam, inputs = fastsam.SAM(8, 3, 3), _maps(8, 8)
    step = torch.compile(sam, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, expected_gradients = _train_step(sam, *inputs)
        actual, gradients = _train_step(step, *inputs)
    assert actual.dtype == expected.dtype
    _close(actual, expected, tolerance=0.01)
    for gradient, reference in zip(gradients.values(), expected_gradients.values(), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0.02, atol=1e-4)
