"""Bad arguments of CMS-LSTM, its blocks and its converter: one clear error that names what it was and should be."""

from collections.abc import Callable
from typing import Any

import naive_cms
import pytest
import torch
from torch import Tensor

import fastsam
from fastsam.convert import cms_lstm
from fastsam.modules import CMSLSTMCell, ContextEmbedding, SpatiotemporalExpression, TransplantCell

SIZE = (8, 12)
Bad = tuple[Callable[[], Any], type[Exception], str]


def changed(drop: str = "", **extra: Any) -> dict[str, Tensor]:
    published = naive_cms.NaiveCMSLSTM(2, 4, 1, 2, SIZE).state_dict()
    return {name: value for name, value in published.items() if not drop or not name.endswith(drop)} | extra


BAD_CHECKPOINTS: list[Bad] = [
    (lambda: cms_lstm([1]), TypeError, "cms_lstm: state_dict must be a mapping of names to tensors, got list"),
    (lambda: cms_lstm({}), ValueError, "missing are embed.weight, output.weight, .* and [0-9]+ more$"),
    (lambda: cms_lstm(changed("w_z.bias")), ValueError, r"missing are lstm.0.SEBlock.w_z.bias$"),
    (lambda: cms_lstm(changed(extra=torch.zeros(1))), ValueError, "CMS-LSTM; not recognised are extra$"),
    (
        lambda: cms_lstm(changed("f_key.weight", head=torch.zeros(1))),
        ValueError,
        r"missing are lstm.0.SEBlock.stages.0.f_key.weight, .*; not recognised are head$",
    ),
    (
        lambda: cms_lstm({"epoch": torch.zeros(1), "state_dict": changed()}),
        ValueError,
        'not recognised are epoch, state_dict; give the "state_dict" that the file holds',
    ),
    (lambda: cms_lstm(changed(), patch_size=0), ValueError, "cms_lstm: patch_size must be at least 1, got 0"),
    (lambda: cms_lstm(changed()), ValueError, r"embedding.weight \(4, 8, 1, 1\) in dimension 1 .* multiple .* = 16"),
]

X, H = torch.zeros(2, 3, *SIZE), torch.zeros(2, 6, *SIZE)
CE = ContextEmbedding(3, 6, 3, map_size=SIZE)
SE = SpatiotemporalExpression(6)
CELL = CMSLSTMCell(3, 6)

BAD_ARGUMENTS: list[Bad] = [
    (lambda: ContextEmbedding(0, 6), ValueError, "ContextEmbedding: in_channels must be at least 1, got 0"),
    (lambda: ContextEmbedding(3, 6, 4), ValueError, "ContextEmbedding: kernel_size must be odd, got 4"),
    (lambda: ContextEmbedding(3, 6, steps=1), ValueError, "ContextEmbedding: steps must be at least 2, .* got 1"),
    (lambda: ContextEmbedding(3, 6, map_size=8), TypeError, r"map_size must be .* \(height, width\), got 8"),
    (lambda: ContextEmbedding(3, 6, map_size=(8,)), TypeError, r"map_size must be .* \(height, width\), got \(8,\)"),
    (lambda: ContextEmbedding(3, 6, map_size=(8, 0)), ValueError, r"map_size\[1\] must be at least 1, got 0"),
    (lambda: CE(H), ValueError, r"ContextEmbedding: x must have shape \(B, 3, H, W\), got \(2, 6, 8, 12\)"),
    (lambda: CE(X, X), ValueError, r"ContextEmbedding: h must have shape \(2, 6, 8, 12\), got \(2, 3, 8, 12\)"),
    (lambda: CE(X, H.double()), TypeError, "ContextEmbedding: h is torch.float64"),
    (lambda: CE(X.mT), ValueError, "ContextEmbedding: the map must be of 8 x 12, .* got 12 x 8; map_size=None .*takes"),
    (lambda: SpatiotemporalExpression(6, ()), ValueError, r"scales must hold at least one scale, got \(\)"),
    (lambda: SpatiotemporalExpression(6, 2), TypeError, "scales must be a sequence of positive integers, got 2"),
    (lambda: SpatiotemporalExpression(6, "124"), TypeError, "scales must be a sequence .*, got '124'"),
    (lambda: SpatiotemporalExpression(6, (1, 0)), ValueError, r"scales\[1\] must be at least 1, got 0"),
    (lambda: SpatiotemporalExpression(6, (1, 2.0)), TypeError, r"scales\[1\] must be a positive integer, got 2.0"),
    (
        lambda: SpatiotemporalExpression(6, (1, 3), map_size=(9, 8)),
        ValueError,
        r"map_size must have .* every scale of \(1, 3\) divides, got 9 x 8, which the scale 3 does not",
    ),
    (
        lambda: SE(H[..., :10], H[..., :10]),
        ValueError,
        r"h must have a height and a width that every scale of \(1, 2, 4\) divides, got 8 x 10, which the scale 4 does",
    ),
    (lambda: SE(H, X), ValueError, r"SpatiotemporalExpression: c must have shape \(2, 6, 8, 12\), got \(2, 3, 8, 12\)"),
    (lambda: SE(H, H, CELL.fold()), TypeError, "SpatiotemporalExpression: weights must be .* CellWithBlocksWeights"),
    (lambda: CELL(X, H), TypeError, r"CMSLSTMCell: state must be None or a tuple .* begins with \(h, c\), got Tensor"),
    (lambda: CELL(X, (H,)), TypeError, r"state must be None or a tuple .* begins with \(h, c\), got 1 of them"),
    (lambda: CELL(X, (H, H, H)), TypeError, r"state must be None or a tuple of the maps \(h, c\), got 3 of them"),
    (lambda: CELL(X, None, SE.fold()), TypeError, "CMSLSTMCell: weights must be .* got ExpressionWeights"),
    (lambda: CMSLSTMCell(3, 6, use_context=0), TypeError, "CMSLSTMCell: use_context must be True or False, got 0"),
    (
        lambda: CMSLSTMCell(3, 6, use_context=False, scales=None, map_size=SIZE)(X.mT),
        ValueError,
        "NormalisedConvLSTMCell: the map must be of 8 x 12, .* got 12 x 8",
    ),
    (lambda: TransplantCell(3, 6, backbone="lstm"), ValueError, "TransplantCell: there is no cell 'lstm', known are"),
    (lambda: TransplantCell(3, 6, backbone=CELL), TypeError, "TransplantCell: backbone must be a name or a subclass"),
    (lambda: TransplantCell(3, 6, banana=1), TypeError, "ConvLSTMCell has no option 'banana'; it takes kernel_size"),
    (
        lambda: TransplantCell(3, 6, backbone=fastsam.modules.TrajGRUCell, scales=(1,))(torch.zeros(2, 3, 4, 4)),
        TypeError,
        r"TransplantCell: the new state of TrajGRUCell must be a tuple of maps that begins with \(h, c\), got",
    ),
    (lambda: TransplantCell(3, 6, use_context=1), TypeError, "TransplantCell: use_context must be True or False"),
    (lambda: fastsam.CMSLSTM(frame_size=64), TypeError, r"CMSLSTM: frame_size must be .* \(height, width\), got 64"),
    (lambda: fastsam.CMSLSTM(patch_size=0), ValueError, "CMSLSTM: patch_size must be at least 1, got 0"),
    (
        lambda: fastsam.CMSLSTM(frame_size=(64, 40), device="meta"),
        ValueError,
        "map_size must have .* divides, got 16 x 10, which the scale 4 does not",
    ),
    (
        lambda: fastsam.CMSLSTM(hidden_channels=(4,), frame_size=(16, 16))(torch.zeros(1, 1, 1, 32, 32), 1),
        ValueError,
        "ContextEmbedding: the map must be of 4 x 4, .* got 8 x 8",
    ),
    (lambda: fastsam.transplant(1), TypeError, "transplant: name must be a string, one of 'convlstm', .* got 1"),
    (lambda: fastsam.transplant("lstm"), ValueError, "transplant: there is no row 'lstm', known are 'convlstm', "),
    (lambda: fastsam.transplant("convlstm_ce", scales=None), TypeError, "transplant: scales is what makes the rows"),
]


@pytest.mark.parametrize("call, error, message", [*BAD_CHECKPOINTS, *BAD_ARGUMENTS])
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
