"""PredRNN++: the causal LSTM and the gradient highway unit.

Equation numbers are those of "PredRNN++: Towards A Resolution of the Deep-in-Time Dilemma in Spatiotemporal Predictive
Learning" (Wang et al., ICML 2018).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.modules import _check
from fastsam.modules.cells import RecurrentCell
from fastsam.modules.predrnn import (
    MemoryCell,
    NormedConv2d,
    STLSTMState,
    ZigzagForecaster,
    convolution_options,
    update_memory,
)


class HighwayState(NamedTuple):
    """The state of a causal LSTM, and the map Z of the gradient highway behind it, each (B, C, H, W)."""

    h: Tensor
    c: Tensor
    m: Tensor
    z: Tensor


class CausalLSTMCell(MemoryCell):
    """The causal LSTM, equation 1, layer k:

        g, i, f    = tanh, sigmoid, sigmoid(W_1 * [X_t; H_{t-1}^k; C_{t-1}^k])
        C_t^k      = f C_{t-1}^k + i g
        g', i', f' = tanh, sigmoid, sigmoid(W_2 * [X_t; C_t^k; M_t^{k-1}])
        M_t^k      = f' tanh(W_3 * M_t^{k-1}) + i' g'
        o_t        = tanh(W_4 * [X_t; C_t^k; M_t^k])
        H_t^k      = o_t tanh(W_5 * [C_t^k; M_t^k])

    with forget_bias added inside of f and f'. The memory may come with another number of channels than it leaves.

    The published code has as many weights of convolutions, but there the output gate sees H_{t-1} too and g' does not
    see M. It convolves H_{t-1} and C_{t-1} apart, each with a norm and biases of its own: 22 C biases, and as many
    scales and shifts, in place of the 19 C here. With layer_norm that is another function: a sum of two norms is not
    the norm of the sum.

    Submodules (`NormedConv2d` all but the last): `input` (X's part of W_1, W_2 and W_4, in_channels -> 7 C: i, f, g,
    i', f', g', o), `recurrent` ([H; C]'s part of W_1, 2 C -> 3 C: i, f, g), `cell` (C_t's part of W_2 and W_4, C ->
    4 C: i', f', g', o), `memory` (M_t^{k-1}'s part of W_2, and W_3, memory_channels -> 4 C: i', f', g', W_3),
    `output` (M_t^k's part of W_4, C -> C), `fusion` (W_5, 1x1).

    Args:
        in_channels: channels of the input X.
        hidden_channels: C, channels of H, C and of the new memory.
        kernel_size: of all convolutions but W_5, odd; the map keeps its size by zero padding.
        memory_channels: channels of the memory that comes in; None for hidden_channels.
        layer_norm: normalise the output of every convolution but W_5 with a GroupNorm(1, channels).
        forget_bias: added to f and f'.
        bias: whether the convolutions have biases.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    handed_on_by = "fastsam.PredRNNPlusPlus"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        memory_channels: int | None = None,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, hidden_channels, kernel_size, memory_channels=memory_channels, forget_bias=forget_bias
        )
        c = hidden_channels
        options = convolution_options("CausalLSTMCell", kernel_size, layer_norm, bias, device, dtype)
        self.input = NormedConv2d(in_channels, 7 * c, **options)
        self.recurrent = NormedConv2d(2 * c, 3 * c, **options)
        self.cell = NormedConv2d(c, 4 * c, **options)
        self.memory = NormedConv2d(self.memory_channels, 4 * c, **options)
        self.output = NormedConv2d(c, c, **options)
        self.fusion = nn.Conv2d(2 * c, c, 1, bias=bias, **options["placement"])

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, STLSTMState]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: h and c of this layer at the step before, each (B, hidden_channels, H, W), and m of the layer below
                at this step (the first layer: of the last one at the step before), (B, memory_channels, H, W); None
                starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output H_t, and the state (H_t, C_t, M_t).

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device; weights
                that are not None.
        """
        h, c, m = self.checked_state(x, state, weights)
        of_x, size = self.input(x), self.hidden_channels
        recurrent = self.recurrent(torch.cat([h, c], dim=1))
        c = update_memory(of_x[:, : 4 * size], c, self.forget_bias, recurrent)
        h, m = causal_output(self, of_x[:, 3 * size :], c, m)
        return h, STLSTMState(h, c, m)


def causal_output(cell: Any, of_x: Tensor, c: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """H_t and M_t of a causal LSTM from C_t, M_t^{k-1} and X's part of i', f', g', o.

    The output gate is plain PyTorch: `norm_gate` was no faster for this tanh, and slower in its eager form.
    """
    of_c, of_m = cell.cell(c), cell.memory(m)
    third = 3 * cell.hidden_channels
    m = update_memory(of_x, of_m[:, third:].tanh(), cell.forget_bias, of_c + of_m)
    gate = of_x[:, third:] + of_c[:, third:] + cell.output(m)
    return gate.tanh() * cell.fusion(torch.cat([c, m], dim=1)).tanh(), m


class GradientHighwayUnit(nn.Module):
    """The gradient highway unit (GHU), equation 2:

        P_t = tanh(W_px * X_t + W_pz * Z_{t-1})
        S_t = sigmoid(W_sx * X_t + W_sz * Z_{t-1})
        Z_t = S_t P_t + (1 - S_t) Z_{t-1}

    Submodule: `gates`, all four convolutions as one of [X; Z] (2 channels -> 2 channels: P, S). The published code has
    as many weights of convolutions, but convolves X and Z apart, each with a norm and biases of its own: twice as many
    biases, scales and shifts, and with layer_norm another function, a sum of two norms in place of the norm of the sum.

    Args:
        channels: of X and Z.
        kernel_size: odd.
        layer_norm: normalise the convolution's output with a GroupNorm(1, 2 channels).
        bias: whether the convolution has a bias.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GradientHighwayUnit"
        self.channels = _check.positive_int(name, "channels", channels)
        self.gates = NormedConv2d(
            2 * channels,
            2 * channels,
            _check.odd_kernel(name, "kernel_size", kernel_size),
            layer_norm=_check.flag(name, "layer_norm", layer_norm),
            bias=_check.flag(name, "bias", bias),
            placement=_check.placement(name, device, dtype),
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Z_t from X_t and Z_{t-1}, each (B, channels, H, W).

        The update is plain PyTorch: `memory_gates` has it, but with an output gate, and was slower for that.

        Raises:
            TypeError, ValueError: x or z is of another shape or dtype or on another device.
        """
        _check.tensor("GradientHighwayUnit", "x", x, "B", self.channels, "H", "W")
        _check.tensor("GradientHighwayUnit", "z", z, *x.shape)
        for name, value in (("x", x), ("z", z)):
            _check.same_kind("GradientHighwayUnit", name, value, self.gates.weight)
        p, s = self.gates(torch.cat([x, z], dim=1)).chunk(2, dim=1)
        return s.sigmoid() * (p.tanh() - z) + z


class HighwayCell(RecurrentCell):
    """A causal LSTM with a gradient highway behind it: its output is Z_t, made of its H_t.

    Submodules: `cell` (`CausalLSTMCell`) and `highway` (`GradientHighwayUnit`).
    """

    def __init__(self, cell: CausalLSTMCell, highway: GradientHighwayUnit) -> None:
        super().__init__()
        self.cell = cell
        self.highway = highway

    def start(self, x: Tensor) -> HighwayState:
        """The state before the first step: zeros, for an input x (B, any channels, H, W)."""
        h, c, m = self.cell.start(x)
        return HighwayState(h, c, m, torch.zeros_like(h))

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, HighwayState]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: the maps h, c, m of the causal LSTM, and z of the step before; None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output Z_t, and the state (H_t, C_t, M_t, Z_t).

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device; weights
                that are not None.
        """
        if state is not None:
            _check.state_tuple("HighwayCell", state, HighwayState._fields)
        h, (_, c, m) = self.cell(x, None if state is None else state[:3], weights)
        z = self.highway(h, torch.zeros_like(h) if state is None else state[3])
        return z, HighwayState(h, c, m, z)


class CausalForecaster(ZigzagForecaster):
    """A stack of `CausalLSTMCell` with a gradient highway between the first layer and the second, as PredRNN++ has.

    Args:
        hidden_channels: of the layers, which may differ.
        highway: False leaves out the gradient highway.
        in_channels, patch_size, embed_channels, device, dtype: of `Forecaster`.
        **cell_options: kernel_size, layer_norm, forget_bias, bias of the cells.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (128, 64, 64, 64),
        *,
        highway: bool = True,
        patch_size: int = 1,
        embed_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        _check.flag(type(self).__name__, "highway", highway)
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            CausalLSTMCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            **placement,
            **cell_options,
        )
        for layer, size in enumerate(self.hidden_channels):
            below = self.hidden_channels[layer - 1]  # the last one for the first layer
            if below != size:
                inputs: Any = self.cells[layer].in_channels
                self.cells[layer] = CausalLSTMCell(inputs, size, memory_channels=below, **placement, **cell_options)
        if highway:
            options = {key: cell_options[key] for key in ("kernel_size", "layer_norm", "bias") if key in cell_options}
            unit = GradientHighwayUnit(self.hidden_channels[0], **options, **placement)
            self.cells[0] = HighwayCell(self.cells[0], unit)  # type: ignore[arg-type]

    def _check_sizes(self) -> None:
        """Any will do: a causal LSTM convolves the memory that comes to it."""
