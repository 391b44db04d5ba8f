"""The gate arithmetic of ConvLSTM in plain PyTorch, to be read beside equation 1 of the SA-ConvLSTM paper."""

from torch import Tensor

from fastsam.ops._gates.eager import normalise


def lstm_gates(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    *,
    recurrent: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    recurrent_norm: tuple[Tensor, Tensor] | None = None,
    state_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """See `fastsam.ops.lstm_gates`."""
    a = normalise(gates, norm, eps)
    if recurrent is not None:
        a = a + normalise(recurrent, recurrent_norm, eps)
    i, f, g, o = a.chunk(4, dim=1)
    c_new = normalise((f + forget_bias).sigmoid() * c + i.sigmoid() * g.tanh(), state_norm, eps)
    return (o.sigmoid() * c_new.tanh()).contiguous(), c_new.contiguous()
