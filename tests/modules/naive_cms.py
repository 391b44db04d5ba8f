"""CMS-LSTM written naively from the published facts, with the published names. Nothing here calls fastsam.

Every window's attention matrix is materialised, one window after the other; maps are of (height, width), not only
square.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def normalised_convolution(
    inputs: int, outputs: int, kernel: int, size: tuple[int, int], bias: bool = False
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias), nn.LayerNorm([outputs, *size])
    )


class Stage(nn.Module):
    """The attention of one scale on the maps of h and c side by side, (B, C, H, 2 W), with its shortcut."""

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.f_key, self.f_query, self.f_value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, both: Tensor) -> Tensor:
        result = both.clone()
        height, width = both.shape[2], both.shape[3] // 2
        rows, columns = height // self.scale, width // self.scale
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                window = (slice(None), slice(None), slice(top, top + rows))
                of_h = (*window, slice(left, left + columns))
                of_c = (*window, slice(width + left, width + left + columns))
                tokens = torch.cat([both[of_h].flatten(2), both[of_c].flatten(2)], dim=2).unsqueeze(3)
                query, key, value = (f(tokens).squeeze(3) for f in (self.f_query, self.f_key, self.f_value))
                alpha = torch.softmax(torch.einsum("bci,bcj->bij", query, key), dim=2)
                z_h, z_c = torch.einsum("bij,bcj->bci", alpha, value).chunk(2, dim=2)
                result[of_h] += z_h.unflatten(2, (rows, columns))
                result[of_c] += z_c.unflatten(2, (rows, columns))
        return result


class SE(nn.Module):
    def __init__(self, channels: int, size: tuple[int, int], scales: Sequence[int]) -> None:
        super().__init__()
        height, width = size
        self.stages = nn.ModuleList(Stage(channels, scale) for scale in scales)
        self.conv_bn = normalised_convolution(len(scales) * channels, channels, 5, (height, 2 * width), bias=True)
        self.w_z = nn.Conv2d(2 * channels, channels, 1)
        self.w_h2h = normalised_convolution(channels, 3 * channels, 5, size)
        self.w_z2h = normalised_convolution(channels, 3 * channels, 5, size)
        self.norm_mem = nn.LayerNorm([channels, *size])

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([h, c], dim=3)
        a = self.conv_bn(torch.cat([stage(both) for stage in self.stages], dim=1))
        width = h.shape[3]
        z = self.w_z(torch.cat([a[..., :width], a[..., width:]], dim=1))
        i, g, o = (self.w_z2h(z) + self.w_h2h(h)).chunk(3, dim=1)
        c = self.norm_mem((1 - torch.sigmoid(i)) * c + torch.sigmoid(i) * torch.tanh(g))
        return torch.sigmoid(o) * c, c


class Cell(nn.Module):
    def __init__(self, channels: int, kernel: int, size: tuple[int, int], scales: Sequence[int]) -> None:
        super().__init__()
        self.norm_cell = nn.LayerNorm([channels, *size])
        self.conv_i2h = normalised_convolution(channels, 4 * channels, kernel, size)
        self.conv_h2h = normalised_convolution(channels, 4 * channels, kernel, size)
        self.convQ = normalised_convolution(channels, channels, kernel, size)
        self.convR = normalised_convolution(channels, channels, kernel, size)
        self.SEBlock = SE(channels, size, scales)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = 2 * torch.sigmoid(self.convQ(h)) * x
        h = 2 * torch.sigmoid(self.convR(x)) * h
        x = 2 * torch.sigmoid(self.convQ(h)) * x
        h = 2 * torch.sigmoid(self.convR(x)) * h
        x = 2 * torch.sigmoid(self.convQ(h)) * x
        i, f, g, o = (self.conv_i2h(x) + self.conv_h2h(h)).chunk(4, dim=1)
        c = self.norm_cell(torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g))
        return self.SEBlock(torch.sigmoid(o) * torch.tanh(c), c)


class NaiveCMSLSTM(nn.Module):
    """The whole model for frames of size * patch_size pixels."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        layers: int,
        patch_size: int,
        size: tuple[int, int],
        *,
        kernel: int = 3,
        scales: Sequence[int] = (1, 2, 4),
    ) -> None:
        super().__init__()
        self.patch_size, self.hidden_channels = patch_size, hidden_channels
        pixels = in_channels * patch_size**2
        self.embed = nn.Conv2d(pixels, hidden_channels, 1)
        self.lstm = nn.ModuleList(Cell(hidden_channels, kernel, size, scales) for _ in range(layers))
        self.output = nn.Conv2d(hidden_channels, pixels, 1)

    def forward(self, frames: Tensor, horizon: int) -> Tensor:
        """(B, T, C, H, W) -> the next `horizon` frames."""
        batch, read, _, height, width = frames.shape
        shape = (batch, self.hidden_channels, height // self.patch_size, width // self.patch_size)
        states = [(frames.new_zeros(shape), frames.new_zeros(shape)) for _ in self.lstm]
        predictions: list[Tensor] = []
        for step in range(read + horizon - 1):
            x = self.embed(self.cut(frames[:, step] if step < read else predictions[-1]))
            for layer, cell in enumerate(self.lstm):
                states[layer] = cell(x, *states[layer])
                x = states[layer][0]
            predictions.append(self.join(self.output(x)))
        return torch.stack(predictions[read - 1 :], dim=1)

    def cut(self, frame: Tensor) -> Tensor:
        """Pixels as channels: the channel c p p + column p + row."""
        p = self.patch_size
        pixels = [
            frame[:, c, row::p, column::p] for c in range(frame.shape[1]) for column in range(p) for row in range(p)
        ]
        return torch.stack(pixels, dim=1)

    def join(self, patches: Tensor) -> Tensor:
        p = self.patch_size
        batch, channels, height, width = patches.shape
        frame = patches.new_empty(batch, channels // p**2, height * p, width * p)
        for channel in range(channels):
            c, column, row = channel // p**2, channel // p % p, channel % p
            frame[:, c, row::p, column::p] = patches[:, channel]
        return frame
