"""SA-ConvLSTM cells as other people published them, and models around them, written naively.

Every class has the published names of parameters and attributes, the published signature and order of the state, and
computes what the published cell does; nothing here calls fastsam.
"""

from collections.abc import Sequence
from typing import Any

import torch
from published_sams import WithConvolutionsAfterAttention, WithLayersK2V2, WithLayersQhVm, WithStackedProjections
from torch import Tensor, nn


def lstm(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h and c from the gates before their activations."""
    new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(new), new


def normalised_convolution(inputs: int, gates: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, gates, 3, padding=1, bias=bias), nn.GroupNorm(gates, gates))


class CellOnHCM(nn.Module):
    """hyona-yu/SA-convlstm and MinNamgung/sa_convlstm (`SA_Convlstm_cell`)."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.channels = hidden_dim
        self.attention_layer = WithLayersK2V2(hidden_dim, 3)
        self.conv2d = normalised_convolution(input_dim + hidden_dim, 4 * hidden_dim)

    def forward(self, x: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, c, m = hidden
        i, f, o, g = self.conv2d(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        h, c = lstm(i, f, g, o, c)
        h, m = self.attention_layer(h, m)
        return h, (h, c, m)


class CellWithGatesInAnotherOrder(CellOnHCM):
    """The parameters of the published cell, but the gates in the order i, f, g, o."""

    def forward(self, x: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, c, m = hidden
        h, c = lstm(*self.conv2d(torch.cat([x, h], dim=1)).chunk(4, dim=1), c)
        h, m = self.attention_layer(h, m)
        return h, (h, c, m)


class CellToHCM(nn.Module):
    """CaiCandong/sa_convLSTM (`SAConvLSTMCell`)."""

    def __init__(self, input_dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.channels = hidden_dim
        self.attention_layer = WithLayersK2V2(hidden_dim, 3)
        self.conv = normalised_convolution(input_dim + hidden_dim, 4 * hidden_dim, bias)

    def forward(self, input_tensor: Tensor, cur_state: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        h, c, m = cur_state
        i, f, o, g = self.conv(torch.cat([input_tensor, h], dim=1)).chunk(4, dim=1)
        h, c = lstm(i, f, g, o, c)
        h, m = self.attention_layer(h, m)
        return h, c, m


class CellOnCHM(nn.Module):
    """johnjaejunlee95/SA_ConvLSTM (`SA_Convlstm_cell`)."""

    def __init__(self, input_dim: int, hid_dim: int) -> None:
        super().__init__()
        self.channels = hid_dim
        self.attention_layer = WithLayersQhVm(hid_dim, hid_dim)
        self.conv2d = normalised_convolution(input_dim + hid_dim, 4 * hid_dim)

    def forward(self, x: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        c, h, m = hidden
        h, c = lstm(*self.conv2d(torch.cat([x, h], dim=1)).chunk(4, dim=1), c)
        h, m = self.attention_layer(h, m)
        return h, (c, h, m)


class CellWithItsState(nn.Module):
    """jerrywn121/TianChi_AIEarth (`SAConvLSTMCell`), which keeps its state as attributes."""

    def __init__(self, input_dim: int, hidden_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.channels = hidden_dim
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=kernel_size // 2)
        self.sa = WithStackedProjections(hidden_dim, 3, kernel_size)

    def forward(self, inputs: Tensor, first_step: bool = False) -> Tensor:
        if first_step:
            zeros = inputs.new_zeros(inputs.shape[0], self.channels, *inputs.shape[2:])
            self.hidden_state, self.cell_state, self.memory_state = zeros, zeros, zeros
        i, f, o, g = self.conv(torch.cat([inputs, self.hidden_state], dim=1)).chunk(4, dim=1)
        h, self.cell_state = lstm(i, f, g, o, self.cell_state)
        self.hidden_state, self.memory_state = self.sa(h, self.memory_state)
        return self.hidden_state


class PeepholeConvLSTM(nn.Module):
    """The ConvLSTM of tsugumi-sys/SA-ConvLSTM-Pytorch, whose peepholes are no parameters where they went to CUDA."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        frame_size: tuple[int, int] = (5, 6),
        *,
        padding: int | str = "same",
        activation: Any = None,
        parameters: bool = True,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.channels = out_channels
        self.activation = nn.Tanh() if activation is None else activation
        self.conv = nn.Conv2d(in_channels + out_channels, 4 * out_channels, 3, padding=padding, device=device)
        for name in ("W_ci", "W_cf", "W_co"):
            peephole = nn.Parameter(torch.randn(out_channels, *frame_size)).to(device)
            setattr(self, name, peephole if parameters else peephole.clone())

    def recur(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        kept = torch.sigmoid(f + self.W_cf * c) * c
        c = kept + torch.sigmoid(i + self.W_ci * c) * self.activation(g)
        return torch.sigmoid(o + self.W_co * c) * self.activation(c), c


class CellWithPeepholes(PeepholeConvLSTM):
    """tsugumi-sys/SA-ConvLSTM-Pytorch (`SAMConvLSTMCell`)."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **options: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **options)
        self.attention_memory = WithConvolutionsAfterAttention(out_channels, 3)

    def forward(self, X: Tensor, prev_h: Tensor, prev_cell: Tensor, prev_memory: Tensor) -> tuple[Tensor, ...]:
        h, c = self.recur(X, prev_h, prev_cell)
        h, m, attention_h = self.attention_memory(h, prev_memory)
        return h, c, m, attention_h


class CellAroundPeepholes(nn.Module):
    """`SAMConvLSTMCell` of earlier versions of tsugumi-sys/SA-ConvLSTM-Pytorch."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.channels = out_channels
        self.convlstm_cell = PeepholeConvLSTM(in_channels, out_channels, **options)
        self.attention_memory = WithConvolutionsAfterAttention(out_channels, 3)

    def forward(self, X: Tensor, prev_h: Tensor, prev_cell: Tensor, prev_memory: Tensor) -> tuple[Tensor, ...]:
        h, c = self.convlstm_cell.recur(X, prev_h, prev_cell)
        h, m, attention_h = self.attention_memory(h, prev_memory)
        return h, c, m, attention_h


def step(cell: nn.Module, x: Tensor, state: Sequence[Tensor] | None) -> list[Tensor]:
    """h, c and m after one step of any of these cells, from those before it; None are zeros."""
    h, c, m = [x.new_zeros(x.shape[0], cell.channels, *x.shape[2:])] * 3 if state is None else state
    if isinstance(cell, CellWithItsState):
        if state is not None:
            cell.hidden_state, cell.cell_state, cell.memory_state = h, c, m
        return [cell(x, first_step=state is None), cell.cell_state, cell.memory_state]
    if isinstance(cell, CellToHCM):
        return list(cell(x, [h, c, m]))
    if isinstance(cell, CellOnCHM):
        _, (c, h, m) = cell(x, (c, h, m))
        return [h, c, m]
    if isinstance(cell, CellOnHCM):
        return list(cell(x, (h, c, m))[1])
    return list(cell(x, h, c, m)[:3])


class StackOfCells(nn.Module):
    """A model from frames (B, T, C, H, W) to the last layer's outputs, with its cells in a list of the given name."""

    def __init__(self, name: str, cells: list[nn.Module]) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.ModuleList(cells))

    def forward(self, frames: Tensor) -> Tensor:
        states: list[Any] = [None] * len(getattr(self, self.name))
        outputs = []
        for x in frames.unbind(1):
            for layer, cell in enumerate(getattr(self, self.name)):
                states[layer] = step(cell, x, states[layer])
                x = states[layer][0]
            outputs.append(x)
        return torch.stack(outputs, dim=1)
