"""The models of "Self-Attention ConvLSTM for Spatiotemporal Prediction" by name, and its ablation (Table 1).

Without arguments a model has the paper's MovingMNIST configuration (section 4.1): four layers of 64 hidden channels,
5x5 convolutions, layer norm, patches of 4x4 pixels; 16 attention channels where there is attention. The 1x1 embedding
of the patches is not described in the paper, but with it the parameters number a third of Table 2's counts (Adam's
slots are in those) within half a percent.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fastsam.modules import BaseCell, ConvLSTMCell, Forecaster, RecurrentCell, SAConvLSTMCell


class _PaperModel(Forecaster):
    cell_class: type[RecurrentCell]

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 4,
        embed_channels: int | None = 64,
        layer_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        super().__init__(
            self.cell_class,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            layer_norm=layer_norm,
            device=device,
            dtype=dtype,
            **cell_options,
        )


class ConvLSTM(_PaperModel):
    """The baseline: a `Forecaster` of `ConvLSTMCell`, whose arguments it takes (kernel_size, forget_bias, ...)."""

    cell_class = ConvLSTMCell


class BaseModel(_PaperModel):
    """The base model, section 3.1: a `Forecaster` of `BaseCell`, whose arguments it takes (attention_channels, ...)."""

    cell_class = BaseCell


class SAConvLSTM(_PaperModel):
    """SA-ConvLSTM, section 3.3: a `Forecaster` of `SAConvLSTMCell`, whose arguments it takes (attention_channels, ...).

    For TaxiBJ: SAConvLSTM(in_channels=2, patch_size=2).
    """

    cell_class = SAConvLSTMCell


ABLATION: dict[str, str] = {
    "convlstm": "ConvLSTM",
    "base": "w SA, w/o Mem",
    "memory": "w/o SA, w Mem",
    "sa_convlstm_without_zm": "w SA, w Mem, w/o Z_m",
    "sa_convlstm": "w SA, w Mem, w Z_m",
}
"""The rows of Table 1: the name that `ablation` takes, and the paper's label."""

_ROWS: dict[str, tuple[type[_PaperModel], dict[str, Any]]] = {
    "convlstm": (ConvLSTM, {}),
    "base": (BaseModel, {}),
    "memory": (SAConvLSTM, {"use_attention": False}),
    "sa_convlstm_without_zm": (SAConvLSTM, {"use_memory_attention": False}),
    "sa_convlstm": (SAConvLSTM, {}),
}


def ablation(name: str, **overrides: Any) -> Forecaster:
    """The model of a row of Table 1.

    Args:
        name: a key of `ABLATION`.
        **overrides: arguments of the model, other than the ones that make the row what it is.

    Raises:
        TypeError, ValueError: no such row; an override that the model does not take, or that would change the row.
    """
    if not isinstance(name, str):
        raise TypeError(f"ablation: name must be a string, one of {', '.join(map(repr, _ROWS))}, got {name!r}")
    if name not in _ROWS:
        raise ValueError(f"ablation: there is no row {name!r}, known are {', '.join(map(repr, _ROWS))}")
    model, row = _ROWS[name]
    for option in ("use_attention", "use_memory_attention"):
        if option in overrides:
            raise TypeError(f"ablation: {option} is what makes the rows differ, it cannot be overridden")
    return model(**row, **overrides)
