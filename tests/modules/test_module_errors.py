"""Bad arguments of modules and models: one clear error that names the argument, what it was, and what it should be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsam.models import ConvLSTM, SAConvLSTM, ablation
from fastsam.modules import (
    SAM,
    BaseCell,
    ConvLSTMCell,
    Forecaster,
    SAConvLSTMCell,
    SelfAttention,
    patchify,
    unpatchify,
)

X = torch.zeros(2, 8, 4, 5)
SAM_8 = SAM(8, 4)
ATTENTION_8 = SelfAttention(8, 4)
CELL = SAConvLSTMCell(3, 8)
FRAMES = torch.zeros(2, 3, 1, 4, 6)
MODEL = Forecaster("sa_convlstm", 1, (4, 4), patch_size=2, kernel_size=3)
BASE_CELL = BaseCell(3, 8)
INPUT = torch.zeros(2, 3, 4, 5)
MASK = torch.zeros(3, dtype=torch.bool)
TRUTH = torch.zeros(2, 3, 1, 4, 6)

Bad = tuple[Callable[[], Any], type[Exception], str]

CONSTRUCTORS: list[Bad] = [
    (lambda: SAM(0), ValueError, "SAM: channels must be at least 1, got 0"),
    (lambda: SAM(8.0), TypeError, "SAM: channels must be a positive integer, got 8.0"),
    (lambda: SAM(True), TypeError, "SAM: channels must be a positive integer, got True"),
    (lambda: SAM(8, -1), ValueError, "SAM: attention_channels must be at least 1, got -1"),
    (lambda: SAM(8, "16"), TypeError, "SAM: attention_channels must be a positive integer, got '16'"),
    (lambda: SAM(8, kernel_size=4), ValueError, "SAM: kernel_size must be odd, got 4"),
    (lambda: SAM(8, kernel_size=0), ValueError, "SAM: kernel_size must be at least 1, got 0"),
    (lambda: SAM(8, kernel_size=(5, 5)), TypeError, r"SAM: kernel_size must be a positive integer, got \(5, 5\)"),
    (lambda: SAM(8, scale="1"), TypeError, "SAM: scale must be a number, got '1'"),
    (lambda: SAM(8, scale=float("nan")), ValueError, "SAM: scale must be finite, got nan"),
    (lambda: SAM(8, bias="no"), TypeError, "SAM: bias must be True or False, got 'no'"),
    (lambda: SAM(8, use_attention=1), TypeError, "SAM: use_attention must be True or False, got 1"),
    (lambda: SAM(8, use_memory_attention=None), TypeError, "SAM: use_memory_attention must be True or False, got None"),
    (lambda: SelfAttention(0), ValueError, "SelfAttention: channels must be at least 1, got 0"),
    (lambda: SelfAttention(8, 0), ValueError, "SelfAttention: attention_channels must be at least 1, got 0"),
    (lambda: SelfAttention(8, scale=None), TypeError, "SelfAttention: scale must be a number, got None"),
    (lambda: SelfAttention(8, bias=0), TypeError, "SelfAttention: bias must be True or False, got 0"),
    (lambda: ConvLSTMCell(0, 8), ValueError, "ConvLSTMCell: in_channels must be at least 1, got 0"),
    (lambda: ConvLSTMCell(3, None), TypeError, "ConvLSTMCell: hidden_channels must be a positive integer, got None"),
    (lambda: ConvLSTMCell(3, 8, 2), ValueError, "ConvLSTMCell: kernel_size must be odd, got 2"),
    (lambda: ConvLSTMCell(3, 8, None), TypeError, "ConvLSTMCell: kernel_size must be a positive integer, got None"),
    (lambda: ConvLSTMCell(3, 8, layer_norm="x"), TypeError, "ConvLSTMCell: layer_norm must be True or False, got 'x'"),
    (lambda: ConvLSTMCell(3, 8, forget_bias="1"), TypeError, "ConvLSTMCell: forget_bias must be a number, got '1'"),
    (lambda: BaseCell(3, 8, attention_channels=0), ValueError, "attention_channels must be at least 1, got 0"),
    (lambda: SAConvLSTMCell(3, 8, 6), ValueError, "SAConvLSTMCell: kernel_size must be odd, got 6"),
    (lambda: SAConvLSTMCell(3, 8, use_attention="x"), TypeError, "SAM: use_attention must be True or False, got 'x'"),
    (lambda: Forecaster("lstm"), ValueError, "no cell 'lstm', known are 'convlstm', 'base', 'sa_convlstm'"),
    (
        lambda: Forecaster(torch.nn.LSTMCell),
        TypeError,
        "cell must be a name or a subclass of fastsam.modules.RecurrentCell",
    ),
    (lambda: Forecaster(CELL), TypeError, "cell must be a name or a subclass of fastsam.modules.RecurrentCell"),
    (lambda: Forecaster("convlstm", 0), ValueError, "Forecaster: in_channels must be at least 1, got 0"),
    (lambda: Forecaster("convlstm", 1, 64), TypeError, "hidden_channels must be a sequence .*, got 64"),
    (lambda: Forecaster("convlstm", 1, "64"), TypeError, "hidden_channels must be a sequence .*, got '64'"),
    (lambda: Forecaster("convlstm", 1, ()), ValueError, "hidden_channels must name at least one layer"),
    (lambda: Forecaster("convlstm", 1, (8, 0)), ValueError, r"hidden_channels\[1\] must be at least 1, got 0"),
    (
        lambda: Forecaster("convlstm", 1, (8, "8")),
        TypeError,
        r"hidden_channels\[1\] must be a positive integer, got '8'",
    ),
    (lambda: Forecaster("convlstm", patch_size=0), ValueError, "Forecaster: patch_size must be at least 1, got 0"),
    (lambda: Forecaster("convlstm", patch_size=2.0), TypeError, "patch_size must be a positive integer, got 2.0"),
    (lambda: Forecaster("convlstm", embed_channels=0), ValueError, "embed_channels must be at least 1, got 0"),
    (
        lambda: Forecaster("convlstm", attention_channels=16),
        TypeError,
        "ConvLSTMCell has no option 'attention_channels'; it takes kernel_size, layer_norm, forget_bias, bias",
    ),
    (lambda: SAConvLSTM(kernel=5), TypeError, "SAConvLSTMCell has no option 'kernel'; it takes kernel_size, "),
    (lambda: ConvLSTM(patch_size=-4), ValueError, "Forecaster: patch_size must be at least 1, got -4"),
    (lambda: SelfAttention(8, dtype=torch.int64), TypeError, "SelfAttention: dtype must be .*, got torch.int64"),
    (lambda: SelfAttention(8, device="banana"), ValueError, "SelfAttention: device must .* torch.device, got 'banana'"),
    (lambda: SAM(8, dtype=torch.int64), TypeError, "SAM: dtype must be .* floating-point .*, got torch.int64"),
    (lambda: SAM(8, dtype=torch.complex64), TypeError, "SAM: dtype must be .* floating-point .*, got torch.complex64"),
    (
        lambda: SAM(8, dtype=torch.float8_e5m2),
        TypeError,
        "SAM: dtype must be .* 16 bits or more, got torch.float8_e5m2",
    ),
    (lambda: SAM(8, dtype="float32"), TypeError, "SAM: dtype must be .* torch.dtype, got 'float32'"),
    (lambda: SAM(8, device="banana"), ValueError, "SAM: device must be None or name a torch.device, got 'banana'"),
    (lambda: SAM(8, device=1.5), TypeError, "SAM: device must be None or name a torch.device, got 1.5"),
    (lambda: ConvLSTMCell(3, 8, dtype=torch.int64), TypeError, "ConvLSTMCell: dtype must be .*, got torch.int64"),
    (lambda: ConvLSTMCell(3, 8, device="banana"), ValueError, "ConvLSTMCell: device must be .*, got 'banana'"),
    (lambda: BaseCell(3, 8, dtype=torch.int64), TypeError, "BaseCell: dtype must be .*, got torch.int64"),
    (lambda: BaseCell(3, 8, device="banana"), ValueError, "BaseCell: device must be .*, got 'banana'"),
    (lambda: SAConvLSTMCell(3, 8, dtype=torch.int64), TypeError, "SAConvLSTMCell: dtype must be .*, got torch.int64"),
    (lambda: SAConvLSTMCell(3, 8, device="banana"), ValueError, "SAConvLSTMCell: device must be .*, got 'banana'"),
    (lambda: Forecaster("convlstm", dtype=torch.int64), TypeError, "Forecaster: dtype must be .*, got torch.int64"),
    (lambda: SAConvLSTM(device="banana"), ValueError, "Forecaster: device must be .*, got 'banana'"),
    (lambda: ablation(["x"]), TypeError, r"ablation: name must be a string, one of 'convlstm', .*, got \['x'\]"),
    (lambda: ablation("transformer"), ValueError, "no row 'transformer', known are 'convlstm', 'base', 'memory'"),
    (
        lambda: ablation("memory", use_attention=True),
        TypeError,
        "ablation: use_attention is what makes the rows differ",
    ),
]

ATTENTION_CALLS: list[Bad] = [
    (lambda: SAM_8(None), TypeError, r"SAM: h must be a torch.Tensor of shape \(B, 8, H, W\), got NoneType"),
    (lambda: SAM_8(X[0]), ValueError, r"SAM: h must have shape \(B, 8, H, W\), got \(8, 4, 5\)"),
    (lambda: SAM_8(X[:, :7]), ValueError, r"SAM: h must have shape \(B, 8, H, W\), got \(2, 7, 4, 5\)"),
    (lambda: SAM_8(X.double()), TypeError, "SAM: h is torch.float64, the module's parameters are torch.float32"),
    (lambda: SAM_8(X.long()), TypeError, "SAM: h is torch.int64, the module's parameters are torch.float32"),
    (lambda: SAM_8(X.to("meta")), ValueError, "SAM: h is on meta, the module's parameters are on cpu"),
    (lambda: SAM_8(X, 0), TypeError, r"SAM: m must be a torch.Tensor of shape \(2, 8, 4, 5\), got int"),
    (lambda: SAM_8(X, X[:1]), ValueError, r"SAM: m must have shape \(2, 8, 4, 5\), got \(1, 8, 4, 5\)"),
    (lambda: SAM_8(X, X.mT), ValueError, r"SAM: m must have shape \(2, 8, 4, 5\), got \(2, 8, 5, 4\)"),
    (lambda: SAM_8(X, X.half()), TypeError, "SAM: m is torch.float16, the module's parameters are torch.float32"),
    (lambda: SAM_8(X, X.to("meta")), ValueError, "SAM: m is on meta, the module's parameters are on cpu"),
    (lambda: SAM_8(X, X, ATTENTION_8.fold()), TypeError, "SAM: weights must be .* fold.* got SelfAttentionWeights"),
    (
        lambda: SAM(8, use_attention=False)(X, None, SAM_8.fold()),
        TypeError,
        "SAM: weights must be None, .* got SAMWeights",
    ),
    (lambda: ATTENTION_8([1]), TypeError, r"SelfAttention: x must be a torch.Tensor of shape \(B, 8, H, W\), got list"),
    (lambda: ATTENTION_8(X.mT[:, 1:]), ValueError, r"SelfAttention: x must have shape \(B, 8, H, W\)"),
    (lambda: ATTENTION_8(X.double()), TypeError, "SelfAttention: x is torch.float64"),
    (lambda: ATTENTION_8(X, SAM_8.fold()), TypeError, "SelfAttention: weights must be .* got SAMWeights"),
    (lambda: SAM_8.attention_maps(X, X, torch.zeros(1, 2)), TypeError, "points must be integers, got torch.float32"),
    (lambda: SAM_8.attention_maps(X, X, torch.ones(1, 2) > 0), TypeError, "points must be integers, got torch.bool"),
    (lambda: SAM_8.attention_maps(X, X, [0, 1]), ValueError, r"points must have shape \(P, 2\), got \(2,\)"),
    (lambda: SAM_8.attention_maps(X, None, [[0, 1], [2]]), ValueError, r"SAM: points must .* \[\[0, 1\], \[2\]\]"),
    (lambda: SAM_8.attention_maps(X, None, [["a", "b"]]), ValueError, "SAM: points must be integers of shape"),
    (lambda: SAM_8.attention_maps(X, None, [[2**70, 0]]), ValueError, "SAM: points must be integers of shape"),
    (lambda: SAM_8.attention_maps(X, None, "ab"), TypeError, r"SAM: points must be .* \(P, 2\), got 'ab'"),
    (lambda: SAM_8.attention_maps(X, None, None), TypeError, r"SAM: points must be .* \(P, 2\), got None"),
    (lambda: SAM_8.attention_maps(X, X, [(0, 0, 0)]), ValueError, r"points must have shape \(P, 2\), got \(1, 3\)"),
    (lambda: SAM_8.attention_maps(X, X, [(0, 0), (4, 0)]), ValueError, r"\(4, 0\), which is outside of the 4 x 5 map"),
    (lambda: SAM_8.attention_maps(X, X, [(0, -1)]), ValueError, r"\(0, -1\), which is outside of the 4 x 5 map"),
    (lambda: SAM_8.attention_maps(X, X[:1], [(0, 0)]), ValueError, "SAM: m must have shape"),
    (lambda: SAM(8, use_attention=False).attention_maps(X, X, [(0, 0)]), ValueError, "has use_attention=False"),
    (lambda: ATTENTION_8.attention_maps(X, [(0, 5)]), ValueError, r"SelfAttention: .*\(0, 5\), which is outside"),
    (lambda: ATTENTION_8.attention_maps(X[0], [(0, 5)]), ValueError, "SelfAttention: x must have shape"),
]

CELL_CALLS: list[Bad] = [
    (lambda: CELL(X), ValueError, r"SAConvLSTMCell: x must have shape \(B, 3, H, W\), got \(2, 8, 4, 5\)"),
    (lambda: CELL(INPUT[0]), ValueError, r"SAConvLSTMCell: x must have shape \(B, 3, H, W\), got \(3, 4, 5\)"),
    (lambda: CELL(1), TypeError, "SAConvLSTMCell: x must be a torch.Tensor"),
    (lambda: CELL(INPUT.double()), TypeError, "SAConvLSTMCell: x is torch.float64"),
    (lambda: CELL(INPUT, X), TypeError, r"state must be None or a tuple of the maps \(h, c, m\), got Tensor"),
    (lambda: CELL(INPUT, (X, X)), TypeError, r"state must be None or a tuple of the maps \(h, c, m\), got 2 of them"),
    (lambda: CELL(INPUT, (X, None, X)), TypeError, "the state's c must be a torch.Tensor .* got NoneType"),
    (
        lambda: CELL(INPUT, (X, X, X[:1])),
        ValueError,
        r"the state's m must have shape \(2, 8, 4, 5\), got \(1, 8, 4, 5\)",
    ),
    (lambda: CELL(INPUT, (X.double(), X, X)), TypeError, "the state's h is torch.float64"),
    (lambda: CELL(INPUT, (X, X, X), ATTENTION_8.fold()), TypeError, "SAM: weights must be"),
    (
        lambda: SAConvLSTMCell(3, 8, use_attention=False)(INPUT, None, SAM_8.fold()),
        TypeError,
        "SAM: weights must be None, .* got SAMWeights",
    ),
    (lambda: ConvLSTMCell(3, 8)(INPUT, None, "junk"), TypeError, "ConvLSTMCell: weights must be None, .* got str"),
    (lambda: BASE_CELL(INPUT, (X, X), SAM_8.fold()), TypeError, "BaseCell: weights must be"),
    (lambda: BASE_CELL(INPUT, (X, X, X)), TypeError, r"maps \(h, c\), got 3 of them"),
    (lambda: CELL.attention_maps(INPUT, None, [(9, 9)]), ValueError, "outside of the 4 x 5 map"),
]

FORECASTER_CALLS: list[Bad] = [
    (lambda: MODEL(FRAMES[0], 2), ValueError, r"frames must have shape \(B, T, 1, H, W\), got \(3, 1, 4, 6\)"),
    (lambda: MODEL(FRAMES.expand(2, 3, 2, 4, 6), 2), ValueError, r"frames must have shape \(B, T, 1, H, W\)"),
    (lambda: MODEL(None, 2), TypeError, "frames must be a torch.Tensor"),
    (lambda: MODEL(FRAMES.to(torch.uint8), 2), TypeError, "frames is torch.uint8, .* torch.float32"),
    (lambda: MODEL(FRAMES.to("meta"), 2), ValueError, "frames is on meta, the module's parameters are on cpu"),
    (lambda: MODEL(FRAMES[:, :0], 2), ValueError, "frames must hold at least one frame"),
    (lambda: MODEL(FRAMES, 0), ValueError, "Forecaster: horizon must be at least 1, got 0"),
    (lambda: MODEL(FRAMES, 2.5), TypeError, "Forecaster: horizon must be a positive integer, got 2.5"),
    (lambda: MODEL(FRAMES, 2, all_steps=1), TypeError, "all_steps must be True or False, got 1"),
    (lambda: MODEL(FRAMES, 4, truth=TRUTH[0]), ValueError, r"truth must have shape \(2, at least 3, 1, 4, 6\)"),
    (lambda: MODEL(FRAMES, 4, truth=TRUTH[:1]), ValueError, r"truth must have shape .*, got \(1, 3, 1, 4, 6\)"),
    (lambda: MODEL(FRAMES, 5, truth=TRUTH), ValueError, r"truth must hold at least horizon - 1 = 4 frames, got 3"),
    (lambda: MODEL(FRAMES, 4, truth=TRUTH.double()), TypeError, "truth is torch.float64"),
    (lambda: MODEL(FRAMES, 4, truth_mask=MASK), ValueError, "truth_mask needs truth"),
    (
        lambda: MODEL(FRAMES, 4, truth=TRUTH, truth_mask=MASK.int()),
        TypeError,
        "truth_mask must be .* bool, got torch.int",
    ),
    (lambda: MODEL(FRAMES, 4, truth=TRUTH, truth_mask=[True]), TypeError, "truth_mask must be .* bool, got list"),
    (lambda: MODEL(FRAMES, 4, truth=TRUTH, truth_mask=MASK[:2]), ValueError, r"= \(2, 3\), got \(2,\)"),
    (lambda: MODEL.attention_maps(FRAMES[0], 2, [(0, 0)]), ValueError, "frames must have shape"),
    (lambda: MODEL.attention_maps(FRAMES, -1, [(0, 0)]), ValueError, "horizon must be at least 1, got -1"),
    (lambda: MODEL.attention_maps(FRAMES, 2, [(2, 0)]), ValueError, r"\(2, 0\), which is outside of the 2 x 3 map"),
    (lambda: MODEL.attention_maps(FRAMES, 2, [(0, 0)], [2]), ValueError, r"layers must lie in 0 ... 1, got 2"),
    (lambda: MODEL.attention_maps(FRAMES, 2, [(0, 0)], [0, 0]), ValueError, "layers must differ from each other"),
    (lambda: MODEL.attention_maps(FRAMES, 2, [(0, 0)], []), TypeError, "layers must be None or a non-empty sequence"),
    (lambda: MODEL.attention_maps(FRAMES, 2, [(0, 0)], 0), TypeError, "layers must be None or a non-empty sequence"),
    (
        lambda: Forecaster("convlstm", 1, (4,)).attention_maps(FRAMES, 2, [(0, 0)]),
        ValueError,
        "ConvLSTMCell has no attention to make maps of",
    ),
]

PATCH_CALLS: list[Bad] = [
    (lambda: patchify(X, 0), ValueError, "patchify: patch_size must be at least 1, got 0"),
    (lambda: patchify(X, 2.0), TypeError, "patchify: patch_size must be a positive integer, got 2.0"),
    (lambda: patchify(X[0], 1), ValueError, r"patchify: frames must have shape \(B, C, H, W\), got \(8, 4, 5\)"),
    (lambda: patchify(None, 2), TypeError, r"patchify: frames must be a torch.Tensor .*, got NoneType"),
    (lambda: unpatchify(X, 3), ValueError, r"patches must .* patch_size\*\*2 = 9 channels, got \(2, 8, 4, 5\)"),
    (lambda: unpatchify(X[0], 2), ValueError, r"unpatchify: patches must have shape .*, got \(8, 4, 5\)"),
    (lambda: unpatchify(X, -2), ValueError, "unpatchify: patch_size must be at least 1, got -2"),
    (lambda: unpatchify(X, "2"), TypeError, "unpatchify: patch_size must be a positive integer, got '2'"),
]


@pytest.mark.parametrize(
    "call, error, message",
    [*CONSTRUCTORS, *ATTENTION_CALLS, *CELL_CALLS, *FORECASTER_CALLS, *PATCH_CALLS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
