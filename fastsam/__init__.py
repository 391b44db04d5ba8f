"""Fused self-attention memory (SAM) for recurrent spatiotemporal predictors.

`fastsam.SAM` drops into existing PyTorch models; `fastsam.SAConvLSTM` and the other named models are complete
predictors, and `fastsam.build` makes any of them by name; `fastsam.ops` holds the operators underneath;
`fastsam.convert` reads checkpoints of published code. `fastsam.info()` tells what is built and what would be chosen.
"""

from fastsam import comparators, convert, ops
from fastsam._version import __version__
from fastsam.backends import backend
from fastsam.comparators import E3DLSTM, MIM, MIMStar, PredRNN, PredRNNPlusPlus, TrajGRU, TransplantPredRNN
from fastsam.info import info
from fastsam.models import (
    ABLATION,
    CMSLSTM,
    MODELS,
    TRANSPLANTS,
    BaseModel,
    ConvLSTM,
    SAConvLSTM,
    Transplant,
    ablation,
    build,
    transplant,
)
from fastsam.modules import (
    SAM,
    BaseCell,
    CMSLSTMCell,
    ContextEmbedding,
    ConvLSTMCell,
    Forecaster,
    RecurrentCell,
    SAConvLSTMCell,
    SelfAttention,
    SpatiotemporalExpression,
)

__all__ = [
    "ABLATION",
    "CMSLSTM",
    "E3DLSTM",
    "MIM",
    "MODELS",
    "SAM",
    "TRANSPLANTS",
    "BaseCell",
    "BaseModel",
    "CMSLSTMCell",
    "ContextEmbedding",
    "ConvLSTM",
    "ConvLSTMCell",
    "Forecaster",
    "MIMStar",
    "PredRNN",
    "PredRNNPlusPlus",
    "RecurrentCell",
    "SAConvLSTM",
    "SAConvLSTMCell",
    "SelfAttention",
    "SpatiotemporalExpression",
    "TrajGRU",
    "Transplant",
    "TransplantPredRNN",
    "__version__",
    "ablation",
    "backend",
    "build",
    "comparators",
    "convert",
    "info",
    "ops",
    "transplant",
]
