"""The models that the two papers compare with, by name, and the numbers that the papers quote for others.

Without arguments a model has its own paper's MovingMNIST configuration: patches of 4x4 pixels, which enter the first
cell without embedding, and 5x5 convolutions. `fastsam.models` has the models of the two papers themselves.

The parameter counts in the papers' tables are three times the trainable parameters, with Adam's two slots for each;
PredRNN and MIM are counted on patched frames of 8 channels (TaxiBJ: 2 channels, patches of 2x2, 32x32 pixels):

    PredRNN    13.799M = 3 x  4,599,560   PredRNN(in_channels=2, patch_size=2, shared_input=True, bias=True)
    MIM        28.533M = 3 x  9,511,112   MIM(in_channels=2, patch_size=2, frame_size=(32, 32))
    E3D-LSTM   38.696M = 3 x 12,898,576   E3DLSTM()

No configuration of the equations of PredRNN++ and MIM* was found that gives their 13.237M and 27.971M, which differ by
the same 14.734M as those of PredRNN and MIM. A causal LSTM of 64 channels has 22 convolutions 5x5 from 64 to 64
channels; the count leaves about 11 a layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastsam.modules import Forecaster, TransplantCell, _check
from fastsam.modules.causal_lstm import CausalForecaster
from fastsam.modules.cms_blocks import checked_size
from fastsam.modules.e3d_lstm import E3DForecaster
from fastsam.modules.mim import MIMForecaster
from fastsam.modules.predrnn import STLSTMCell, ZigzagForecaster
from fastsam.modules.traj_gru import TrajGRUCell


class PredRNN(ZigzagForecaster):
    """PredRNN (Wang et al., NIPS 2017): `STLSTMCell`, whose arguments it takes (kernel_size, shared_input, ...)."""

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 4,
        layer_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            STLSTMCell, in_channels, hidden_channels, patch_size=patch_size, layer_norm=layer_norm, **options
        )


def _check_not_given(model: str, options: dict[str, Any], name: str) -> None:
    if name in options:
        raise TypeError(f"{model}: it has no argument {name!r}, which is part of what the model is")


class TransplantPredRNN(ZigzagForecaster):
    """PredRNN with CE and SE around its cells: `TransplantCell` on `STLSTMCell`, whose arguments it takes.

    For example TransplantPredRNN(use_context=False, scales=(1, 2)). SE wants maps of patches whose height and width
    every scale divides.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 4,
        layer_norm: bool = True,
        **options: Any,
    ) -> None:
        _check_not_given("TransplantPredRNN", options, "backbone")
        super().__init__(
            TransplantCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            backbone=STLSTMCell,
            layer_norm=layer_norm,
            **options,
        )


class PredRNNPlusPlus(CausalForecaster):
    """PredRNN++ (Wang et al., ICML 2018): causal LSTMs and a gradient highway, with arguments of `CausalForecaster`."""

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (128, 64, 64, 64),
        *,
        patch_size: int = 4,
        layer_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, hidden_channels, patch_size=patch_size, layer_norm=layer_norm, **options)


class MIM(MIMForecaster):
    """MIM, memory in memory (Wang et al., CVPR 2019), with arguments of `MIMForecaster` (kernel_size, ...).

    frame_size: (height, width) of the frames. The peepholes of MIM-N and MIM-S have a weight for each channel and
    position of a map, as published, and the model serves frames of this size only. None gives them one weight a
    channel, for frames of any size.
    """

    causal = False

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        frame_size: Sequence[int] | None = (64, 64),
        patch_size: int = 4,
        layer_norm: bool = True,
        **options: Any,
    ) -> None:
        if "map_size" in options:
            raise TypeError(f"{type(self).__name__}: it has no argument 'map_size', which it computes from frame_size")
        _check_not_given(type(self).__name__, options, "causal")
        frame = checked_size(type(self).__name__, "frame_size", frame_size)
        p = _check.positive_int(type(self).__name__, "patch_size", patch_size)
        super().__init__(
            in_channels,
            hidden_channels,
            causal=self.causal,
            map_size=None if frame is None else (-(-frame[0] // p), -(-frame[1] // p)),
            patch_size=patch_size,
            layer_norm=layer_norm,
            **options,
        )


class MIMStar(MIM):
    """MIM*, which is MIM with causal LSTMs in the place of ST-LSTMs (SA-ConvLSTM paper, section 4.4)."""

    causal = True


class E3DLSTM(E3DForecaster):
    """E3D-LSTM (Wang et al., ICLR 2019): eidetic 3D LSTMs on windows of two frames; arguments of `E3DForecaster`."""

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, hidden_channels, patch_size=patch_size, **options)


class TrajGRU(Forecaster):
    """TrajGRU (Shi et al., NIPS 2017): a `Forecaster` of `TrajGRUCell`, whose arguments it takes (links, ...).

    The paper's own model is an encoder and a forecaster with maps half as wide in each of three layers; here its cells
    stand in the stack that all other models have.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 4,
        embed_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        super().__init__(
            TrajGRUCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            device=device,
            dtype=dtype,
            **cell_options,
        )


PREDRNN_TRANSPLANTS: dict[str, str] = {
    "predrnn": "PredRNN",
    "predrnn_ce": "PredRNN w CE, w/o SE",
    "predrnn_se": "PredRNN w/o CE, w SE",
    "predrnn_ce_se": "PredRNN w CE, w SE",
}
"""The PredRNN rows of Table 3 of the CMS-LSTM paper: a name, and the paper's label."""

PREDRNN_TRANSPLANT_ROWS: dict[str, tuple[type[Forecaster], dict[str, Any]]] = {
    "predrnn": (PredRNN, {}),
    "predrnn_ce": (TransplantPredRNN, {"use_context": True, "scales": None}),
    "predrnn_se": (TransplantPredRNN, {"use_context": False, "scales": (1, 2, 4)}),
    "predrnn_ce_se": (TransplantPredRNN, {"use_context": True, "scales": (1, 2, 4)}),
}
"""The model and the arguments that make each of these rows."""


class Quoted(NamedTuple):
    """A number that a paper prints for a model, quoted and not measured here.

    paper: "SA-ConvLSTM" or "CMS-LSTM". table: of that paper. dataset: what it is measured on. metric: "MSE 1" is that
    of the first predicted frame. value: in the paper's unit, parameters in millions with Adam's slots.
    """

    model: str
    paper: str
    table: str
    dataset: str
    metric: str
    value: float


_TABLES: tuple[tuple[str, str, str, tuple[str, ...], str], ...] = (
    (
        "SA-ConvLSTM",
        "2",
        "MovingMNIST",
        ("parameters", "SSIM", "MSE", "MAE"),
        """
        FC-LSTM       -       0.690  118.3  209.4
        ConvLSTM      -       0.707  103.3  182.9
        TrajGRU       -       0.713  106.9  190.1
        DFN           -       0.726   89.0  172.8
        FRNN          -       0.813   69.7  150.3
        VPN-baseline  -       0.870   64.1  131.0
        PredRNN       13.799  0.867   56.8  126.1
        MIM           28.533  0.874   52.0  116.5
        PredRNN++     13.237  0.898   46.5  106.8
        MIM*          27.971  0.910   44.2  101.1
        """,
    ),
    (
        "SA-ConvLSTM",
        "3a",
        "TaxiBJ",
        ("MSE 1", "MSE 2", "MSE 3", "MSE 4"),
        """
        ST-ResNet   0.460  0.571  0.670  0.762
        VPN         0.427  0.548  0.645  0.721
        FRNN        0.331  0.416  0.518  0.619
        PredRNN     0.318  0.427  0.516  0.595
        PredRNN++   0.319  0.399  0.500  0.573
        MIM         0.309  0.390  0.475  0.542
        """,
    ),
    (
        "SA-ConvLSTM",
        "3b",
        "KTH",
        ("PSNR", "SSIM"),
        """
        ConvLSTM   23.58  0.712
        TrajGRU    26.97  0.790
        DFN        27.26  0.794
        MCNet      25.95  0.804
        PredRNN    27.55  0.839
        PredRNN++  28.47  0.865
        """,
    ),
    (
        "CMS-LSTM",
        "1",
        "MovingMNIST",
        ("parameters", "PSNR", "SSIM", "MSE", "MAE"),
        """
        FC-LSTM           -       -       0.690  118.3  209.4
        DDPAE             -       21.170  0.922   38.9   90.7
        CrevNet+ConvLSTM  -       -       0.928   38.5      -
        PhyDNet           -       23.120  0.947   24.4   70.3
        PDE-Driven        -       21.760  0.909      -      -
        PredRNN           13.799  19.603  0.867   56.8  126.1
        PredRNN++         13.237  20.239  0.898   46.5  106.8
        MIM*              27.971  20.678  0.910   44.2  101.1
        E3D-LSTM          38.696  20.590  0.910   41.7   87.2
        """,
    ),
    (
        "CMS-LSTM",
        "2",
        "TaxiBJ",
        ("MSE 1", "MSE 2", "MSE 3", "MSE 4", "MSE"),
        """
        ST-ResNet   0.460  0.571  0.670  0.762  0.618
        VPN         0.427  0.548  0.645  0.721  0.585
        FRNN        0.331  0.416  0.518  0.619  0.471
        PhyDNet     -      -      -      -      0.419
        PDE-Driven  -      -      -      -      0.398
        PredRNN     0.318  0.427  0.516  0.595  0.464
        PredRNN++   0.319  0.399  0.500  0.573  0.448
        MIM*        0.309  0.390  0.475  0.542  0.429
        """,
    ),
)

QUOTED: tuple[Quoted, ...] = tuple(
    Quoted(model, paper, table, dataset, metric, float(value))
    for paper, table, dataset, metrics, rows in _TABLES
    for model, *values in map(str.split, rows.strip().splitlines())
    for metric, value in zip(metrics, values, strict=True)
    if value != "-"
)
"""What the two papers' tables of comparison print for models other than their own."""
