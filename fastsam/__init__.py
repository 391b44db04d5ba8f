"""Fused self-attention memory (SAM) for recurrent spatiotemporal predictors.

`fastsam.SAM` drops into existing PyTorch models; `fastsam.SAConvLSTM` and the other named models are complete
predictors; `fastsam.ops` holds the operators underneath. `fastsam.info()` tells what is built and what would be chosen.
"""

from fastsam import ops
from fastsam._version import __version__
from fastsam.backends import backend
from fastsam.info import info
from fastsam.models import ABLATION, BaseModel, ConvLSTM, SAConvLSTM, ablation
from fastsam.modules import SAM, BaseCell, ConvLSTMCell, Forecaster, RecurrentCell, SAConvLSTMCell, SelfAttention

__all__ = [
    "ABLATION",
    "SAM",
    "BaseCell",
    "BaseModel",
    "ConvLSTM",
    "ConvLSTMCell",
    "Forecaster",
    "RecurrentCell",
    "SAConvLSTM",
    "SAConvLSTMCell",
    "SelfAttention",
    "__version__",
    "ablation",
    "backend",
    "info",
    "ops",
]
