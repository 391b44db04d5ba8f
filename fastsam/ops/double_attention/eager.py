"""Double attention of SAM in plain PyTorch, written to be read beside equations 2-7 of the SA-ConvLSTM paper."""

from torch import Tensor

from fastsam.ops._attention.eager import attend


def double_attention(
    h: Tensor,
    m: Tensor,
    score_h: Tensor,
    score_m: Tensor,
    score_bias_h: Tensor,
    score_bias_m: Tensor,
    value_h: Tensor,
    value_m: Tensor,
    value_bias: Tensor,
    *,
    key_h: Tensor | None = None,
    key_m: Tensor | None = None,
) -> Tensor:
    """See `fastsam.ops.double_attention`; materialises both N x N matrices."""
    hidden, memory = h.flatten(2), m.flatten(2)
    query_h = score_h @ hidden + score_bias_h[:, None]
    query_m = score_m @ hidden + score_bias_m[:, None]
    keys_h = hidden if key_h is None else key_h @ hidden
    keys_m = memory if key_m is None else key_m @ memory
    r_h, _ = attend(query_h, keys_h, hidden)
    r_m, _ = attend(query_m, keys_m, memory)
    z = value_h @ r_h + value_m @ r_m + value_bias[:, None]
    return z.unflatten(2, h.shape[2:])
