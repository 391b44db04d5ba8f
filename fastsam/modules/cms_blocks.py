"""The two blocks of "CMS-LSTM: Context-Embedding and Multi-Scale Spatiotemporal-Expression LSTM for Video Prediction".

Equation, section and figure numbers are that paper's. Where its text and its published code differ, the code is
followed, because the published parameter count and checkpoints are the code's; the docstrings name the differences.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.modules import _check
from fastsam.modules._projections import _autocast_off, _bias, _fold_scores, _matrix
from fastsam.modules.attention import SelfAttentionWeights
from fastsam.modules.cells import _fold_norms, _foldable
from fastsam.ops import memory_gates, norm_gate, self_attention


class ExpressionWeights(NamedTuple):
    """Folded weights of the attention of each scale of a `SpatiotemporalExpression`."""

    scales: tuple[SelfAttentionWeights, ...]


class ContextEmbedding(nn.Module):
    """The context-embedding block (CE), section 3.1: the input and the hidden state gate each other in turns.

        odd half-steps   x <- 2 sigmoid(N_x(W_x * h)) x
        even half-steps  h <- 2 sigmoid(N_h(W_h * x)) h

    Equation 1 is two half-steps without norms and with biases. The published code normalises and has no biases, and
    its "five stacked blocks" are five half-steps: x changes three times, h twice. All of them share the convolutions.

    Submodules: `input_gate` (W_x, hidden_channels -> in_channels), `input_gate_norm`, `hidden_gate` (W_h, in_channels
    -> hidden_channels), `hidden_gate_norm`.

    Args:
        in_channels: channels of x.
        hidden_channels: channels of h.
        kernel_size: of both convolutions, odd; 5 in figure 1, 3 in the published script.
        steps: number of half-steps, at least 2.
        map_size: see `map_norm`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        steps: int = 5,
        map_size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "ContextEmbedding"
        self.in_channels = _check.positive_int(name, "in_channels", in_channels)
        self.hidden_channels = _check.positive_int(name, "hidden_channels", hidden_channels)
        self.kernel_size = _check.odd_kernel(name, "kernel_size", kernel_size)
        self.steps = _check.positive_int(name, "steps", steps)
        if steps < 2:
            raise ValueError(f"{name}: steps must be at least 2, one for x and one for h, got {steps}")
        self.map_size = checked_size(name, "map_size", map_size)
        placement = _check.placement(name, device, dtype)
        options = {"kernel_size": kernel_size, "padding": kernel_size // 2, "bias": False, **placement}
        self.input_gate = nn.Conv2d(hidden_channels, in_channels, **options)
        self.input_gate_norm = map_norm(in_channels, self.map_size, placement)
        self.hidden_gate = nn.Conv2d(in_channels, hidden_channels, **options)
        self.hidden_gate_norm = map_norm(hidden_channels, self.map_size, placement)

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed the context.

        Args:
            x: input (B, in_channels, H, W).
            h: hidden state of the step before (B, hidden_channels, H, W); None stands for zeros.

        Returns:
            The embedded x and h, of their shapes.

        Raises:
            TypeError, ValueError: x or h is of another shape or dtype or on another device.
        """
        _check.tensor("ContextEmbedding", "x", x, "B", self.in_channels, "H", "W")
        _check.same_kind("ContextEmbedding", "x", x, self.input_gate.weight)
        check_map("ContextEmbedding", x, self.map_size)
        shape = (x.shape[0], self.hidden_channels, x.shape[2], x.shape[3])
        if h is None:
            h = x.new_zeros(shape)
        _check.tensor("ContextEmbedding", "h", h, *shape)
        _check.same_kind("ContextEmbedding", "h", h, self.input_gate.weight)
        for step in range(self.steps):
            if step % 2 == 0:
                x = _context_gate(self.input_gate(h), self.input_gate_norm, x)
            else:
                h = _context_gate(self.hidden_gate(x), self.hidden_gate_norm, h)
        return x, h


class WindowAttention(nn.Module):
    """The basic attention module of figure 2 without its shortcut: one scale of `SpatiotemporalExpression`.

    Unscaled softmax of W_q x_i + b_q against W_k x_j + b_k over the positions of a window, the values W_v x_j + b_v;
    W_q, W_k and W_v keep the number of channels. Submodules `query`, `key`, `value`: 1x1 convolutions. Parameter
    `gamma` (1,) has no effect and always a zero gradient: it is here because the published checkpoints and the
    published parameter count hold one a scale.
    """

    def __init__(self, channels: int, placement: dict[str, Any]) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1, **placement)
        self.key = nn.Conv2d(channels, channels, 1, **placement)
        self.value = nn.Conv2d(channels, channels, 1, **placement)
        self.gamma = nn.Parameter(torch.zeros(1, **placement))

    def fold(self) -> SelfAttentionWeights:
        """The operands of `fastsam.ops.self_attention`, composed once for all steps of a sequence."""
        with _autocast_off(self.gamma):
            score, score_bias, key = _fold_scores(self.query, self.key, 1.0)
            # A gradient of zero and not None, which data-parallel training could not reduce.
            value_bias = _bias(self.value) + 0.0 * self.gamma
            return SelfAttentionWeights(score, score_bias, _matrix(self.value), value_bias, key)


class SpatiotemporalExpression(nn.Module):
    """The multi-scale spatiotemporal-expression block (SE), section 3.2: attention in windows updates h and c.

        Z_s = Z + attention_s(Z)                     for each scale s, over the windows of s, Z = [h | c]
        [A_h | A_c] = N_a(W_a * [Z_1; ...; Z_n])     the maps of h and c side by side, the scales on channels
        i, g, o = N_z(W_z * (W_f [A_h; A_c] + b_f)) + N_h(W_h * h)
        c^ = N_c((1 - sigmoid(i)) c + sigmoid(i) tanh(g))
        h^ = sigmoid(o) c^

    These are equations 2 to 4 with what the published code adds: the shortcut of the attention, the norms N, and the
    1x1 convolution W_f where the text has a 5x5 one. W_a, W_z and W_h are 5x5; W_a reads across the seam between the
    two halves. The scale s cuts the maps of h and of c into s x s windows, and the window of h and the one of c at the
    same place are attended together, 2 (H / s) (W / s) positions, with weights of the scale's own.

    The layout: h and c concatenated along the width are a map (H, 2 W) whose rows are a row of h and the same row of c.
    The same memory read as (2 H, W) has the rows of h and c alternate, and there the two windows of a place are one
    rectangle of (2 H / s) x (W / s), at every scale. So the map is made once and every scale's attention reads it where
    it lies (a back end that wants windows as a batch copies it for each scale in each pass); its output, read as
    (H, 2 W) again, goes into W_a.

    Submodules: `attentions` (a `WindowAttention` for each scale), `merge` (W_a) and `merge_norm`, `fusion` (W_f),
    `fused_gates` (W_z) and `fused_norm`, `hidden_gates` (W_h) and `hidden_norm`, `state_norm` (N_c). The gates' order
    is i, g, o.

    Args:
        channels: C, channels of h and of c.
        scales: windows along each side of a map, for each of the attentions.
        map_size: see `map_norm`; every scale must divide it.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        channels: int,
        scales: Sequence[int] = (1, 2, 4),
        *,
        map_size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SpatiotemporalExpression"
        self.channels = _check.positive_int(name, "channels", channels)
        self.scales = _checked_scales(scales)
        self.map_size = checked_size(name, "map_size", map_size)
        if self.map_size is not None:
            self._check_windows("map_size", *self.map_size)
        placement = _check.placement(name, device, dtype)
        self.attentions = nn.ModuleList(WindowAttention(channels, placement) for _ in self.scales)
        self.merge = nn.Conv2d(len(self.scales) * channels, channels, 5, padding=2, **placement)
        both_maps = None if self.map_size is None else (self.map_size[0], 2 * self.map_size[1])
        self.merge_norm = map_norm(channels, both_maps, placement)
        self.fusion = nn.Conv2d(2 * channels, channels, 1, **placement)
        self.fused_gates = nn.Conv2d(channels, 3 * channels, 5, padding=2, bias=False, **placement)
        self.fused_norm = map_norm(3 * channels, self.map_size, placement)
        self.hidden_gates = nn.Conv2d(channels, 3 * channels, 5, padding=2, bias=False, **placement)
        self.hidden_norm = map_norm(3 * channels, self.map_size, placement)
        self.state_norm = map_norm(channels, self.map_size, placement)

    def extra_repr(self) -> str:
        return f"scales={self.scales}"

    def fold(self) -> ExpressionWeights:
        """The folded weights of every scale's attention, for all steps of a sequence."""
        return ExpressionWeights(tuple(attention.fold() for attention in self.attentions))  # type: ignore[operator]

    def forward(self, h: Tensor, c: Tensor, weights: ExpressionWeights | None = None) -> tuple[Tensor, Tensor]:
        """Update hidden and cell state.

        Args:
            h: hidden state (B, C, H, W); every scale divides H and W.
            c: cell state, of the shape of h.
            weights: what `fold` returned, to share it between steps; None folds here.

        Returns:
            h^ and c^, of the shape of h.

        Raises:
            TypeError, ValueError: h or c is of another shape or dtype or on another device, or a scale does not divide
                the map; weights of another module.
        """
        self._check(h, c)
        weights = self.fold() if weights is None else weights
        weights = _check.folded_weights("SpatiotemporalExpression", weights, ExpressionWeights)
        merged = self.merge_norm(self.merge(self._express(h, c, weights)))
        z = self.fusion(torch.cat(merged.chunk(2, dim=3), dim=1))
        maps, norms = (self.fused_gates(z), self.hidden_gates(h)), (self.fused_norm, self.hidden_norm)
        return normalised_update(memory_gates, maps, norms, c, self.state_norm)

    def _express(self, h: Tensor, c: Tensor, weights: ExpressionWeights) -> Tensor:
        """[Z_1; ...; Z_n], (B, n C, H, 2 W)."""
        height, width = h.shape[2:]
        if torch.jit.is_tracing():  # there sizes are tensors, which the operator does not take
            height, width = int(height), int(width)
        alternating = torch.cat([h, c], dim=3).reshape(-1, self.channels, 2 * height, width)
        attended = [
            self_attention(
                alternating,
                *(of_scale.score, of_scale.score_bias, of_scale.value, of_scale.value_bias),
                key=of_scale.key,
                window=(2 * height // scale, width // scale),
            )
            for scale, of_scale in zip(self.scales, weights.scales, strict=True)
        ]
        expressed = torch.stack(attended, dim=1) + alternating.unsqueeze(1)
        return expressed.reshape(-1, len(self.scales) * self.channels, height, 2 * width)

    def _check(self, h: Any, c: Any) -> None:
        name, weight = "SpatiotemporalExpression", self.fusion.weight
        _check.tensor(name, "h", h, "B", self.channels, "H", "W")
        _check.same_kind(name, "h", h, weight)
        _check.tensor(name, "c", c, *h.shape)
        _check.same_kind(name, "c", c, weight)
        check_map(name, h, self.map_size)
        self._check_windows("h", *h.shape[2:])

    def _check_windows(self, argument: str, height: int, width: int) -> None:
        for scale in self.scales:
            if height % scale or width % scale:
                raise ValueError(
                    f"SpatiotemporalExpression: {argument} must have a height and a width that every scale of "
                    f"{self.scales} divides, got {height} x {width}, which the scale {scale} does not"
                )


def map_norm(channels: int, map_size: tuple[int, int] | None, placement: dict[str, Any]) -> nn.Module:
    """The layer norm of a map (B, channels, H, W) over channels and positions together.

    map_size (H, W): scale and shift for each channel and position, LayerNorm((channels, H, W)), as the published model
    has it; it takes maps of this size only. None: one scale and shift a channel, GroupNorm(1, channels), for any size.
    """
    if map_size is None:
        return nn.GroupNorm(1, channels, **placement)
    return nn.LayerNorm((channels, *map_size), **placement)


def checked_size(owner: str, name: str, value: Any) -> tuple[int, int] | None:
    """`value` as (height, width), or None, after the check that it is one of them."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{owner}: {name} must be None or a pair (height, width), got {value!r}")
    height, width = (_check.positive_int(owner, f"{name}[{index}]", side) for index, side in enumerate(value))
    return height, width


def check_map(owner: str, x: Tensor, map_size: tuple[int, int] | None) -> None:
    """Check that the map (B, C, H, W) is of the size that the norms are made for."""
    if map_size is not None and (x.shape[2], x.shape[3]) != map_size:
        raise ValueError(
            f"{owner}: the map must be of {map_size[0]} x {map_size[1]}, the map_size of its norms, "
            f"got {x.shape[2]} x {x.shape[3]}; map_size=None (of a whole model: frame_size=None) takes any size"
        )


def _checked_scales(scales: Any) -> tuple[int, ...]:
    name = "SpatiotemporalExpression"
    if not isinstance(scales, Sequence) or isinstance(scales, str):
        raise TypeError(f"{name}: scales must be a sequence of positive integers, got {scales!r}")
    if not scales:
        raise ValueError(f"{name}: scales must hold at least one scale, got {scales!r}")
    return tuple(_check.positive_int(name, f"scales[{index}]", scale) for index, scale in enumerate(scales))


def normalised_update(
    operator: Callable[..., tuple[Tensor, Tensor]],
    maps: Sequence[Tensor],
    norms: Sequence[nn.Module],
    c: Tensor,
    state_norm: nn.Module,
    *constants: float,
    activation: Callable[[Tensor], Tensor] = lambda c: c,
) -> tuple[Tensor, Tensor]:
    """The output and the normalised new state of `lstm_gates` or `memory_gates`.

    The operator does the work of all norms, where it serves them. Others that somebody put in their place are called.

    Args:
        operator: `lstm_gates` or `memory_gates`.
        maps: the two summands of the gates.
        norms: of the maps.
        c: the state before.
        state_norm: of the new state.
        constants: further arguments of the operator.
        activation: what the output gate multiplies is this of the new state.
    """
    eps = getattr(state_norm, "eps", None)
    if _foldable(state_norm, c) and all(getattr(norm, "eps", eps) == eps for norm in norms):
        (gates, recurrent), options = _fold_norms(norms, maps)
        options |= {"state_norm": (state_norm.weight, state_norm.bias), "eps": eps}
        return operator(gates, c, *constants, recurrent=recurrent, **options)
    gates = norms[0](maps[0]) + norms[1](maps[1])
    c = state_norm(operator(gates, c, *constants)[1])
    return norm_gate(gates[:, -c.shape[1] :], activation(c)), c


def _context_gate(x: Tensor, norm: Any, gated: Tensor) -> Tensor:
    """A half-step of CE: 2 sigmoid(N(x)) gated."""
    if _foldable(norm, x):
        return norm_gate(x, gated, norm=(norm.weight, norm.bias), scale=2.0, eps=norm.eps)
    return norm_gate(norm(x), gated, scale=2.0)
