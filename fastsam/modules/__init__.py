"""Modules: self-attention, the self-attention memory, recurrent cells, and the forecaster that stacks them.

The blocks of CMS-LSTM are modules of their own, and go around other cells as well.
"""

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
from fastsam.modules.cms import (
    CellWithBlocks,
    CellWithBlocksWeights,
    CMSLSTMCell,
    NormalisedConvLSTMCell,
    TransplantCell,
)
from fastsam.modules.cms_blocks import ContextEmbedding, ExpressionWeights, SpatiotemporalExpression
from fastsam.modules.forecaster import Forecaster, patchify, unpatchify

__all__ = [
    "CELLS",
    "SAM",
    "AttentionMaps",
    "BaseCell",
    "BaseCellWeights",
    "CMSLSTMCell",
    "CellWithBlocks",
    "CellWithBlocksWeights",
    "ContextEmbedding",
    "ConvLSTMCell",
    "ConvLSTMState",
    "ExpressionWeights",
    "Forecaster",
    "NormalisedConvLSTMCell",
    "RecurrentCell",
    "SAConvLSTMCell",
    "SAConvLSTMState",
    "SAMWeights",
    "SelfAttention",
    "SelfAttentionWeights",
    "SpatiotemporalExpression",
    "TransplantCell",
    "patchify",
    "unpatchify",
]
