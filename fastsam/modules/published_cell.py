"""The SA-ConvLSTM cell in the form that published implementations give it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.modules import _check
from fastsam.modules.attention import SAM
from fastsam.modules.cells import SAConvLSTMState, SAMCell
from fastsam.modules.cms_blocks import checked_size
from fastsam.ops import lstm_gates


class PublishedSAConvLSTMCell(SAMCell):
    """The self-attention ConvLSTM with one convolution of input and hidden state together:

        i, f, g, o = norm(W * [X_t; H^_{t-1}] + b)
        C_t = sigmoid(f + w_f C_{t-1}) C_{t-1} + sigmoid(i + w_i C_{t-1}) tanh(g)
        H_t = sigmoid(o + w_o C_t) tanh(C_t)
        H^_t, M_t = SAM(H_t, M_{t-1})

    H^_t is the output and the next hidden state. Against `SAConvLSTMCell` there is no forget bias, the norm is one of
    each channel by itself, and there may be the peepholes w. `fastsam.convert.sa_convlstm_cell` makes such cells of
    published ones.

    Submodules: `conv` (in_channels + hidden_channels -> 4 hidden_channels: i, f, g, o), `norm` (the identity without
    channel_norm), `sam` (`SAM`). Parameter `peephole` (3 hidden_channels, H, W: w_i, w_f, w_o), which starts from zero.

    Args:
        in_channels: channels of the input X.
        hidden_channels: C, channels of H, C and M.
        kernel_size: of the convolution, odd; the map keeps its size by zero padding.
        bias: whether the convolution has a bias.
        channel_norm: normalise each channel of the convolution's output over its positions, GroupNorm(4 C, 4 C).
        eps: of that norm.
        peephole_size: (H, W) for peepholes, which take maps of this size only; None for none.
        sam_options: arguments of the `SAM` other than channels, device and dtype; None for its defaults.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = True,
        channel_norm: bool = False,
        eps: float = 1e-5,
        peephole_size: Sequence[int] | None = None,
        sam_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = _check.positive_int(name, "in_channels", in_channels)
        self.hidden_channels = _check.positive_int(name, "hidden_channels", hidden_channels)
        self.kernel_size = _check.odd_kernel(name, "kernel_size", kernel_size)
        self.peephole_size = checked_size(name, "peephole_size", peephole_size)
        if not isinstance(sam_options, Mapping | None):
            raise TypeError(f"{name}: sam_options must be None or a mapping of SAM's arguments, got {sam_options!r}")
        placement = _check.placement(name, device, dtype)
        gates = 4 * hidden_channels
        self.conv = nn.Conv2d(
            in_channels + hidden_channels,
            gates,
            kernel_size,
            padding=kernel_size // 2,
            bias=_check.flag(name, "bias", bias),
            **placement,
        )
        normalised = _check.flag(name, "channel_norm", channel_norm)
        eps = _check.real_number(name, "eps", eps)
        self.norm = nn.GroupNorm(gates, gates, eps, **placement) if normalised else nn.Identity()
        self.peephole: nn.Parameter | None = None
        if self.peephole_size is not None:
            self.peephole = nn.Parameter(torch.zeros(3 * hidden_channels, *self.peephole_size, **placement))
        self.sam = SAM(hidden_channels, **(sam_options or {}), **placement)

    def extra_repr(self) -> str:
        return "" if self.peephole_size is None else f"peephole_size={self.peephole_size}"

    def recur(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H_t and C_t from X_t, H^_{t-1} and C_{t-1}."""
        gates = self.norm(self.conv(torch.cat([x, h], dim=1)))
        if self.peephole is None:
            return lstm_gates(gates, c)
        i, f, g, o = gates.chunk(4, dim=1)
        w_i, w_f, w_o = self.peephole.chunk(3)
        c = (f + w_f * c).sigmoid() * c + (i + w_i * c).sigmoid() * g.tanh()
        return (o + w_o * c).sigmoid() * c.tanh(), c

    def _checked_state(self, x: Any, state: Any) -> tuple[Tensor, ...]:
        """The maps of the state to start from, after the checks of both inputs."""
        name, weight, fields = type(self).__name__, self.conv.weight, SAConvLSTMState._fields
        size = ("H", "W") if self.peephole_size is None else self.peephole_size
        _check.tensor(name, "x", x, "B", self.in_channels, *size)
        _check.same_kind(name, "x", x, weight)
        shape = (x.shape[0], self.hidden_channels, *x.shape[2:])
        if state is None:
            return (x.new_zeros(shape),) * len(fields)
        return _check.state_maps(name, state, dict.fromkeys(fields, shape), weight)
