"""The gated memory update in plain PyTorch, to be read beside equations 8 and 9 of the SA-ConvLSTM paper."""

from torch import Tensor

from fastsam.ops._gates.eager import normalise


def memory_gates(
    gates: Tensor,
    m: Tensor,
    *,
    recurrent: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    recurrent_norm: tuple[Tensor, Tensor] | None = None,
    state_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """See `fastsam.ops.memory_gates`."""
    a = normalise(gates, norm, eps)
    if recurrent is not None:
        a = a + normalise(recurrent, recurrent_norm, eps)
    i, g, o = a.chunk(3, dim=1)
    i = i.sigmoid()
    m_new = normalise((1 - i) * m + i * g.tanh(), state_norm, eps)
    return (o.sigmoid() * m_new).contiguous(), m_new.contiguous()
