"""PredRNN: the spatiotemporal LSTM, and the forecaster whose memory zigzags through the layers.

Equations are those of "PredRNN: Recurrent Neural Networks for Predictive Learning using Spatiotemporal LSTMs" (Wang et
al., NIPS 2017), section 3.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsam.modules import _check
from fastsam.modules.cells import RecurrentCell
from fastsam.modules.forecaster import Forecaster, inside_blocks, patchify, unpatchify
from fastsam.ops import lstm_gates


class STLSTMState(NamedTuple):
    """Hidden state, cell state and spatiotemporal memory, each (B, C, H, W)."""

    h: Tensor
    c: Tensor
    m: Tensor


class NormedConv2d(nn.Conv2d):
    """A convolution that keeps the size of a map, and the layer norm of its output, both in one module.

    The norm is GroupNorm(1, out_channels), over the channels and positions of a sample together with one scale and
    shift a channel, or the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        layer_norm: bool,
        bias: bool,
        placement: dict[str, Any],
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, **placement)
        self.norm = nn.GroupNorm(1, out_channels, **placement) if layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        y: Tensor = self.norm(super().forward(x))
        return y


def convolution_options(
    owner: str, kernel_size: int, layer_norm: Any, bias: Any, device: Any, dtype: Any
) -> dict[str, Any]:
    """The keyword arguments that the convolutions of a cell have in common, checked but for kernel_size."""
    return {
        "kernel_size": kernel_size,
        "layer_norm": _check.flag(owner, "layer_norm", layer_norm),
        "bias": _check.flag(owner, "bias", bias),
        "placement": _check.placement(owner, device, dtype),
    }


class MemoryCell(RecurrentCell):
    """A cell whose state holds a spatiotemporal memory m, which `ZigzagForecaster` hands on from layer to layer.

    A subclass sets `state_type`, a NamedTuple of maps with the fields h and m, and `input`, the convolution of x. It
    may set `from_below`, what it reads of the layer below beside its output, and `handed_on_by`, the models that hand
    this to it, for error messages.

    Args:
        in_channels: channels of the input X.
        hidden_channels: channels of H and of the other maps of the state.
        kernel_size: of the convolutions, odd; the map keeps its size by zero padding.
        memory_channels: channels of the memory that comes in, which are the hidden_channels of the layer below; None
            for as many as hidden_channels.
        forget_bias: added to the forget gates.
    """

    state_type: type[Any] = STLSTMState
    from_below: ClassVar[tuple[str, ...]] = ("memory",)
    handed_on_by: ClassVar[str] = "fastsam.modules.predrnn.ZigzagForecaster"
    input: nn.Conv2d | nn.Conv3d

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int,
        *,
        memory_channels: int | None = None,
        forget_bias: float,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = _check.positive_int(name, "in_channels", in_channels)
        self.hidden_channels = _check.positive_int(name, "hidden_channels", hidden_channels)
        memory_channels = hidden_channels if memory_channels is None else memory_channels
        self.memory_channels = _check.positive_int(name, "memory_channels", memory_channels)
        self.kernel_size = _check.odd_kernel(name, "kernel_size", kernel_size)
        self.forget_bias = _check.real_number(name, "forget_bias", forget_bias)

    def extra_repr(self) -> str:
        return f"forget_bias={self.forget_bias}"

    def start(self, x: Tensor) -> Any:
        """The state before the first step: zeros, for an input x (B, any channels, ...)."""
        zeros = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[2:])
        memory = x.new_zeros(x.shape[0], self.memory_channels, *x.shape[2:])
        return self.state_type(*(memory if field == "m" else zeros for field in self.state_type._fields))

    def checked_state(self, x: Any, state: Any, weights: Any) -> tuple[Tensor, ...]:
        """The maps of the state to start from, after the checks of all inputs of `forward`."""
        name, weight = type(self).__name__, self.input.weight
        _check.no_weights(name, weights)
        _check.tensor(name, "x", x, "B", self.in_channels, *"DHW"[5 - weight.ndim :])
        _check.same_kind(name, "x", x, weight)
        if state is None:
            return tuple(self.start(x))
        shapes = {field: (x.shape[0], *self.state_shape(field, x)) for field in self.state_type._fields}
        return _check.state_maps(name, state, shapes, weight)

    def state_shape(self, field: str, x: Tensor) -> tuple[int | str, ...]:
        """The shape of a map of the state without its batch; a letter stands for any size."""
        return (self.memory_channels if field == "m" else self.hidden_channels, *x.shape[2:])


def update_memory(gates: Tensor, memory: Tensor, forget_bias: float, recurrent: Tensor | None = None) -> Tensor:
    """sigmoid(f + forget_bias) memory + sigmoid(i) tanh(g), with i, f, g, _ = gates + recurrent.

    The fused `lstm_gates`, whose output gate has nothing to do here: the output gates of these cells see the new
    memories. Hence the fourth quarter of the gates, which may be anything finite: what stands next to i, f, g. Those
    output gates are plain PyTorch: `norm_gate` makes the same, but computes its activation again in the backward pass,
    and was slower for sigmoids.

    Args:
        gates, recurrent: (B, 4 C, H, W); recurrent may have 3 C channels.
        memory: (B, C, H, W).
        forget_bias: added to f.
    """
    missing = 0 if recurrent is None else gates.shape[1] - recurrent.shape[1]
    if recurrent is not None and missing:
        recurrent = F.pad(recurrent, (0, 0, 0, 0, 0, missing))
    return lstm_gates(gates, memory, forget_bias, recurrent=recurrent)[1]


class STLSTMCell(MemoryCell):
    """The spatiotemporal LSTM (ST-LSTM) of PredRNN, layer l:

        i, f, g    = W_x * X_t + W_h * H_{t-1}^l
        C_t^l      = sigmoid(f + forget_bias) C_{t-1}^l + sigmoid(i) tanh(g)
        i', f', g' = W'_x * X_t + W_m * M_t^{l-1}
        M_t^l      = sigmoid(f' + forget_bias) M_t^{l-1} + sigmoid(i') tanh(g')
        o_t        = sigmoid(W_xo * X_t + W_ho * H_{t-1}^l + W_o * [C_t^l; M_t^l])
        H_t^l      = o_t tanh(W_1x1 * [C_t^l; M_t^l])

    with X_t the output of the layer below and M_t^{l-1} its memory; M_t^0 is the memory of the last layer at the step
    before. The forget bias and the layer norms are not in the equations but in the published code.

    With shared_input it is the form that the published TensorFlow code of MIM has for its first layer and for PredRNN:
    W'_x = W_x, and the output gate sees the memory before its update, o_t = sigmoid(W_xo * X_t + W_ho * H_{t-1}^l +
    W_mo * M_t^{l-1}). Parameter counts of PredRNN in the papers' tables are those of this form.

    Submodules (`NormedConv2d` all but the last): `input` (in_channels -> 7 C: i, f, g, i', f', g', o), `hidden`
    (C -> 4 C: i, f, g, o), `memory` (C -> 3 C: i', f', g'), `output` (W_o, 2 C -> C), `fusion` (W_1x1). With
    shared_input `input` and `memory` have 4 C channels, i, f, g, o, and `output` is None.

    Args:
        in_channels: channels of the input X.
        hidden_channels: C, channels of H, C and M.
        kernel_size: of the convolutions, odd; the map keeps its size by zero padding.
        layer_norm: normalise the output of every convolution but W_1x1 with a GroupNorm(1, channels).
        forget_bias: added to f and f'.
        bias: whether the convolutions have biases; the authors' PyTorch code has none, their TensorFlow code has them.
        shared_input: see above.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    handed_on_by = "fastsam.PredRNN, or fastsam.TransplantPredRNN for one with CE and SE"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        bias: bool = False,
        shared_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size, forget_bias=forget_bias)
        self.shared_input = _check.flag("STLSTMCell", "shared_input", shared_input)
        c = hidden_channels
        options = convolution_options("STLSTMCell", kernel_size, layer_norm, bias, device, dtype)
        self.input = NormedConv2d(in_channels, 4 * c if shared_input else 7 * c, **options)
        self.hidden = NormedConv2d(c, 4 * c, **options)
        self.memory = NormedConv2d(c, 4 * c if shared_input else 3 * c, **options)
        self.output = None if shared_input else NormedConv2d(2 * c, c, **options)
        self.fusion = nn.Conv2d(2 * c, c, 1, bias=bias, **options["placement"])

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, STLSTMState]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: h and c of this layer at the step before, and m of the layer below at this step (the first layer: of
                the last one at the step before), each (B, hidden_channels, H, W); None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output H_t, and the state (H_t, C_t, M_t).

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device; weights
                that are not None.
        """
        h, c, m = self.checked_state(x, state, weights)
        of_x, of_h, of_m = self.input(x), self.hidden(h), self.memory(m)
        third = 3 * self.hidden_channels
        c = update_memory(of_x[:, : third + self.hidden_channels], c, self.forget_bias, of_h)
        m = update_memory(of_x[:, -third - self.hidden_channels :], m, self.forget_bias, of_m)
        memories = torch.cat([c, m], dim=1)
        late = of_m[:, third:] if self.output is None else self.output(memories)
        gate = of_x[:, -self.hidden_channels :] + of_h[:, third:] + late
        h = gate.sigmoid() * self.fusion(memories).tanh()
        return h, STLSTMState(h, c, m)


class ZigzagForecaster(Forecaster):
    """A `Forecaster` whose memory goes up through the layers, and from the last one to the first of the next step.

    Args:
        cell: a subclass of `MemoryCell`, or of `CellWithBlocks` with such a cell inside.
        hidden_channels: the same for every layer, since the layers share the memory.
        in_channels, patch_size, embed_channels, device, dtype, **cell_options: as in `Forecaster`.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there; layers of different sizes; a
            cell that does not read the memory of the layer below, or reads more.
    """

    hands_on: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(
        self,
        cell: type[RecurrentCell],
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 1,
        embed_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        super().__init__(
            cell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            device=device,
            dtype=dtype,
            **cell_options,
        )
        self._check_sizes()

    def _check_sizes(self) -> None:
        if len(set(self.hidden_channels)) > 1:
            raise ValueError(
                f"{type(self).__name__}: hidden_channels must be the same for all layers, which share a memory, "
                f"got {self.hidden_channels}"
            )

    def _step(self, frame: Tensor, states: list[Any], weights: list[Any], observe: Any) -> Tensor:
        height, width = frame.shape[-2:]
        x = self.embedding(patchify(frame, self.patch_size))
        memory = memory_of_last(states)
        for layer, cell in enumerate(self.cells):
            state = entering_state(cell, x, states[layer], memory)
            if observe is not None:
                observe(layer, x, state)
            x, states[layer] = cell(x, state, weights[layer])
            memory = states[layer].m
        return unpatchify(self.output(x), self.patch_size)[..., :height, :width]


def memory_of_last(states: Sequence[Any]) -> Tensor | None:
    """The memory that the last layer left at the step before; None at the first step."""
    return None if states[-1] is None else states[-1].m


def entering_state(cell: nn.Module, x: Tensor, state: Any, memory: Tensor | None) -> Any:
    """The state that a layer starts a step from: its own of the step before, with the memory that comes to it."""
    if state is None:
        state = inside_blocks(cell).start(x)
    return state if memory is None else state._replace(m=memory)
