"""CMS-LSTM, and its two blocks around other recurrent cells.

Section and table numbers are those of "CMS-LSTM: Context-Embedding and Multi-Scale Spatiotemporal-Expression LSTM for
Video Prediction".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.modules import _check
from fastsam.modules.attention import AttentionMaps
from fastsam.modules.cells import CELLS, ConvLSTMCell, RecurrentCell
from fastsam.modules.cms_blocks import (
    ContextEmbedding,
    ExpressionWeights,
    SpatiotemporalExpression,
    check_map,
    checked_size,
    map_norm,
    normalised_update,
)
from fastsam.modules.forecaster import cell_class, check_options, inside_blocks
from fastsam.ops import lstm_gates


class CellWithBlocksWeights(NamedTuple):
    """Folded weights of the cell inside a `CellWithBlocks` and of its SE."""

    cell: Any
    expression: ExpressionWeights | None


class NormalisedConvLSTMCell(ConvLSTMCell):
    """The ConvLSTM inside CMS-LSTM: the new cell state is normalised too, and kept so.

        i, f, g, o = N_x(W_x * X_t) + N_h(W_h * H_{t-1})
        C_t = N_c(sigmoid(f + forget_bias) C_{t-1} + sigmoid(i) tanh(g))
        H_t = sigmoid(o) tanh(C_t)

    Equation 5 has neither the norms nor the forget bias; the published code has both, and no biases.

    Submodules: those of `ConvLSTMCell`, and `state_norm` (N_c).

    Args:
        in_channels, hidden_channels, forget_bias, device, dtype: as in `ConvLSTMCell`.
        kernel_size: of both convolutions, odd; 3 in the published script.
        map_size: (H, W) for norms with a scale and shift for each channel and position, LayerNorm((C, H, W)), which
            take maps of this size only; None for one a channel, GroupNorm(1, C), which take maps of any size.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        map_size: Sequence[int] | None = None,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        placement = _check.placement("NormalisedConvLSTMCell", device, dtype)
        super().__init__(in_channels, hidden_channels, kernel_size, forget_bias=forget_bias, bias=False, **placement)
        self.map_size = checked_size("NormalisedConvLSTMCell", "map_size", map_size)
        self.input_norm = map_norm(4 * hidden_channels, self.map_size, placement)  # type: ignore[assignment]
        self.hidden_norm = map_norm(4 * hidden_channels, self.map_size, placement)  # type: ignore[assignment]
        self.state_norm = map_norm(hidden_channels, self.map_size, placement)

    def recur(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """H_t and C_t from X_t, H_{t-1} and C_{t-1}."""
        check_map("NormalisedConvLSTMCell", x, self.map_size)
        maps, norms = (self.input_conv(x), self.hidden_conv(h)), (self.input_norm, self.hidden_norm)
        return normalised_update(lstm_gates, maps, norms, c, self.state_norm, self.forget_bias, activation=torch.tanh)


class CellWithBlocks(RecurrentCell):
    """A recurrent cell with CE before it and SE after it (section 3.3), each or both.

        X^_t, H^_{t-1} = CE(X_t, H_{t-1})
        H_t, C_t, ... = cell(X^_t, H^_{t-1}, C_{t-1}, ...)
        H^_t, C^_t = SE(H_t, C_t)

    H^_t is the output. Of the cell it is asked that its state, None or a tuple, begins with h and c, and that its
    output is h; further maps of the state pass by the blocks.

    Submodules: `cell`, `context` and `expression`, the latter two None where they are left out.

    Args:
        cell: the cell inside.
        context: CE for the cell's input and hidden state.
        expression: SE for the cell's hidden and cell state.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        context: ContextEmbedding | None = None,
        expression: SpatiotemporalExpression | None = None,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.context = context
        self.expression = expression

    @property
    def inside_blocks(self) -> Any:
        """The cell without blocks, which knows how a state starts and what it reads of the layer below."""
        return inside_blocks(self.cell)

    def fold(self) -> CellWithBlocksWeights:
        """The folded weights of the cell and of SE's attention, for all steps of a sequence."""
        return CellWithBlocksWeights(self.cell.fold(), None if self.expression is None else self.expression.fold())

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, weights: CellWithBlocksWeights | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            x: input (B, in_channels, H, W).
            state: the state of the step before, which begins with h and c; None starts from zeros.
            weights: what `fold` returned, to share it between steps; None folds here.

        Returns:
            The output H^_t, and the cell's state with H^_t and C^_t.

        Raises:
            TypeError, ValueError: x or a map of the state is of another shape or dtype or on another device, or a scale
                of SE does not divide the map.
        """
        weights = self.fold() if weights is None else weights
        weights = _check.folded_weights(type(self).__name__, weights, CellWithBlocksWeights)
        x, state = self._embed(x, state)
        h, after = self.cell(x, state, weights.cell)
        if self.expression is None:
            return h, after
        h, c, *others = self._checked(after, f"the new state of {type(self.cell).__name__} must be")
        h, c = self.expression(h, c, weights.expression)
        # A NamedTuple is not made of one tuple, as others are.
        return h, getattr(type(after), "_make", tuple)((h, c, *others))

    def attention_maps(
        self, x: Tensor, state: tuple[Tensor, ...] | None, points: Tensor | Sequence[Sequence[int]]
    ) -> AttentionMaps:
        """What the cell attends to in this step, from the points (P, 2) as (row, column).

        Raises:
            TypeError, ValueError: as in `forward`; points that are no integers, of another shape, or off the map; a
                cell without attention.
        """
        x, state = self._embed(x, state)
        return self.cell.attention_maps(x, state, points)

    def _embed(self, x: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The input, and the state with its hidden state, after CE."""
        if self.context is None:
            return x, state
        if state is None:  # zeros, which the gates of CE leave as they are
            return self.context(x)[0], None
        x, h = self.context(x, self._checked(state, "state must be None or")[0])
        return x, (h, *state[1:])

    def _checked(self, state: Any, must_be: str) -> tuple[Tensor, ...]:
        """A state of the cell inside. A map by itself would come apart into its samples."""
        if not isinstance(state, tuple | list) or len(state) < 2:
            got = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
            raise TypeError(f"{type(self).__name__}: {must_be} a tuple of maps that begins with (h, c), got {got}")
        return tuple(state)


class CMSLSTMCell(CellWithBlocks):
    """The cell of CMS-LSTM, section 3.3: CE, a ConvLSTM (`NormalisedConvLSTMCell`), SE.

    Under autocast on a GPU norms and gates are computed in float32 but from and to maps of autocast's dtype, the state
    among them, as those of `ConvLSTMCell`.

    Args:
        in_channels: channels of the input X.
        hidden_channels: channels of H and C.
        kernel_size: of the convolutions of the ConvLSTM and of CE, odd; 3 in the published script.
        use_context: False leaves out CE, Table 3 "w/o CE".
        scales: of SE, which must divide the height and width of the maps; None leaves SE out, Table 3 "w/o SE".
        map_size: (H, W) for norms with a scale and shift for each channel and position, LayerNorm((C, H, W)), which
            take maps of this size only; None for one a channel, GroupNorm(1, C), which take maps of any size.
        forget_bias, device, dtype: as in `ConvLSTMCell`.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        use_context: bool = True,
        scales: Sequence[int] | None = (1, 2, 4),
        map_size: Sequence[int] | None = None,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"map_size": map_size, "device": device, "dtype": dtype}
        use_context = _check.flag("CMSLSTMCell", "use_context", use_context)
        super().__init__(
            NormalisedConvLSTMCell(in_channels, hidden_channels, kernel_size, forget_bias=forget_bias, **options),
            ContextEmbedding(in_channels, hidden_channels, kernel_size, **options) if use_context else None,
            None if scales is None else SpatiotemporalExpression(hidden_channels, scales, **options),
        )


class TransplantCell(CellWithBlocks):
    """CE and SE transplanted into another cell, Table 3. The norms of the blocks are GroupNorm(1, C).

    SE updates the hidden and cell state that the whole other cell returns; for SA-ConvLSTM that is behind its memory.
    The paper does not say where its transplants stand.

    Args:
        in_channels, hidden_channels: of the other cell.
        backbone: the other cell, a name in `fastsam.modules.CELLS` or a subclass of `RecurrentCell` with states as
            `CellWithBlocks` asks for.
        use_context: False leaves out CE.
        context_kernel_size: of the convolutions of CE, odd.
        scales: of SE, which must divide the height and width of the maps; None leaves SE out.
        device, dtype: of the parameters.
        **backbone_options: keyword arguments of the other cell, such as kernel_size.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above; the other cell does not know
            an option.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        backbone: str | type[RecurrentCell] = "convlstm",
        use_context: bool = True,
        context_kernel_size: int = 5,
        scales: Sequence[int] | None = (1, 2, 4),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **backbone_options: Any,
    ) -> None:
        make_cell = cell_class("TransplantCell", "backbone", backbone)
        check_options(make_cell, backbone_options)
        use_context = _check.flag("TransplantCell", "use_context", use_context)
        placement = _check.placement("TransplantCell", device, dtype)
        super().__init__(
            make_cell(in_channels, hidden_channels, **backbone_options, **placement),
            ContextEmbedding(in_channels, hidden_channels, context_kernel_size, **placement) if use_context else None,
            None if scales is None else SpatiotemporalExpression(hidden_channels, scales, **placement),
        )


CELLS["cms_lstm"] = CMSLSTMCell
