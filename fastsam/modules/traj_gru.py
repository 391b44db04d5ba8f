"""TrajGRU: a convolutional GRU whose recurrent connections follow trajectories that it finds itself.

The equations are those of "Deep Learning for Precipitation Nowcasting: A Benchmark and A New Model" (Shi et al., NIPS
2017), section 3.3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsam.modules import _check
from fastsam.modules.cells import RecurrentCell


class TrajGRUState(NamedTuple):
    """Hidden state (B, C, H, W)."""

    h: Tensor


class TrajGRUCell(RecurrentCell):
    """The trajectory GRU:

        U_t, V_t = gamma(X_t, H_{t-1})
        Z_t  = sigmoid(W_xz * X_t + sum_l W_hz^l * warp(H_{t-1}, U_{t,l}, V_{t,l}))
        R_t  = sigmoid(W_xr * X_t + sum_l W_hr^l * warp(H_{t-1}, U_{t,l}, V_{t,l}))
        H'_t = leaky(W_xh * X_t + R_t (sum_l W_hh^l * warp(H_{t-1}, U_{t,l}, V_{t,l})))
        H_t  = (1 - Z_t) H'_t + Z_t H_{t-1}

    warp(H, U, V) reads H at (row + V, column + U), bilinearly between its positions and zero beyond its edges. gamma is
    a 5x5 convolution of X to `flow_channels` plus one of H, a leaky ReLU, and a 5x5 convolution to the L flows. The
    slope of both leaky ReLUs is 0.2. W_h^l are 1x1: all L of them and all three gates are one convolution of the L
    warped maps, which one call samples from H where it lies.

    Submodules: `input` (in_channels -> 3 C: z, r, h'), `warped` (1x1, C L -> 3 C, input channel c * L + l),
    `input_flow` and `hidden_flow` (5x5, both with biases), `flow` (5x5, flow_channels -> 2 L: U of all links, then V).

    Args:
        in_channels: channels of the input X.
        hidden_channels: C, channels of H.
        kernel_size: of the convolution of X, odd; the map keeps its size by zero padding.
        links: L, connections of a position; 13 in the paper's lower layers.
        flow_channels: channels inside of gamma.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    slope = 0.2

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        links: int = 13,
        flow_channels: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "TrajGRUCell"
        self.in_channels = _check.positive_int(name, "in_channels", in_channels)
        self.hidden_channels = _check.positive_int(name, "hidden_channels", hidden_channels)
        self.kernel_size = _check.odd_kernel(name, "kernel_size", kernel_size)
        self.links = _check.positive_int(name, "links", links)
        _check.positive_int(name, "flow_channels", flow_channels)
        placement = _check.placement(name, device, dtype)
        around: dict[str, Any] = {"kernel_size": 5, "padding": 2, **placement}
        self.input = nn.Conv2d(in_channels, 3 * hidden_channels, kernel_size, padding=kernel_size // 2, **placement)
        self.warped = nn.Conv2d(hidden_channels * links, 3 * hidden_channels, 1, **placement)
        self.input_flow = nn.Conv2d(in_channels, flow_channels, **around)
        self.hidden_flow = nn.Conv2d(hidden_channels, flow_channels, **around)
        self.flow = nn.Conv2d(flow_channels, 2 * links, **around)

    def extra_repr(self) -> str:
        return f"links={self.links}"

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, TrajGRUState]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: (h,) of the step before, (B, hidden_channels, H, W); None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output H_t, and the state (H_t,).

        Raises:
            TypeError, ValueError: x or h is of another shape or dtype or on another device; weights that are not None.
        """
        h = self._checked_state(x, state)
        _check.no_weights("TrajGRUCell", weights)
        z, r, new = self.input(x).chunk(3, dim=1)
        z_h, r_h, new_h = self.warped(self._warp(h, self._flows(x, h))).chunk(3, dim=1)
        new = F.leaky_relu(new + (r + r_h).sigmoid() * new_h, self.slope)
        h = new + (z + z_h).sigmoid() * (h - new)
        return h, TrajGRUState(h)

    def _checked_state(self, x: Any, state: Any) -> Tensor:
        name, weight = "TrajGRUCell", self.input.weight
        _check.tensor(name, "x", x, "B", self.in_channels, "H", "W")
        _check.same_kind(name, "x", x, weight)
        shape = (x.shape[0], self.hidden_channels, x.shape[2], x.shape[3])
        if state is None:
            return x.new_zeros(shape)
        return _check.state_maps(name, state, {"h": shape}, weight)[0]

    def _flows(self, x: Tensor, h: Tensor) -> Tensor:
        """gamma: (B, 2 L, H, W), U of all links before V of all."""
        flows: Tensor = self.flow(F.leaky_relu(self.input_flow(x) + self.hidden_flow(h), self.slope))
        return flows

    def _warp(self, h: Tensor, flows: Tensor) -> Tensor:
        """H along all links, (B, C L, H, W).

        The links' grids stand one below the other as rows of one grid, so that H is sampled once and never repeated.
        Coordinates have float32 at least: steps of bfloat16 are a quarter of a position in column 32, a half in 64.
        """
        batch, channels, height, width = h.shape
        dtype = torch.promote_types(h.dtype, torch.float32)
        u, v = flows.to(dtype).unflatten(1, (2, self.links)).unbind(1)
        columns = torch.arange(width, device=h.device, dtype=dtype)
        rows = torch.arange(height, device=h.device, dtype=dtype).unsqueeze(1)
        # grid_sample counts from the outer edges of the map, which are -1 and 1.
        grid = torch.stack([(u + columns + 0.5) * (2 / width) - 1, (v + rows + 0.5) * (2 / height) - 1], dim=-1)
        grid = grid.reshape(batch, self.links * height, width, 2)
        warped = F.grid_sample(h.to(dtype), grid, padding_mode="zeros", align_corners=False).to(h.dtype)
        return warped.reshape(batch, channels * self.links, height, width)
