"""A trained model on its device, as evaluation and pictures use it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from training import checkpoints, report
from training.config import Config, model_config
from training.data import SequenceData
from training.digits import resolve_source
from training.errors import InputError, device_errors
from training.module import check_frames


@dataclass
class TrainedModel:
    """A checkpoint's model on its device, and the data it is shown."""

    config: Config
    path: Path
    checkpoint: dict[str, Any]
    model: torch.nn.Module
    data: SequenceData
    fabric: Fabric

    @property
    def name(self) -> str:
        return self.checkpoint["hyper_parameters"]["config"]["model"]["name"]

    @property
    def has_attention(self) -> bool:
        """Whether its cells can draw what they attend to: those of the base model and of SA-ConvLSTM."""
        return self.name == "base" or self.name.startswith("sa_convlstm")

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Input frames and future of a batch, on the model's device and in its dtype."""
        parameter = next(self.model.parameters())
        batch = batch.to(parameter.device, parameter.dtype)
        return batch[:, : self.config.data.input_frames], batch[:, self.config.data.input_frames :]

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Tensor:
        with self.fabric.autocast():
            return self.model(frames, self.config.data.horizon)

    def attention_maps(self, frames: Tensor, query: tuple[int, int], layers: list[int]) -> Any:
        """Maps of the pixel `query` (row, column) of one sequence, at every step."""
        size = self.model.patch_size
        point = [[query[0] // size, query[1] // size]]
        with self.fabric.autocast():
            return self.model.attention_maps(frames, self.config.data.horizon, point, layers)

    def facts(self) -> dict[str, Any]:
        trained_with = self.checkpoint["hyper_parameters"]["config"]
        return {
            **self.data.test_description,
            "frames": _frames(asdict(self.config.data)),
            "checkpoint": str(self.path),
            "iterations": self.checkpoint["global_step"],
            "trained on": f"{trained_with['data']['source']}, {_frames(trained_with['data'])}",
            "model": trained_with["model"],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "versions": report.versions(),
        }


def load(config: Config) -> TrainedModel:
    """The model that the configuration asks to evaluate.

    Raises:
        InputError: if there is no usable checkpoint, data or device are not to be had, data.source=auto stands for
            other digits than the model was trained on, or the model does not take frames of data.image_size.
    """
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    path, checkpoint = checkpoints.to_evaluate(config)
    checkpoints.check_model(path, checkpoint, config)
    check_frames(model_config(checkpoint["hyper_parameters"]["config"]), config.data.image_size)
    _check_source(path, checkpoint, config)
    model = checkpoints.load_model(path, checkpoint)
    data = SequenceData(config)
    training = config.training
    with device_errors():
        fabric = Fabric(accelerator=training.accelerator, devices=1, precision=training.precision)
    model = fabric.to_device(model)
    if training.precision == "64-true":
        model = model.double()
    print(f"checkpoint {path}, iteration {checkpoint['global_step']}; {data.test_description['digits']}", flush=True)
    trained_on, now = _frames(checkpoint["hyper_parameters"]["config"]["data"]), _frames(asdict(config.data))
    if trained_on != now:
        print(f"note: trained on {trained_on}; here on {now}", flush=True)
    return TrainedModel(config, path, checkpoint, model, data, fabric)


def _frames(data: dict[str, Any]) -> str:
    size, digits = data["image_size"], data["digits"]
    of = f"{digits} digit{'' if digits == 1 else 's'} on {size}x{size} pixels"
    return f"{data['input_frames']} read, {data['horizon']} predicted, {of}"


def _check_source(path: Path, checkpoint: dict[str, Any], config: Config) -> None:
    """Refuse to evaluate on other digits than those of the training unless data.source asks for them by name."""
    trained_on, now = checkpoint["hyper_parameters"]["config"]["data"]["source"], resolve_source(config.data)
    if config.data.source != "auto" or now == trained_on:
        return
    if trained_on == "mnist":
        advice = "give --data.root, the directory of the MNIST files"
    else:
        advice = "leave out data.root and data.download"
    raise InputError(
        f"{path} was trained on data.source={trained_on}, but data.source=auto stands for {now} here: {advice}, or "
        f"--data.source {now} to evaluate on the other digits all the same"
    )
