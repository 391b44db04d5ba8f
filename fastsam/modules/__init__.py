"""Modules: self-attention, the self-attention memory, recurrent cells, and the forecaster that stacks them."""

from fastsam.modules.attention import SAM, AttentionMaps, SAMWeights, SelfAttention, SelfAttentionWeights
from fastsam.modules.cells import (
    CELLS,
    BaseCell,
    BaseCellWeights,
    ConvLSTMCell,
    ConvLSTMState,
    RecurrentCell,
    SAConvLSTMCell,
    SAConvLSTMState,
)
from fastsam.modules.forecaster import Forecaster, patchify, unpatchify

__all__ = [
    "CELLS",
    "SAM",
    "AttentionMaps",
    "BaseCell",
    "BaseCellWeights",
    "ConvLSTMCell",
    "ConvLSTMState",
    "Forecaster",
    "RecurrentCell",
    "SAConvLSTMCell",
    "SAConvLSTMState",
    "SAMWeights",
    "SelfAttention",
    "SelfAttentionWeights",
    "patchify",
    "unpatchify",
]
