"""Checkpoints of published code as state dicts of this package's models, one function for each source.

`cms_lstm`: the published code of CMS-LSTM, for `fastsam.CMSLSTM`.
"""

from fastsam.convert.cms import cms_lstm

__all__ = ["cms_lstm"]
