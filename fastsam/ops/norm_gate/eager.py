"""A map gated by the layer norm of another one, in plain PyTorch."""

import torch
from torch import Tensor

from fastsam.ops._gates.eager import normalise

ACTIVATIONS = {"identity": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def norm_gate(
    x: Tensor,
    y: Tensor,
    activation: str = "sigmoid",
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """See `fastsam.ops.norm_gate`."""
    gate = ACTIVATIONS[activation](normalise(x, norm, eps))
    return (scale * gate * y).contiguous()
