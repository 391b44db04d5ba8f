"""Self-attention of one map in plain PyTorch, written to be read beside equations 2-4 of the SA-ConvLSTM paper."""

from torch import Tensor

from fastsam.ops._attention import windows
from fastsam.ops._attention.eager import attend


def self_attention(
    x: Tensor,
    score: Tensor,
    score_bias: Tensor,
    value: Tensor,
    value_bias: Tensor,
    *,
    key: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """See `fastsam.ops.self_attention`; materialises the N x N matrix."""
    if window is not None and window != tuple(x.shape[2:]):
        z = self_attention(windows.split(x, window), score, score_bias, value, value_bias, key=key)
        return windows.merge(z, x.shape)
    columns = x.flatten(2)
    query = score @ columns + score_bias[:, None]
    keys = columns if key is None else key @ columns
    r, _ = attend(query, keys, columns)
    z = value @ r + value_bias[:, None]
    return z.unflatten(2, x.shape[2:])
