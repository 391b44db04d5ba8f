"""Every model by name, small, and what it makes of a batch of frames."""

from typing import Any

import torch
from torch import Tensor

import fastsam

FRAME = (8, 8)

# Two layers, so that what goes from layer to layer is there; maps of 4 x 4, which three scales of SE divide.
SMALL: dict[str, Any] = {"hidden_channels": (4, 4), "patch_size": 2, "kernel_size": 3}


def small(name: str, frame_size: tuple[int, int] = FRAME, **others: Any) -> fastsam.Forecaster:
    """The model for frames of this size, always with the same parameters; others: further arguments of the model."""
    size = {"frame_size": frame_size} if fastsam.MODELS[name].takes_frame_size else {}
    layers = {"hidden_channels": (4, 4, 4)} if name.startswith("mim") else {}
    torch.manual_seed(0)
    return fastsam.build(name, **{**SMALL, **layers, **size, **others})


def forecast_and_gradients(model: torch.nn.Module, frames: Tensor) -> dict[str, Tensor]:
    """One predicted frame, and the gradients of the sum of its squares by the frames and by every parameter."""
    leaf = frames.detach().requires_grad_()
    forecast = model(leaf, 1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(forecast.square().sum(), [leaf, *parameters])
    return {"forecast": forecast.detach()} | dict(zip(["frames", *names], gradients, strict=True))
