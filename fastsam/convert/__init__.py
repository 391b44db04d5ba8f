"""Published checkpoints and modules as models and modules of this package, one function for each source.

`cms_lstm`: a checkpoint of the published code of CMS-LSTM, for `fastsam.CMSLSTM`. `sa_convlstm_cell`: a cell of one of
the published SA-ConvLSTMs, as a cell for `fastsam.Forecaster`. A published SAM alone: `fastsam.SAM.from_module`.
"""

from fastsam.convert.cms import cms_lstm
from fastsam.convert.published_cells import sa_convlstm_cell

__all__ = ["cms_lstm", "sa_convlstm_cell"]
