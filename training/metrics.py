"""Forecast quality: MSE, MAE, PSNR and SSIM, per step of the horizon and on average.

With predictions p and truths t in [0, 1], shaped (B, T, C, H, W):

- ``mse`` and ``mae``: squared and absolute error *summed* over C, H, W of a frame, averaged over frames and samples, on
  raw predictions (as OpenSTL does); ``mse_clipped`` and ``mae_clipped``: after clipping p to [0, 1] (as PredRNN does).
- ``psnr``: 20 log10(1 / sqrt(mean squared error of the frame)) in dB after clipping; a frame without error counts as
  100 dB.
- ``ssim``: scikit-image's structural_similarity of a frame after clipping, data range 1.0. For comparison with
  published tables, ``ssim_openstl`` has data range 2.0 (what scikit-image assumed for floats), and ``ssim_predrnn``
  compares frames as uint8 with data range 255.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

HIGHEST_PSNR = 100.0


def _ssim(prediction: NDArray, truth: NDArray, data_range: float) -> float:
    """Mean structural similarity of two frames (C, H, W)."""
    if len(truth) == 1:
        return float(structural_similarity(prediction[0], truth[0], data_range=data_range))
    return float(structural_similarity(prediction, truth, data_range=data_range, channel_axis=0))


def _as_bytes(frame: NDArray) -> NDArray[np.uint8]:
    return (frame * 255).astype(np.uint8)


SSIM: dict[str, Callable[[NDArray, NDArray], float]] = {
    "ssim": lambda prediction, truth: _ssim(prediction, truth, 1.0),
    "ssim_openstl": lambda prediction, truth: _ssim(prediction, truth, 2.0),
    "ssim_predrnn": lambda prediction, truth: _ssim(_as_bytes(prediction), _as_bytes(truth), 255.0),
}


class ForecastMetrics:
    """Sums the metrics of this module's docstring over batches, a value for each step of the horizon.

    Args:
        ssim: names of the SSIM definitions to compute, keys of `SSIM`; they take most of the time.
    """

    def __init__(self, ssim: Sequence[str] = ("ssim",)) -> None:
        self.ssim = tuple(ssim)
        self.samples = 0
        self.sums: dict[str, NDArray[np.float64]] = {}

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a batch of forecasts (B, T, C, H, W) and what really happened, on any device.

        Raises:
            ValueError: if the shapes differ or have other than five dimensions.
        """
        if prediction.shape != truth.shape or truth.dim() != 5:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} must both be (B, T, C, H, W)"
            )
        frames = {"prediction": prediction, "truth": truth}
        arrays = {name: frame.detach().double().cpu().numpy() for name, frame in frames.items()}
        for name, values in self._frame_values(**arrays).items():
            self.sums[name] = self.sums.get(name, 0.0) + values.sum(axis=0)
        self.samples += len(truth)

    def _frame_values(self, prediction: NDArray, truth: NDArray) -> dict[str, NDArray[np.float64]]:
        """Each metric of each frame, (B, T)."""
        clipped = prediction.clip(0, 1)
        pixels = (2, 3, 4)
        mse_clipped = ((clipped - truth) ** 2).sum(axis=pixels)
        mean_squared = mse_clipped / np.prod(truth.shape[2:])
        values = {
            "mse": ((prediction - truth) ** 2).sum(axis=pixels),
            "mse_clipped": mse_clipped,
            "mae": np.abs(prediction - truth).sum(axis=pixels),
            "mae_clipped": np.abs(clipped - truth).sum(axis=pixels),
            "psnr": -10 * np.log10(np.maximum(mean_squared, 10 ** (-HIGHEST_PSNR / 10))),
        }
        for name in self.ssim:
            values[name] = np.array(
                [
                    [SSIM[name](*pair) for pair in zip(*sample, strict=True)]
                    for sample in zip(clipped, truth, strict=True)
                ]
            )
        return values

    def steps(self) -> dict[str, list[float]]:
        """Each metric's mean over the samples, a value for each step of the horizon."""
        return {name: (total / self.samples).tolist() for name, total in self.sums.items()}

    def means(self) -> dict[str, float]:
        """Each metric's mean over samples and steps."""
        return {name: float(np.mean(values)) for name, values in self.steps().items()}


def copy_last_frame(frames: Tensor, horizon: int) -> Tensor:
    """The baseline forecast: the last of the frames (B, T, C, H, W) read, repeated, (B, horizon, C, H, W)."""
    return frames[:, -1:].expand(-1, horizon, -1, -1, -1)
