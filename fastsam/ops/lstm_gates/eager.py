"""The gate arithmetic of ConvLSTM in plain PyTorch, to be read beside equation 1 of the SA-ConvLSTM paper."""

import torch
from torch import Tensor


def lstm_gates(gates: Tensor, c: Tensor, forget_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """See `fastsam.ops.lstm_gates`."""
    i, f, g, o = gates.chunk(4, dim=1)
    c_new = (f + forget_bias).sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c_new.tanh()).contiguous(), c_new.contiguous()


forward = lstm_gates


def backward(dh: Tensor, dc_new: Tensor, gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    """The gradients with respect to gates and c, the activations computed again."""
    i, f, g, o = gates.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), (f + forget_bias).sigmoid(), g.tanh(), o.sigmoid()
    tanh_c = (f * c + i * g).tanh()
    dc = dc_new + dh * o * (1 - tanh_c * tanh_c)
    di, df, dg, do = dc * g, dc * c, dc * i, dh * tanh_c
    dgates = [di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)]
    return torch.cat(dgates, dim=1).contiguous(), (dc * f).contiguous()
