"""The measured modules as a user of PyTorch would write them from the paper, unfused.

Their submodules have the names that fastsam's have, so one state_dict serves both. What varies is `attend`: how the
attentions, which share their queries, are computed from the projections.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import ATTENTION_CHANNELS, CHANNELS, KERNEL_SIZE
from fastsam.modules import RecurrentCell

Attend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""(query (B, D, H, W), keys and values of each source) -> the attended values, each (B, C, H, W)."""


def attend_eager(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Two batched matrix products around a softmax."""
    attended = []
    for key, value in zip(keys, values, strict=True):
        weights = torch.softmax(torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2)), dim=-1)
        attended.append(torch.bmm(value.flatten(2), weights.transpose(1, 2)).view_as(value))
    return attended


def attend_sdpa(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
    """One call of F.scaled_dot_product_attention, the sources stacked on the batch, in the layout it is fastest in.

    The flash kernels (CPU; half types on CUDA) want as many channels of query and key as of values, otherwise N x N
    matrices are built: zeros fill them up, which costs less.
    """
    count, channels = len(keys), values[0].shape[1]
    fill = channels - query.shape[1] if query.device.type == "cpu" or query.dtype.itemsize < 4 else 0
    q = F.pad(_rows(query), (0, fill)).repeat(count, 1, 1, 1)
    k = F.pad(torch.cat([_rows(key) for key in keys]), (0, fill))
    v = torch.cat([_rows(value) for value in values]).contiguous()
    attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return _maps(attended, values[0]).chunk(count)


def attend_flex(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
    """One call of FlexAttention, which is fused only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    q = _rows(query).repeat(len(keys), 1, 1, 1)
    k, v = (torch.cat([_rows(source) for source in sources]) for sources in (keys, values))
    return _maps(flex_attention(q, k, v, scale=1.0), values[0]).chunk(len(keys))


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, N, C), the layout of PyTorch's attention."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    return rows.squeeze(1).transpose(1, 2).reshape(-1, *like.shape[1:])


class DoubleAttention(nn.Module):
    """The feature aggregation of SAM, equations 2 to 7: Z from h and m."""

    def __init__(self, attend: Attend = attend_eager) -> None:
        super().__init__()
        self.attend = attend
        self.query = nn.Conv2d(CHANNELS, ATTENTION_CHANNELS, 1)
        self.key = nn.Conv2d(CHANNELS, ATTENTION_CHANNELS, 1)
        self.value = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.memory_key = nn.Conv2d(CHANNELS, ATTENTION_CHANNELS, 1)
        self.memory_value = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.fusion = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def aggregate(self, h: Tensor, m: Tensor) -> Tensor:
        keys, values = (self.key(h), self.memory_key(m)), (self.value(h), self.memory_value(m))
        return self.fusion(torch.cat(list(self.attend(self.query(h), keys, values)), dim=1))

    def forward(self, h: Tensor, m: Tensor) -> Tensor:
        return self.aggregate(h, m)


class SeparableGates(nn.Module):
    """Equations 8 and 9 with a depthwise separable convolution: (h^, m') from Z, h and m."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = _separable_convolution()

    def forward(self, z: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return _gate(self.pointwise(self.depthwise(torch.cat([z, h], dim=1))), m)


class SAM(DoubleAttention):
    """The self-attention memory, equations 2 to 9: (h^, m') from h and m."""

    def __init__(self, attend: Attend = attend_eager) -> None:
        super().__init__(attend)
        self.depthwise, self.pointwise = _separable_convolution()

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return _gate(self.pointwise(self.depthwise(torch.cat([self.aggregate(h, m), h], dim=1))), m)


def _separable_convolution() -> tuple[nn.Conv2d, nn.Conv2d]:
    gated = 2 * CHANNELS
    depthwise = nn.Conv2d(gated, gated, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=gated, bias=False)
    return depthwise, nn.Conv2d(gated, 3 * CHANNELS, 1)


def _gate(gates: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    i, g, o = gates.chunk(3, dim=1)
    i = torch.sigmoid(i)
    m = (1 - i) * m + i * torch.tanh(g)
    return torch.sigmoid(o) * m, m


class LSTMGates(nn.Module):
    """The gate arithmetic of a ConvLSTM: (h, c') from the gates i, f, g, o and c."""

    def forward(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class NormalisedLSTMGates(nn.Module):
    """The same from the outputs of the input's and the hidden state's convolution, each through its layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.hidden_norm = nn.GroupNorm(1, 4 * CHANNELS), nn.GroupNorm(1, 4 * CHANNELS)
        self.lstm_gates = LSTMGates()

    def forward(self, gates: Tensor, recurrent: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.lstm_gates(self.input_norm(gates) + self.hidden_norm(recurrent), c)


class ConvLSTMCell(RecurrentCell):
    """The convolutional LSTM with layer norm, as a cell of `fastsam.Forecaster`; it has no use for `attend`."""

    maps = 2

    def __init__(
        self, in_channels: int, hidden_channels: int, *, attend: Attend = attend_eager, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        padding, gates = KERNEL_SIZE // 2, 4 * hidden_channels
        self.input_conv = nn.Conv2d(in_channels, gates, KERNEL_SIZE, padding=padding)
        self.hidden_conv = nn.Conv2d(hidden_channels, gates, KERNEL_SIZE, padding=padding, bias=False)
        self.input_norm, self.hidden_norm = nn.GroupNorm(1, gates), nn.GroupNorm(1, gates)
        self.lstm_gates = LSTMGates()

    def forward(self, x: Tensor, state: Any = None, weights: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            state = (x.new_zeros(x.shape[0], self.hidden_conv.in_channels, *x.shape[2:]),) * self.maps
        return self.step(x, *state)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Any]:
        h, c = self.recur(x, h, c)
        return h, (h, c)

    def recur(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.lstm_gates(self.input_norm(self.input_conv(x)) + self.hidden_norm(self.hidden_conv(h)), c)


class SelfAttention(nn.Module):
    """Self-attention with a shortcut, section 3.1: x + W_f Z."""

    def __init__(self, channels: int, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.query = nn.Conv2d(channels, ATTENTION_CHANNELS, 1)
        self.key = nn.Conv2d(channels, ATTENTION_CHANNELS, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        (z,) = self.attend(self.query(x), [self.key(x)], [self.value(x)])
        return x + self.output(z)


class BaseCell(ConvLSTMCell):
    """The base model, equation 1: a ConvLSTM on attended maps."""

    def __init__(
        self, in_channels: int, hidden_channels: int, *, attend: Attend = attend_eager, device: Any, dtype: Any
    ) -> None:
        super().__init__(in_channels, hidden_channels, device=device, dtype=dtype)
        self.input_attention = SelfAttention(in_channels, attend)
        self.hidden_attention = SelfAttention(hidden_channels, attend)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Any]:
        return super().step(self.input_attention(x), self.hidden_attention(h), c)


class SAConvLSTMCell(ConvLSTMCell):
    """SA-ConvLSTM, figure 2: a ConvLSTM whose hidden state goes through the self-attention memory."""

    maps = 3

    def __init__(
        self, in_channels: int, hidden_channels: int, *, attend: Attend = attend_eager, device: Any, dtype: Any
    ) -> None:
        super().__init__(in_channels, hidden_channels, device=device, dtype=dtype)
        self.sam = SAM(attend)

    def step(self, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> tuple[Tensor, Any]:
        h, c = self.recur(x, h, c)
        h, m = self.sam(h, m)
        return h, (h, c, m)
