"""The LightningModule: a forecaster, its loss, and scheduled sampling."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import fastsam
from training.config import Config, ModelConfig, TrainingConfig
from training.errors import InputError
from training.moving_mnist import SAMPLING, uniforms


def build_model(config: ModelConfig, channels: int = 1) -> torch.nn.Module:
    """The forecaster of the model section for frames of `channels` channels.

    Raises:
        InputError: if there is no such model or an option does not suit it.
    """
    if config.name not in fastsam.MODELS:
        raise InputError(f"model.name {config.name!r} must be one of {', '.join(fastsam.MODELS)}")
    try:
        return fastsam.build(config.name, **config.arguments(), in_channels=channels)
    except (TypeError, ValueError) as error:
        hint = "; null leaves a setting to the model" if "option" in str(error) and not config.options else ""
        raise InputError(f"model {config.name}: {error}{hint}") from error


@torch.no_grad()
def check_frames(config: ModelConfig, size: int) -> None:
    """Check that the model of the model section takes frames of size x size pixels, without computing anything.

    Raises:
        InputError: if it does not.
    """
    with torch.device("meta"), fastsam.backend("eager"):
        model = build_model(config)
        try:
            model(torch.empty(1, 1, 1, size, size), 1)
        except ValueError as error:
            raise InputError(f"model {config.name} does not take frames of data.image_size {size}: {error}") from error


def sampling_probability(config: TrainingConfig, step: int) -> float:
    """Probability of feeding a true frame at `step`: falls linearly from sampling_start to 0 (PredRNN's schedule)."""
    if step >= config.sampling_iterations:
        return 0.0
    return config.sampling_start * (1 - step / config.sampling_iterations)


def truth_mask(config: TrainingConfig, step: int, horizon: int) -> Tensor:
    """Which true future frames are fed, (batch_size, horizon - 1) bool; a function of seed and step alone."""
    shape = (config.batch_size, horizon - 1)
    numbers = uniforms(config.seed, SAMPLING, step, shape[0] * shape[1]).reshape(shape)
    return torch.from_numpy(numbers < sampling_probability(config, step))


class ForecastModule(pl.LightningModule):
    """Trains a forecaster with Adam on the L2 loss of all next-frame predictions.

    As in PredRNN, the loss counts the predictions made while reading the input frames too, not only the future.

    Args:
        config: the whole configuration, or what `Config.as_dict` made of it: so it is kept in every checkpoint, and
            `ForecastModule.load_from_checkpoint` finds it there.

    Raises:
        InputError: if the model section is not usable, or not for frames of data.image_size.
    """

    def __init__(self, config: Config | dict[str, Any]) -> None:
        super().__init__()
        config = config if isinstance(config, Config) else Config.from_dict(config)
        check_frames(config.model, config.data.image_size)
        self.config = config
        self.model = build_model(config.model)
        self.save_hyperparameters({"config": config.as_dict()})

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, T, C, H, W) to the configured horizon (B, horizon, C, H, W)."""
        return self.model(frames, self.config.data.horizon)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        data = self.config.data
        future = batch[:, data.input_frames :]
        mask = truth_mask(self.config.training, self.global_step, data.horizon).to(batch.device)
        part = slice(self.global_rank * len(batch), (self.global_rank + 1) * len(batch))
        predictions = self.model(
            batch[:, : data.input_frames],
            data.horizon,
            truth=future[:, :-1],
            truth_mask=mask[part],
            all_steps=True,
        )
        loss = mse_loss(predictions, batch[:, 1:])
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        self.log("sampling_probability", sampling_probability(self.config.training, self.global_step))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        data = self.config.data
        error = self(batch[:, : data.input_frames]).clamp(0, 1) - batch[:, data.input_frames :]
        squared = error.square().sum(dim=(2, 3, 4)).mean()
        self.log("validation_mse", squared, prog_bar=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.config.optimiser.learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fastsam_version"] = fastsam.__version__
