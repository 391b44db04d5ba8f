"""Metrics against their definitions, computed frame by frame."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from training.metrics import ForecastMetrics, copy_last_frame


@pytest.fixture
def forecasts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(5, 3, 1, 16, 12, generator=generator)
    return truth + 0.4 * torch.randn(truth.shape, generator=generator), truth


def measured(prediction: torch.Tensor, truth: torch.Tensor, ssim=("ssim",)) -> ForecastMetrics:
    metrics = ForecastMetrics(ssim)
    metrics.update(prediction[:2], truth[:2])
    metrics.update(prediction[2:], truth[2:])
    return metrics


def test_errors_are_sums_over_the_frame(forecasts):
    prediction, truth = forecasts
    error, clipped = prediction - truth, prediction.clamp(0, 1) - truth
    expected = {
        "mse": error.square(),
        "mse_clipped": clipped.square(),
        "mae": error.abs(),
        "mae_clipped": clipped.abs(),
    }
    metrics = measured(prediction, truth)
    for name, values in expected.items():
        steps = values.double().sum((2, 3, 4)).mean(0)
        np.testing.assert_allclose(metrics.steps()[name], steps, rtol=1e-6)
        assert metrics.means()[name] == pytest.approx(float(steps.mean()), rel=1e-6)
    assert metrics.means()["mse"] > metrics.means()["mse_clipped"]


def test_psnr_is_a_mean_over_frames(forecasts):
    prediction, truth = forecasts
    mse = (prediction.clamp(0, 1) - truth).double().square().mean((2, 3, 4))
    expected = sum(20 * math.log10(1 / math.sqrt(value)) for value in mse.flatten().tolist()) / mse.numel()
    assert measured(prediction, truth).means()["psnr"] == pytest.approx(expected)
    assert measured(truth, truth).means()["psnr"] == 100


def test_ssim_variants(forecasts):
    prediction, truth = forecasts
    metrics = measured(prediction, truth, ("ssim", "ssim_openstl", "ssim_predrnn")).means()
    pairs = [
        (p.numpy(), t.numpy())
        for p, t in zip(prediction.clamp(0, 1).double().flatten(0, 2), truth.double().flatten(0, 2), strict=True)
    ]
    as_bytes = [tuple(np.uint8(frame * 255) for frame in pair) for pair in pairs]
    assert metrics["ssim"] == pytest.approx(np.mean([structural_similarity(*p, data_range=1.0) for p in pairs]))
    assert metrics["ssim_openstl"] == pytest.approx(np.mean([structural_similarity(*p, data_range=2.0) for p in pairs]))
    assert metrics["ssim_predrnn"] == pytest.approx(np.mean([structural_similarity(*p) for p in as_bytes]))
    assert len(set(metrics.values())) == len(metrics)


def test_a_perfect_forecast_of_several_channels():
    truth = torch.rand(2, 3, 2, 9, 9)
    means = ForecastMetrics()
    means.update(truth, truth)
    assert means.means() == {"mse": 0, "mse_clipped": 0, "mae": 0, "mae_clipped": 0, "psnr": 100, "ssim": 1}


@pytest.mark.parametrize("shape", [(5, 3, 1, 16, 11), (3, 1, 16, 12)])
def test_shapes_must_agree(forecasts, shape):
    with pytest.raises(ValueError, match=r"must both be \(B, T, C, H, W\)"):
        ForecastMetrics().update(torch.zeros(shape), forecasts[1])


def test_copy_last_frame():
    frames = torch.rand(2, 3, 1, 4, 4)
    forecast = copy_last_frame(frames, 5)
    assert forecast.shape == (2, 5, 1, 4, 4)
    assert all(torch.equal(forecast[:, step], frames[:, -1]) for step in range(5))
