"""Modules: self-attention, the self-attention memory, recurrent cells, and the forecaster that stacks them.

The blocks of CMS-LSTM are modules of their own, and go around other cells as well.
"""

from fastsam.modules.attention import SAM, AttentionMaps, SAMWeights, SelfAttention, SelfAttentionWeights
from fastsam.modules.causal_lstm import CausalLSTMCell, GradientHighwayUnit
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
from fastsam.modules.e3d_lstm import E3DLSTMCell
from fastsam.modules.forecaster import Forecaster, patchify, unpatchify
from fastsam.modules.mim import CausalMIMCell, MIMCell
from fastsam.modules.predrnn import STLSTMCell
from fastsam.modules.published_cell import PublishedSAConvLSTMCell
from fastsam.modules.traj_gru import TrajGRUCell

__all__ = [
    "CELLS",
    "SAM",
    "AttentionMaps",
    "BaseCell",
    "BaseCellWeights",
    "CMSLSTMCell",
    "CausalLSTMCell",
    "CausalMIMCell",
    "CellWithBlocks",
    "CellWithBlocksWeights",
    "ContextEmbedding",
    "ConvLSTMCell",
    "ConvLSTMState",
    "E3DLSTMCell",
    "ExpressionWeights",
    "Forecaster",
    "GradientHighwayUnit",
    "MIMCell",
    "NormalisedConvLSTMCell",
    "PublishedSAConvLSTMCell",
    "RecurrentCell",
    "SAConvLSTMCell",
    "SAConvLSTMState",
    "SAMWeights",
    "STLSTMCell",
    "SelfAttention",
    "SelfAttentionWeights",
    "SpatiotemporalExpression",
    "TrajGRUCell",
    "TransplantCell",
    "patchify",
    "unpatchify",
]
