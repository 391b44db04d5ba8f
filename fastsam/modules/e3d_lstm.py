"""E3D-LSTM: the eidetic 3D LSTM, whose cell state recalls what it has been, and its forecaster.

The equations are those of "Eidetic 3D LSTM: A Model for Video Prediction and Beyond" (Wang et al., ICLR 2019), section
3.3.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsam.modules import _check
from fastsam.modules.cells import RecurrentCell
from fastsam.modules.predrnn import MemoryCell, ZigzagForecaster, convolution_options, update_memory


class E3DLSTMState(NamedTuple):
    """Hidden state, cell state and spatiotemporal memory, each (B, C, D, H, W), D the depth of the window of frames.

    history: the cell states of all steps before, one after the other on depth, (B, C, steps D, H, W). It begins with
    the zeros that the cell state starts from.
    """

    h: Tensor
    c: Tensor
    m: Tensor
    history: Tensor


class WindowState(NamedTuple):
    """The state of an E3D-LSTM, and the inputs of the last D - 1 steps (B, in_channels, D - 1, H, W)."""

    h: Tensor
    c: Tensor
    m: Tensor
    history: Tensor
    frames: Tensor


class NormedConv3d(nn.Conv3d):
    """A convolution that keeps the size of a volume, and the layer norm of its output: GroupNorm(1, C) or the identity.

    An even depth of the kernel pads one plane more behind the volume than before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        kernel_depth: int,
        *,
        layer_norm: bool,
        bias: bool,
        placement: dict[str, Any],
    ) -> None:
        kernel, padding = (kernel_depth, kernel_size, kernel_size), (0, kernel_size // 2, kernel_size // 2)
        super().__init__(in_channels, out_channels, kernel, padding=padding, bias=bias, **placement)
        self.norm = nn.GroupNorm(1, out_channels, **placement) if layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""
        depth = self.kernel_size[0]
        y: Tensor = self.norm(super().forward(F.pad(x, (0, 0, 0, 0, (depth - 1) // 2, depth // 2))))
        return y


class E3DLSTMCell(MemoryCell):
    """The eidetic 3D LSTM (E3D-LSTM), layer k, on volumes of D frames:

        R_t, I_t, G_t = sigmoid, sigmoid, tanh(W_x * X_t + W_h * H_{t-1}^k)
        C_t^k   = I_t G_t + LayerNorm(C_{t-1}^k + recall(R_t, C_{<t}^k))
        recall(R, C) = softmax(R C^T) C, over all positions of all volumes in C
        I', F', G' = sigmoid, sigmoid, tanh(W'_x * X_t + W_m * M_t^{k-1})
        M_t^k   = I' G' + F' tanh(W_mm * M_t^{k-1})
        O_t     = sigmoid(W_xo * X_t + W_ho * H_{t-1}^k + W_o * [C_t^k; M_t^k])
        H_t^k   = O_t tanh(W_1x1x1 * [C_t^k; M_t^k])

    with forget_bias added inside of F'. tanh(W_mm * M) is the published code's, and in the published parameter count;
    the paper's text has M_t^{k-1} there. That code has a tanh inside of O_t too, and hands on the memory as it came.
    C_{<t} holds the zeros before the first step as well, as in that code.

    Submodules: `input` (in_channels -> 7 C: i, g, r, i', f', g', o), `hidden` (C -> 4 C: i, g, r, o), `memory` (C ->
    4 C: i', f', g', W_mm), all `NormedConv3d`; `state_norm` (GroupNorm(1, C)); `output` (W_o), `fusion` (W_1x1x1). The
    attention is PyTorch's scaled_dot_product_attention without scale, which keeps no matrix of scores.

    Args:
        in_channels: channels of the input X.
        hidden_channels: C, channels of the maps of the state.
        kernel_size: of the convolutions along height and width, odd.
        kernel_depth: of the convolutions along the D frames.
        history: cell states that are recalled, the last ones; None for all.
        layer_norm: normalise the outputs of `input`, `hidden` and `memory` with a GroupNorm(1, channels).
        forget_bias: added to f'.
        bias: whether the convolutions have biases.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    state_type = E3DLSTMState
    handed_on_by = "fastsam.E3DLSTM"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        kernel_depth: int = 2,
        history: int | None = None,
        layer_norm: bool = True,
        forget_bias: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "E3DLSTMCell"
        super().__init__(in_channels, hidden_channels, kernel_size, forget_bias=forget_bias)
        self.history = None if history is None else _check.positive_int(name, "history", history)
        c = hidden_channels
        options = convolution_options(name, kernel_size, layer_norm, bias, device, dtype)
        options["kernel_depth"] = _check.positive_int(name, "kernel_depth", kernel_depth)
        self.input = NormedConv3d(in_channels, 7 * c, **options)
        self.hidden = NormedConv3d(c, 4 * c, **options)
        self.memory = NormedConv3d(c, 4 * c, **options)
        self.state_norm = nn.GroupNorm(1, c, **options["placement"])
        self.output = NormedConv3d(2 * c, c, **{**options, "layer_norm": False})
        self.fusion = nn.Conv3d(2 * c, c, 1, bias=bias, **options["placement"])

    def state_shape(self, field: str, x: Tensor) -> tuple[int | str, ...]:
        depth, height, width = x.shape[2:]
        return (self.hidden_channels, "steps*D" if field == "history" else depth, height, width)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, E3DLSTMState]:
        """One step.

        Args:
            x: input (B, in_channels, D, H, W).
            state: h and c of this layer at the step before and m of the layer below at this step (the first layer: of
                the last one at the step before), each (B, hidden_channels, D, H, W), and the history of c, (B,
                hidden_channels, any number of planes, H, W); None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output H_t, and the state with C_t at the end of the history.

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device; weights
                that are not None.
        """
        h, c, m, history = self.checked_state(x, state, weights)
        of_x, of_h, of_m = self.input(x), self.hidden(h), self.memory(m)
        third = 3 * self.hidden_channels
        i, g, r = (of_x[:, :third] + of_h[:, :third]).chunk(3, dim=1)
        c = i.sigmoid() * g.tanh() + self.state_norm(c + recall(r.sigmoid(), history))
        m = self._new_memory(of_x[:, third:], of_m)
        memories = torch.cat([c, m], dim=1)
        gate = of_x[:, 2 * third :] + of_h[:, third:] + self.output(memories)
        h = gate.sigmoid() * self.fusion(memories).tanh()
        planes = 0 if self.history is None else -self.history * x.shape[2]
        return h, E3DLSTMState(h, c, m, torch.cat([history, c], dim=2)[:, :, planes:])

    def _new_memory(self, of_x: Tensor, of_m: Tensor) -> Tensor:
        """M_t, the frames of a volume one below the other in the maps that the operator wants."""
        old = of_m[:, 3 * self.hidden_channels :].tanh()
        new = update_memory(of_x.flatten(2, 3), old.flatten(2, 3), self.forget_bias, of_m.flatten(2, 3))
        return new.view_as(old)


def recall(query: Tensor, history: Tensor) -> Tensor:
    """softmax(R C^T) C over the positions of a history (B, C, planes, H, W), for a query R (B, C, D, H, W)."""
    tokens, memories = (volume.flatten(2).transpose(1, 2).unsqueeze(1) for volume in (query, history))
    recalled = F.scaled_dot_product_attention(tokens, memories, memories, scale=1.0)
    return recalled.squeeze(1).transpose(1, 2).reshape(query.shape)


class WindowCell(RecurrentCell):
    """A first layer that reads maps: its E3D-LSTM gets the volume of the last D of them, zeros before the first.

    Submodule: `cell` (`E3DLSTMCell`).
    """

    def __init__(self, cell: E3DLSTMCell, depth: int) -> None:
        super().__init__()
        self.cell = cell
        self.depth = _check.positive_int("WindowCell", "depth", depth)

    def extra_repr(self) -> str:
        return f"depth={self.depth}"

    def start(self, x: Tensor) -> WindowState:
        """The state before the first step: zeros, for an input x (B, any channels, H, W)."""
        batch, _, height, width = x.shape
        frames = x.new_zeros(batch, self.cell.in_channels, self.depth, height, width)
        return WindowState._make([*self.cell.start(frames), frames[:, :, 1:]])

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, WindowState]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: the state of the E3D-LSTM, and the inputs of the steps before; None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output H_t (B, hidden_channels, D, H, W), and the state.

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device; weights
                that are not None.
        """
        _check.tensor("WindowCell", "x", x, "B", self.cell.in_channels, "H", "W")
        state = self.start(x) if state is None else state
        _check.state_tuple("WindowCell", state, WindowState._fields)
        *inner, frames = state
        batch, channels, height, width = x.shape
        _check.tensor("WindowCell", "the state's frames", frames, batch, channels, self.depth - 1, height, width)
        volume = torch.cat([frames, x.unsqueeze(2)], dim=2)
        h, new = self.cell(volume, inner, weights)
        return h, WindowState._make([*new, volume[:, :, 1:]])


class VolumeOutput(nn.Conv2d):
    """The convolution that makes a map of patches of a whole volume, (B, C, D, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, channels: int, depth: int, out_channels: int, placement: dict[str, Any]) -> None:
        super().__init__(channels * depth, out_channels, 1, **placement)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2))


class E3DForecaster(ZigzagForecaster):
    """A stack of `E3DLSTMCell`, the first of which reads the last `depth` maps of patches at every step.

    Args:
        hidden_channels: the same for every layer.
        depth: D, frames of a window.
        in_channels, patch_size, embed_channels, device, dtype: of `Forecaster`.
        **cell_options: kernel_size, kernel_depth, history, layer_norm, forget_bias, bias of the cells.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there; layers of different sizes.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        depth: int = 2,
        patch_size: int = 1,
        embed_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            E3DLSTMCell,
            in_channels,
            hidden_channels,
            patch_size=patch_size,
            embed_channels=embed_channels,
            **placement,
            **cell_options,
        )
        self.cells[0] = WindowCell(self.cells[0], depth)  # type: ignore[arg-type]
        self.output = VolumeOutput(self.hidden_channels[-1], depth, self.output.out_channels, placement)
