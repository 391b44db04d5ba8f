"""MIM, memory in memory: recurrent blocks whose forget gate is two recurrent modules, and their forecaster.

The equations are those of "Memory In Memory: A Predictive Neural Network for Learning Higher-Order Non-Stationarity
from Spatiotemporal Dynamics" (Wang et al., CVPR 2019), section 3. Where its text and its published code differ, the
code is followed, because the published parameter count is the code's; the docstrings name the differences.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsam.modules import _check
from fastsam.modules.causal_lstm import CausalLSTMCell, causal_output
from fastsam.modules.cms_blocks import checked_size
from fastsam.modules.forecaster import patchify, unpatchify
from fastsam.modules.predrnn import (
    MemoryCell,
    NormedConv2d,
    STLSTMCell,
    ZigzagForecaster,
    convolution_options,
    entering_state,
    memory_of_last,
    update_memory,
)


class MIMState(NamedTuple):
    """The state of a MIM block, each (B, C, H, W).

    h, c, m: hidden state, cell state and spatiotemporal memory. d, n: output and memory of MIM-N. s: memory of MIM-S.
    """

    h: Tensor
    c: Tensor
    m: Tensor
    d: Tensor
    n: Tensor
    s: Tensor


class PeepholeLSTM(nn.Module):
    """A ConvLSTM with peepholes, in which both MIM-N and MIM-S are written:

        i, f, g, o = W_x * X_t + W_h * H_{t-1}
        C_t = sigmoid(f + w_f C_{t-1} + forget_bias) C_{t-1} + sigmoid(i + w_i C_{t-1}) tanh(g)
        H_t = sigmoid(o + w_o C_t) tanh(C_t)

    Submodules `input` and `hidden` (`NormedConv2d`, channels -> 4 channels: i, f, g, o). Parameters `peephole` (2
    channels, ...: w_i, w_f) and `output_peephole` (channels, ...: w_o), which start from zero.

    Args:
        channels: of X, H and C.
        map_size: (H, W) for peepholes with a weight for each channel and position, None for one a channel.
        forget_bias: added to f.
        options: kernel_size, layer_norm, bias and placement of both `NormedConv2d`.
    """

    def __init__(
        self, channels: int, map_size: tuple[int, int] | None, forget_bias: float, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.forget_bias = forget_bias
        self.input = NormedConv2d(channels, 4 * channels, **options)
        self.hidden = NormedConv2d(channels, 4 * channels, **options)
        size = (1, 1) if map_size is None else map_size
        self.peephole = nn.Parameter(torch.zeros(2 * channels, *size, **options["placement"]))
        self.output_peephole = nn.Parameter(torch.zeros(channels, *size, **options["placement"]))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H_t and C_t from X_t, H_{t-1} and C_{t-1}, each (B, channels, H, W)."""
        gates = self.input(x) + self.hidden(h)
        of_state = (self.peephole.unflatten(0, (2, -1)) * c.unsqueeze(1)).flatten(1, 2)
        c = update_memory(gates, c, self.forget_bias, F.pad(of_state, (0, 0, 0, 0, 0, 2 * c.shape[1])))
        o = gates[:, 3 * c.shape[1] :] + self.output_peephole * c
        return o.sigmoid() * c.tanh(), c


class _MIMBlock(MemoryCell):
    """What `MIMCell` and `CausalMIMCell` share: MIM-N and MIM-S, which stand for the forget gate of C.

    D_t^l, N_t^l = MIM-N(H_t^{l-1} - H_{t-1}^{l-1} or D_t^{l-1}; D_{t-1}^l, N_{t-1}^l)
    T_t^l, S_t^l = MIM-S(D_t^l; C_{t-1}^l, S_{t-1}^l)
    C_t^l        = T_t^l + sigmoid(i) tanh(g)
    """

    state_type = MIMState
    from_below = ("memory", "difference")

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        forget_bias: float,
        map_size: Sequence[int] | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(in_channels, hidden_channels, options["kernel_size"], forget_bias=forget_bias)
        self.map_size = checked_size(type(self).__name__, "map_size", map_size)
        arguments = (hidden_channels, self.map_size, self.forget_bias, options)
        self.non_stationary = PeepholeLSTM(*arguments)
        self.stationary = PeepholeLSTM(*arguments)
        self.fusion = nn.Conv2d(2 * hidden_channels, hidden_channels, 1, bias=options["bias"], **options["placement"])

    def checked_state(self, x: Any, state: Any, weights: Any) -> tuple[Tensor, ...]:
        """The maps of the state to start from, after the checks of the inputs and of the map's size."""
        maps = super().checked_state(x, state, weights)
        if self.map_size is not None and tuple(x.shape[2:]) != self.map_size:
            raise ValueError(
                f"{type(self).__name__}: x must be a map of {self.map_size[0]} x {self.map_size[1]}, the map_size of "
                f"the peepholes, got {x.shape[2]} x {x.shape[3]}; map_size=None (of a whole model: frame_size=None) "
                "takes any size"
            )
        return maps

    def _forget(self, difference: Tensor | None, c: Tensor, d: Tensor, n: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """T_t, D_t, N_t and S_t. Without a difference there is no step before, and MIM-N stays at its start."""
        if difference is not None:
            _check.tensor(type(self).__name__, "difference", difference, *c.shape)
            _check.same_kind(type(self).__name__, "difference", difference, self.input.weight)
            d, n = self.non_stationary(difference, d, n)
        t, s = self.stationary(d, c, s)
        return t, d, n, s


class MIMCell(_MIMBlock):
    """The MIM block: an ST-LSTM whose cell state forgets by MIM-N and MIM-S, layer l:

        i, g, o    = W_x * X_t + W_h * H_{t-1}^l                 (o with W_m * M_t^{l-1} too)
        D_t^l      = MIM-N(H_t^{l-1} - H_{t-1}^{l-1}, N_{t-1}^l)
        T_t^l      = MIM-S(D_t^l, C_{t-1}^l, S_{t-1}^l)
        C_t^l      = T_t^l + sigmoid(i) tanh(g)
        i', f', g' = W_x * X_t + W_m * M_t^{l-1}
        M_t^l      = sigmoid(f' + forget_bias) M_t^{l-1} + sigmoid(i') tanh(g')
        H_t^l      = sigmoid(o) tanh(W_1x1 * [C_t^l; M_t^l])

    In the paper's text both memories have a W_x of their own, and the output gate sees C_t^l and M_t^l in the place of
    M_t^{l-1}. There MIM-N convolves N_{t-1}, and MIM-S C_{t-1}, with one more convolution of the new memory for each
    output gate; the code writes both as `PeepholeLSTM`, MIM-N with D_{t-1} and MIM-S with C_{t-1} as its hidden state.
    From the third layer on the code reads D_t^{l-1}, the output of the MIM-N below, in the place of the difference.

    Submodules: `input` (in_channels -> 4 C: i, f, g, o), `hidden` (C -> 3 C: i, g, o), `memory` (C -> 4 C: i, f, g, o),
    `non_stationary` (MIM-N), `stationary` (MIM-S), `fusion` (W_1x1).

    Args:
        in_channels: channels of the input X.
        hidden_channels: C, channels of all maps of the state, and of the difference.
        kernel_size: of the convolutions, odd; the map keeps its size by zero padding.
        layer_norm: normalise the output of every convolution but W_1x1 with a GroupNorm(1, channels).
        forget_bias: added to f' and to the forget gates of MIM-N and MIM-S.
        bias: whether the convolutions have biases.
        map_size: (H, W) for peepholes with a weight for each channel and position, which take maps of this size only;
            None for one a channel, for maps of any size.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    handed_on_by = "fastsam.MIM"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        bias: bool = True,
        map_size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = convolution_options("MIMCell", kernel_size, layer_norm, bias, device, dtype)
        super().__init__(in_channels, hidden_channels, forget_bias, map_size, options)
        c = hidden_channels
        self.input = NormedConv2d(in_channels, 4 * c, **options)
        self.hidden = NormedConv2d(c, 3 * c, **options)
        self.memory = NormedConv2d(c, 4 * c, **options)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None = None,
        weights: None = None,
        difference: Tensor | None = None,
    ) -> tuple[Tensor, MIMState]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: h, c, d, n, s of this layer at the step before, and m of the layer below at this step, each (B,
                hidden_channels, H, W); None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.
            difference: what MIM-N reads, (B, hidden_channels, H, W): by how much the output of the layer below has
                changed since the step before, or the d of the layer below. None at the first step leaves d and n.

        Returns:
            The output H_t, and the state.

        Raises:
            TypeError, ValueError: an argument is of another shape or dtype or on another device; weights that are not
                None.
        """
        h, c, m, d, n, s = self.checked_state(x, state, weights)
        of_x, of_h, of_m = self.input(x), self.hidden(h), self.memory(m)
        t, d, n, s = self._forget(difference, c, d, n, s)
        i, _, g, o = of_x.chunk(4, dim=1)
        i_h, g_h, o_h = of_h.chunk(3, dim=1)
        c = t + (i + i_h).sigmoid() * (g + g_h).tanh()
        m = update_memory(of_x, m, self.forget_bias, of_m)
        gate = o + o_h + of_m[:, 3 * self.hidden_channels :]
        h = gate.sigmoid() * self.fusion(torch.cat([c, m], dim=1)).tanh()
        return h, MIMState(h, c, m, d, n, s)


class CausalMIMCell(_MIMBlock):
    """The MIM block on a causal LSTM, of which MIM* is made:

        i, g       = W_1 * [X_t; H_{t-1}^l]
        C_t^l      = T_t^l + sigmoid(i) tanh(g)
        i', f', g' = W_2 * [X_t; C_t^l; M_t^{l-1}]
        M_t^l      = sigmoid(f' + forget_bias) tanh(W_3 * M_t^{l-1}) + sigmoid(i') tanh(g')
        H_t^l      = tanh(W_4 * [X_t; C_t^l; M_t^l]) tanh(W_5 * [C_t^l; M_t^l])

    with T_t^l as in `MIMCell`: the forget gate of `CausalLSTMCell` becomes MIM-N and MIM-S, and C_{t-1} comes in
    through MIM-S alone.

    Submodules: `input` (in_channels -> 6 C: i, g, i', f', g', o), `hidden` (C -> 2 C: i, g), `cell`, `memory`, `output`
    and `fusion` as in `CausalLSTMCell`, `non_stationary` and `stationary` as in `MIMCell`.

    Args:
        in_channels, hidden_channels, kernel_size, layer_norm, forget_bias, bias, map_size, device, dtype: as in
            `MIMCell`.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there.
    """

    handed_on_by = "fastsam.MIMStar"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        bias: bool = True,
        map_size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = convolution_options("CausalMIMCell", kernel_size, layer_norm, bias, device, dtype)
        super().__init__(in_channels, hidden_channels, forget_bias, map_size, options)
        c = hidden_channels
        self.input = NormedConv2d(in_channels, 6 * c, **options)
        self.hidden = NormedConv2d(c, 2 * c, **options)
        self.cell = NormedConv2d(c, 4 * c, **options)
        self.memory = NormedConv2d(c, 4 * c, **options)
        self.output = NormedConv2d(c, c, **options)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None = None,
        weights: None = None,
        difference: Tensor | None = None,
    ) -> tuple[Tensor, MIMState]:
        """One step, with the arguments, results and errors of `MIMCell.forward`."""
        h, c, m, d, n, s = self.checked_state(x, state, weights)
        of_x, size = self.input(x), self.hidden_channels
        t, d, n, s = self._forget(difference, c, d, n, s)
        i, g = (of_x[:, : 2 * size] + self.hidden(h)).chunk(2, dim=1)
        c = t + i.sigmoid() * g.tanh()
        h, m = causal_output(self, of_x[:, 2 * size :], c, m)
        return h, MIMState(h, c, m, d, n, s)


class MIMForecaster(ZigzagForecaster):
    """MIM: a first layer that is an ST-LSTM, and MIM blocks above it that read how the layer below changes.

    Args:
        hidden_channels: the same for every layer, of which there are at least two.
        causal: True makes it MIM*, with causal LSTMs in the place of ST-LSTMs.
        in_channels, patch_size, embed_channels, device, dtype: of `Forecaster`.
        **cell_options: kernel_size, layer_norm, forget_bias, bias, map_size of the blocks; the first layer takes all
            but the last.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there; less than two layers, or
            layers of different sizes.
    """

    hands_on = ("memory", "difference")

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        causal: bool = False,
        patch_size: int = 1,
        embed_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            CausalMIMCell if _check.flag(type(self).__name__, "causal", causal) else MIMCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            **placement,
            **cell_options,
        )
        options = {key: value for key, value in cell_options.items() if key != "map_size"}
        below: Any = self.cells[0].in_channels
        if causal:
            self.cells[0] = CausalLSTMCell(below, self.hidden_channels[0], **placement, **options)
        else:
            options = {"bias": True, **options, "shared_input": True}
            self.cells[0] = STLSTMCell(below, self.hidden_channels[0], **placement, **options)

    def _check_sizes(self) -> None:
        super()._check_sizes()
        if len(self.hidden_channels) < 2:
            raise ValueError(
                f"{type(self).__name__}: hidden_channels must name at least two layers, an ST-LSTM and a MIM block, "
                f"got {self.hidden_channels}"
            )

    def _step(self, frame: Tensor, states: list[Any], weights: list[Any], observe: Any) -> Tensor:
        height, width = frame.shape[-2:]
        x = self.embedding(patchify(frame, self.patch_size))
        before = states[0]
        memory = memory_of_last(states)
        difference = None
        for layer, cell in enumerate(self.cells):
            state = entering_state(cell, x, states[layer], memory)
            if observe is not None:
                observe(layer, x, state)
            if layer == 0:
                x, states[0] = cell(x, state, weights[0])
                difference = None if before is None else x - before.h
            else:
                x, states[layer] = cell(x, state, weights[layer], difference)
                difference = None if before is None else states[layer].d
            memory = states[layer].m
        return unpatchify(self.output(x), self.patch_size)[..., :height, :width]
