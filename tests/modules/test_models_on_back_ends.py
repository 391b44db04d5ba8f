"""Every model forward and backward on every back end there is: the same forecast and gradients as in plain PyTorch."""

import pytest
import torch
from extension import require_native
from small_models import FRAME, forecast_and_gradients, small

import fastsam
from fastsam import backends
from fastsam.models import MODELS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("cuda", "triton") if DEVICE.type == "cuda" else ("cpu", "triton")
INTERPRETED = ("sa_convlstm", "cms_lstm", "predrnn", "predrnn_plus_plus")
"""Models for Triton's interpreter, where a step takes seconds: with every operator among them."""


def require(backend: str, name: str) -> None:
    if backend == "triton" and DEVICE.type == "cpu" and name not in INTERPRETED:
        pytest.skip("runs on a card: too slow in Triton's interpreter")
    if backend != "triton":
        require_native()
    reason = backends.unsupported("double_attention", backend, DEVICE, torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_forecast_and_gradients_are_those_of_eager(name: str, backend: str) -> None:
    require(backend, name)
    frames = torch.rand(2, 2, 1, *FRAME) if backend != "triton" else torch.rand(1, 1, 1, *FRAME)
    model, frames = small(name).to(DEVICE), frames.to(DEVICE)
    with fastsam.backend("eager"):
        exact = forecast_and_gradients(model.double(), frames.double())
        expected = forecast_and_gradients(model.float(), frames)
    with fastsam.backend(backend):
        actual = forecast_and_gradients(model, frames)
    largest = max(value.norm().item() for value in exact.values())
    for key, value in exact.items():
        # Where a gradient is a small difference of large numbers, what eager loses of it may be lost here.
        allowed = 4 * (expected[key] - value).norm() + 1e-6 * value.norm() + 1e-8 * largest
        error = (actual[key] - value).norm()
        assert error <= allowed, f"{key}: {error:.1e}, at most {allowed:.1e}"
