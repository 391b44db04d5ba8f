"""Recurrent cells: ConvLSTM, the base model with self-attention, and SA-ConvLSTM.

Every cell maps an input map and the state of the step before to an output map and the next state. Equation and figure
numbers are those of "Self-Attention ConvLSTM for Spatiotemporal Prediction".
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.modules import _check
from fastsam.modules.attention import SAM, AttentionMaps, SAMWeights, SelfAttention, SelfAttentionWeights
from fastsam.ops import lstm_gates
from fastsam.ops._dispatch import autocast_enabled


class ConvLSTMState(NamedTuple):
    """Hidden state and cell state, each (B, C, H, W)."""

    h: Tensor
    c: Tensor


class SAConvLSTMState(NamedTuple):
    """Hidden state, cell state and self-attention memory, each (B, C, H, W)."""

    h: Tensor
    c: Tensor
    m: Tensor


class BaseCellWeights(NamedTuple):
    """Folded weights of the two self-attentions of `BaseCell`."""

    input: SelfAttentionWeights
    hidden: SelfAttentionWeights


class RecurrentCell(nn.Module):
    """What `Forecaster` asks of a cell.

    A subclass is constructed as `Cell(in_channels, hidden_channels, **options, device=None, dtype=None)` and defines
    `forward(x, state=None, weights=None) -> (output, state)`: x is (B, in_channels, H, W), the output
    (B, hidden_channels, H, W), the state anything (None at the first step), and weights what `fold` returned.
    """

    def fold(self) -> Any:
        """What a sequence needs to have computed once, and is passed to `forward` as `weights` at every step."""
        return None

    def attention_maps(self, x: Tensor, state: Any, points: Tensor | Sequence[Sequence[int]]) -> AttentionMaps:
        """The attention of the step that `forward(x, state)` makes, from the points (P, 2) as (row, column).

        Raises:
            ValueError: the cell has no attention.
        """
        raise ValueError(f"{type(self).__name__} has no attention to make maps of")


class ConvLSTMCell(RecurrentCell):
    """The convolutional LSTM, equation 1 without SA:

        i, f, g, o = norm(W_x * X_t + b) + norm(W_h * H_{t-1})
        C_t = sigmoid(f + forget_bias) C_{t-1} + sigmoid(i) tanh(g)
        H_t = sigmoid(o) tanh(C_t)

    Submodules: `input_conv` (in_channels -> 4 hidden_channels) and `hidden_conv` (hidden_channels -> 4 hidden_channels,
    no bias), gate order i, f, g, o; `input_norm` and `hidden_norm`, the identity without layer_norm.

    Args:
        in_channels: channels of the input X.
        hidden_channels: channels of H and C.
        kernel_size: of both convolutions, odd; the map keeps its size by zero padding.
        layer_norm: normalise each convolution's output over channels and positions together, one scale and shift a
            channel: GroupNorm(1, 4 hidden_channels).
        forget_bias: added to f; 1 keeps the cell state in the first iterations of training.
        bias: whether `input_conv` has a bias.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    state_type: type[ConvLSTMState] | type[SAConvLSTMState] = ConvLSTMState

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = _check.positive_int(name, "in_channels", in_channels)
        self.hidden_channels = _check.positive_int(name, "hidden_channels", hidden_channels)
        self.kernel_size = _check.odd_kernel(name, "kernel_size", kernel_size)
        self.forget_bias = _check.real_number(name, "forget_bias", forget_bias)
        gates = 4 * hidden_channels
        placement = _check.placement(name, device, dtype)
        padded = {"kernel_size": kernel_size, "padding": kernel_size // 2, **placement}
        self.input_conv = nn.Conv2d(in_channels, gates, bias=_check.flag(name, "bias", bias), **padded)
        self.hidden_conv = nn.Conv2d(hidden_channels, gates, bias=False, **padded)
        normalised = _check.flag(name, "layer_norm", layer_norm)
        self.input_norm = nn.GroupNorm(1, gates, **placement) if normalised else nn.Identity()
        self.hidden_norm = nn.GroupNorm(1, gates, **placement) if normalised else nn.Identity()

    def extra_repr(self) -> str:
        return f"forget_bias={self.forget_bias}"

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: (h, c) of the step before, each (B, hidden_channels, H, W); None starts from zeros.
            weights: None, as `fold` returned: there is nothing to fold.

        Returns:
            The output H_t, and the state (H_t, C_t).

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device; weights
                that are not None.
        """
        h, c = self._checked_state(x, state)
        _check.no_weights(type(self).__name__, weights)
        h, c = self.recur(x, h, c)
        return h, ConvLSTMState(h, c)

    def recur(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H_t and C_t from X_t, H_{t-1} and C_{t-1}."""
        maps = self.input_conv(x), self.hidden_conv(h)
        (gates, recurrent), options = _fold_norms((self.input_norm, self.hidden_norm), maps)
        return lstm_gates(gates, c, self.forget_bias, recurrent=recurrent, **options)

    def _checked_state(self, x: Any, state: Any) -> tuple[Tensor, ...]:
        """The maps of the state to start from, after the checks of both inputs."""
        name, fields, weight = type(self).__name__, self.state_type._fields, self.input_conv.weight
        _check.tensor(name, "x", x, "B", self.in_channels, "H", "W")
        _check.same_kind(name, "x", x, weight)
        shape = (x.shape[0], self.hidden_channels, x.shape[2], x.shape[3])
        if state is None:
            return (x.new_zeros(shape),) * len(fields)
        return _check.state_maps(name, state, dict.fromkeys(fields, shape), weight)


def _fold_norms(norms: Sequence[Any], maps: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """What `lstm_gates` and `memory_gates` take for two maps and their norms: the maps, and their arguments norm,
    recurrent_norm and eps.

    The operator does the work of the norms that `_foldable` names, of one class and one eps in a call. Whatever else
    somebody put in the place of a norm is called here.
    """
    entering, folded, kind = [], [], None
    for norm, x in zip(norms, maps, strict=True):
        fold = _foldable(norm, x) and kind in (None, (type(norm), norm.eps))
        kind = (type(norm), norm.eps) if fold else kind
        entering.append(x if fold else norm(x))
        folded.append((norm.weight, norm.bias) if fold else None)
    options = {"norm": folded[0], "recurrent_norm": folded[1]}
    return entering, options if kind is None else {**options, "eps": kind[1]}


def _foldable(norm: Any, x: Tensor) -> bool:
    """Whether it is GroupNorm(1, C) or, for maps of this size, LayerNorm((C, H, W)), with weight and bias.

    One with hooks is called, so that they are; one of another dtype than the map is left to PyTorch unless autocast
    brings both to one, which it does not do with float64.
    """
    if type(norm) is nn.GroupNorm:
        whole = norm.num_groups == 1
    else:
        whole = type(norm) is nn.LayerNorm and norm.normalized_shape == tuple(x.shape[1:])
    if not whole or norm.weight is None or norm.bias is None or norm.eps <= 0:
        return False
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    same = norm.weight.dtype == x.dtype
    cast = not same and autocast_enabled(x) and torch.float64 not in (norm.weight.dtype, x.dtype)
    return not any(hooks) and (same or cast)


class BaseCell(ConvLSTMCell):
    """The base model, equation 1: a ConvLSTM on attended maps, X^_t = SA(X_t) and H^_{t-1} = SA(H_{t-1}).

    Submodules: those of `ConvLSTMCell`, and `input_attention` and `hidden_attention` (`SelfAttention`).

    Args:
        attention_channels, scale: of both `SelfAttention`.
        bias: whether `input_conv` and the projections of the attention have biases.
        in_channels, hidden_channels, kernel_size, layer_norm, forget_bias, device, dtype: as in `ConvLSTMCell`.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        attention_channels: int = 16,
        scale: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        placement = _check.placement(type(self).__name__, device, dtype)
        super().__init__(
            in_channels,
            hidden_channels,
            kernel_size,
            layer_norm=layer_norm,
            forget_bias=forget_bias,
            bias=bias,
            **placement,
        )
        options = {"scale": scale, "bias": bias, **placement}
        self.input_attention = SelfAttention(in_channels, attention_channels, **options)
        self.hidden_attention = SelfAttention(hidden_channels, attention_channels, **options)

    def fold(self) -> BaseCellWeights:
        """The folded weights of both attentions, for all steps of a sequence."""
        return BaseCellWeights(self.input_attention.fold(), self.hidden_attention.fold())

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: BaseCellWeights | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: (h, c) of the step before, each (B, hidden_channels, H, W); None starts from zeros.
            weights: what `fold` returned, to share it between steps; None folds here.

        Returns:
            The output H_t, and the state (H_t, C_t).

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device.
        """
        h, c = self._checked_state(x, state)
        weights = self.fold() if weights is None else weights
        weights = _check.folded_weights("BaseCell", weights, BaseCellWeights)
        attended_x = self.input_attention(x, weights.input)
        attended_h = self.hidden_attention(h, weights.hidden)
        h, c = self.recur(attended_x, attended_h, c)
        return h, ConvLSTMState(h, c)

    def attention_maps(
        self, x: Tensor, state: tuple[Tensor, ...] | None, points: Tensor | Sequence[Sequence[int]]
    ) -> AttentionMaps:
        """Attention over H_{t-1}, (B, P, H, W), from the points (P, 2) as (row, column); there is no memory.

        Raises:
            TypeError, ValueError: as in `forward`; points that are no integers, of another shape, or off the map.
        """
        h, _ = self._checked_state(x, state)
        return AttentionMaps(self.hidden_attention.attention_maps(h, points), None)


class SAMCell(RecurrentCell):
    """A step of an LSTM whose hidden state then goes through a SAM: H^_t, M_t = SAM(H_t, M_{t-1}).

    A subclass has the SAM as `sam`; `recur` makes H_t and C_t from X_t, H^_{t-1} and C_{t-1}, and `_checked_state` the
    maps (h, c, m) to start from, after the checks of x and the state.
    """

    sam: SAM
    recur: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    _checked_state: Callable[[Any, Any], tuple[Tensor, ...]]

    def fold(self) -> SAMWeights | SelfAttentionWeights | None:
        """The folded weights of the SAM, for all steps of a sequence."""
        return self.sam.fold()

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None = None,
        weights: SAMWeights | SelfAttentionWeights | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: (h, c, m) of the step before, each (B, hidden_channels, H, W); None starts from zeros.
            weights: what `fold` returned, to share it between steps; None folds here.

        Returns:
            The output H^_t, and the state (H^_t, C_t, M_t).

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device.
        """
        h, c, m = self._checked_state(x, state)
        h, c = self.recur(x, h, c)
        h, m = self.sam(h, m, weights)
        return h, SAConvLSTMState(h, c, m)

    def attention_maps(
        self, x: Tensor, state: tuple[Tensor, ...] | None, points: Tensor | Sequence[Sequence[int]]
    ) -> AttentionMaps:
        """Attention of the SAM over H_t and M_{t-1}, each (B, P, H, W), from the points (P, 2) as (row, column).

        Raises:
            TypeError, ValueError: as in `forward`; points that are no integers, of another shape, or off the map; a
                SAM without attention.
        """
        h, c, m = self._checked_state(x, state)
        h, _ = self.recur(x, h, c)
        return self.sam.attention_maps(h, m, points)


class SAConvLSTMCell(SAMCell, ConvLSTMCell):
    """The self-attention ConvLSTM, figure 2: a ConvLSTM whose hidden state goes through the self-attention memory.

        H_t, C_t = ConvLSTM(X_t, H^_{t-1}, C_{t-1})
        H^_t, M_t = SAM(H_t, M_{t-1})

    H^_t is the output and the next hidden state. Submodules: those of `ConvLSTMCell`, and `sam` (`SAM`).

    Args:
        kernel_size: of the convolutions and of the SAM's depthwise one, odd.
        attention_channels, scale, use_attention, use_memory_attention: of the `SAM`.
        bias: whether `input_conv` and the convolutions of the SAM have biases.
        in_channels, hidden_channels, layer_norm, forget_bias, device, dtype: as in `ConvLSTMCell`.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given there.
    """

    state_type = SAConvLSTMState

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 5,
        *,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        attention_channels: int = 16,
        scale: float = 1.0,
        bias: bool = True,
        use_attention: bool = True,
        use_memory_attention: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        placement = _check.placement(type(self).__name__, device, dtype)
        super().__init__(
            in_channels,
            hidden_channels,
            kernel_size,
            layer_norm=layer_norm,
            forget_bias=forget_bias,
            bias=bias,
            **placement,
        )
        self.sam = SAM(
            hidden_channels,
            attention_channels,
            kernel_size,
            scale=scale,
            bias=bias,
            use_attention=use_attention,
            use_memory_attention=use_memory_attention,
            **placement,
        )


CELLS: dict[str, type[RecurrentCell]] = {
    "convlstm": ConvLSTMCell,
    "base": BaseCell,
    "sa_convlstm": SAConvLSTMCell,
}
"""The cells that `Forecaster` knows by name."""
