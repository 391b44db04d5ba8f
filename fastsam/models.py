"""The models of the two papers by name, the rows of their ablations, and all models under one name each.

Section and table numbers are those of "Self-Attention ConvLSTM for Spatiotemporal Prediction" for `ConvLSTM`,
`BaseModel`, `SAConvLSTM` and `ablation`, and those of "CMS-LSTM: Context-Embedding and Multi-Scale
Spatiotemporal-Expression LSTM for Video Prediction" for `CMSLSTM`, `Transplant` and `transplant`.

Without arguments a model has its paper's MovingMNIST configuration: four layers of 64 hidden channels and patches of
4x4 pixels. The models of the first (section 4.1) have 5x5 convolutions, layer norm, and 16 attention channels where
there is attention. The 1x1 embedding of the patches is not described in that paper, but with it the parameters number a
third of Table 2's counts (Adam's slots are in those) within half a percent.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from fastsam.comparators import (
    E3DLSTM,
    MIM,
    PREDRNN_TRANSPLANT_ROWS,
    PREDRNN_TRANSPLANTS,
    MIMStar,
    PredRNNPlusPlus,
    TrajGRU,
)
from fastsam.modules import (
    BaseCell,
    CMSLSTMCell,
    ConvLSTMCell,
    Forecaster,
    RecurrentCell,
    SAConvLSTMCell,
    TransplantCell,
    _check,
)
from fastsam.modules.cms_blocks import checked_size
from fastsam.modules.forecaster import cell_class as checked_cell


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


class Transplant(Forecaster):
    """CE and SE around the cells of another model: a `Forecaster` of `TransplantCell`, whose arguments it takes.

    For example Transplant(backbone="sa_convlstm", scales=None), with kernel_size and other arguments of the backbone;
    one that knows layer_norm has it unless False is given. SE wants maps of patches whose height and width every scale
    divides.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        backbone: str | type[RecurrentCell] = "convlstm",
        patch_size: int = 4,
        embed_channels: int | None = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        backbone = checked_cell("Transplant", "backbone", backbone)
        if "layer_norm" in inspect.signature(backbone).parameters:
            cell_options = {"layer_norm": True, **cell_options}
        super().__init__(
            TransplantCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            backbone=backbone,
            device=device,
            dtype=dtype,
            **cell_options,
        )


class CMSLSTM(Forecaster):
    """CMS-LSTM: a `Forecaster` of `CMSLSTMCell`.

    Without arguments it is the published MovingMNIST model, with its kernel_size of 3 (5 in the paper's figures) and
    its 7,967,580 parameters, of which 12 have no effect (see `fastsam.modules.cms_blocks.WindowAttention`).
    `fastsam.convert.cms_lstm` reads its checkpoints. For the frames of TaxiBJ: CMSLSTM(in_channels=2,
    patch_size=2, frame_size=(32, 32)).

    Args:
        frame_size: (height, width) of the frames. The layer norms have a scale and shift for each channel and position
            of a map, and the model serves frames of this size only. None gives them one scale and shift a channel,
            GroupNorm(1, C), for frames of any size that makes maps of patches which the scales divide.
        kernel_size, use_context, scales, forget_bias: of `CMSLSTMCell`.
        in_channels, hidden_channels, patch_size, embed_channels, device, dtype: of `Forecaster`.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there; a scale does not divide the
            map of patches.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 4,
        embed_channels: int | None = 64,
        frame_size: Sequence[int] | None = (64, 64),
        kernel_size: int = 3,
        use_context: bool = True,
        scales: Sequence[int] | None = (1, 2, 4),
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        frame = checked_size("CMSLSTM", "frame_size", frame_size)
        p = _check.positive_int("CMSLSTM", "patch_size", patch_size)
        super().__init__(
            CMSLSTMCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            kernel_size=kernel_size,
            use_context=use_context,
            scales=scales,
            map_size=None if frame is None else (-(-frame[0] // p), -(-frame[1] // p)),
            forget_bias=forget_bias,
            device=device,
            dtype=dtype,
        )


ABLATION: dict[str, str] = {
    "convlstm": "ConvLSTM",
    "base": "w SA, w/o Mem",
    "memory": "w/o SA, w Mem",
    "sa_convlstm_without_zm": "w SA, w Mem, w/o Z_m",
    "sa_convlstm": "w SA, w Mem, w Z_m",
}
"""The rows of Table 1: the name that `ablation` takes, and the paper's label."""

_Rows = dict[str, tuple[type[Forecaster], dict[str, Any]]]

_ROWS: _Rows = {
    "convlstm": (ConvLSTM, {}),
    "base": (BaseModel, {}),
    "memory": (SAConvLSTM, {"use_attention": False}),
    "sa_convlstm_without_zm": (SAConvLSTM, {"use_memory_attention": False}),
    "sa_convlstm": (SAConvLSTM, {}),
}

TRANSPLANTS: dict[str, str] = {
    "convlstm": "ConvLSTM",
    "convlstm_ce": "ConvLSTM w CE, w/o SE",
    "convlstm_ce_se1": "ConvLSTM w CE, w 1-scale SE",
    "convlstm_se": "ConvLSTM w/o CE, w SE",
    "convlstm_ce_se2": "ConvLSTM w CE, w 2-scale SE",
    "convlstm_ce_se": "ConvLSTM w CE, w SE",
    "sa_convlstm": "SA-ConvLSTM",
    "sa_convlstm_se": "SA-ConvLSTM w/o CE, w SE",
    "sa_convlstm_ce": "SA-ConvLSTM w CE, w/o SE",
    "sa_convlstm_ce_se": "SA-ConvLSTM w CE, w SE (not in the table)",
    **PREDRNN_TRANSPLANTS,
}
"""The rows of Table 3: the name that `transplant` takes, and the paper's label, where it has the row."""

_SA: dict[str, Any] = {"backbone": "sa_convlstm"}

# The paper makes its ConvLSTM rows by removing blocks from CMS-LSTM.
_TRANSPLANT_ROWS: _Rows = {
    "convlstm": (CMSLSTM, {"use_context": False, "scales": None}),
    "convlstm_ce": (CMSLSTM, {"use_context": True, "scales": None}),
    "convlstm_ce_se1": (CMSLSTM, {"use_context": True, "scales": (1,)}),
    "convlstm_se": (CMSLSTM, {"use_context": False, "scales": (1, 2, 4)}),
    "convlstm_ce_se2": (CMSLSTM, {"use_context": True, "scales": (1, 2)}),
    "convlstm_ce_se": (CMSLSTM, {"use_context": True, "scales": (1, 2, 4)}),
    "sa_convlstm": (SAConvLSTM, {}),
    "sa_convlstm_se": (Transplant, {**_SA, "use_context": False, "scales": (1, 2, 4)}),
    "sa_convlstm_ce": (Transplant, {**_SA, "use_context": True, "scales": None}),
    "sa_convlstm_ce_se": (Transplant, {**_SA, "use_context": True, "scales": (1, 2, 4)}),
    **PREDRNN_TRANSPLANT_ROWS,
}


def ablation(name: str, **overrides: Any) -> Forecaster:
    """The model of a row of Table 1.

    Args:
        name: a key of `ABLATION`.
        **overrides: arguments of the model, other than the ones that make the row what it is.

    Raises:
        TypeError, ValueError: no such row; an override that the model does not take, or that would change the row.
    """
    return _make("ablation", _ROWS, ("use_attention", "use_memory_attention"), name, overrides)


def transplant(name: str, **overrides: Any) -> Forecaster:
    """The model of a row of Table 3: CE and SE in ConvLSTM, which is CMS-LSTM then, in PredRNN and in SA-ConvLSTM.

    Args:
        name: a key of `TRANSPLANTS`.
        **overrides: arguments of the model, other than the ones that make the row what it is.

    Raises:
        TypeError, ValueError: no such row; an override that the model does not take, or that would change the row.
    """
    return _make("transplant", _TRANSPLANT_ROWS, ("backbone", "use_context", "scales"), name, overrides)


def _make(function: str, rows: _Rows, fixed: Sequence[str], name: Any, overrides: dict[str, Any]) -> Forecaster:
    """The model of a row, `fixed` being the arguments in which rows differ."""
    _check_name(function, "row", rows, name)
    for option in fixed:
        if option in overrides:
            raise TypeError(f"{function}: {option} is what makes the rows differ, it cannot be overridden")
    model, row = rows[name]
    return model(**row, **overrides)


def _check_name(function: str, kind: str, known: Iterable[str], name: Any) -> None:
    names = list(known)
    if not isinstance(name, str):
        raise TypeError(f"{function}: name must be a string, one of {', '.join(map(repr, names))}, got {name!r}")
    if name not in names:
        raise ValueError(f"{function}: there is no {kind} {name!r}, known are {', '.join(map(repr, names))}")


class NamedModel(NamedTuple):
    """A model that `build` makes.

    model: its class. make: makes it from arguments of the class. paper: a paper, and the table of it that the model
    stands in. row: its label there.
    """

    model: type[Forecaster]
    make: Callable[..., Forecaster]
    paper: str
    row: str

    @property
    def takes_frame_size(self) -> bool:
        """Whether it has parameters for each position, and serves frames of the size it is made for only."""
        return "frame_size" in inspect.signature(self.model).parameters


_FIRST_TABLE_1, _FIRST_TABLE_2 = "SA-ConvLSTM, Table 1", "SA-ConvLSTM, Table 2"
_SECOND_TABLE_1, _SECOND_TABLE_3 = "CMS-LSTM, Table 1", "CMS-LSTM, Table 3"

MODELS: dict[str, NamedModel] = {
    **{
        name: NamedModel(_ROWS[name][0], partial(ablation, name), _FIRST_TABLE_1, label)
        for name, label in ABLATION.items()
    },
    "cms_lstm": NamedModel(CMSLSTM, CMSLSTM, _SECOND_TABLE_1, "CMS-LSTM"),
    **{
        {"convlstm": "cms_lstm_without_blocks"}.get(name, name): NamedModel(
            _TRANSPLANT_ROWS[name][0], partial(transplant, name), _SECOND_TABLE_3, label
        )
        for name, label in TRANSPLANTS.items()
        if name != "sa_convlstm"
    },
    "predrnn_plus_plus": NamedModel(PredRNNPlusPlus, PredRNNPlusPlus, _FIRST_TABLE_2, "PredRNN++"),
    "mim": NamedModel(MIM, MIM, _FIRST_TABLE_2, "MIM"),
    "mim_star": NamedModel(MIMStar, MIMStar, _FIRST_TABLE_2, "MIM*"),
    "e3d_lstm": NamedModel(E3DLSTM, E3DLSTM, _SECOND_TABLE_1, "E3D-LSTM"),
    "traj_gru": NamedModel(TrajGRU, TrajGRU, _FIRST_TABLE_2, "TrajGRU"),
}
"""Every model: the name that `build` takes.

Two rows stand in the ablations of both papers. "sa_convlstm" is the same model in both. "convlstm" is the baseline of
the SA-ConvLSTM paper; the row of that name of the other paper, which removed CE and SE from CMS-LSTM to make it, is
"cms_lstm_without_blocks".
"""


def build(name: str, **overrides: Any) -> Forecaster:
    """Any model by name, in its paper's MovingMNIST configuration.

    Args:
        name: a key of `MODELS`.
        **overrides: arguments of the model, other than the ones that make a row of an ablation what it is.

    Raises:
        TypeError, ValueError: no such model; an override that the model does not take, or that would change the row.
    """
    _check_name("build", "model", MODELS, name)
    return MODELS[name].make(**overrides)
