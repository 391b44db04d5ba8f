"""A stack of recurrent cells that reads frames and predicts the ones that follow."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.modules import _check
from fastsam.modules.attention import AttentionMaps
from fastsam.modules.cells import CELLS, RecurrentCell

_Observer = Callable[[int, Tensor, Any], None]
"""Called before each cell's step with the layer, the cell's input, and its state."""


class Forecaster(nn.Module):
    """Predicts future frames with a stack of recurrent cells.

    A step cuts a frame into patches (the patches' pixels become channels), embeds them with a 1x1 convolution if asked
    for, passes them up the stack (the input of a layer is the output of the layer below at the same step), and makes
    the next frame with a 1x1 convolution of the last output. It reads the given frames first and then its own
    predictions. Frames of any size and horizons of any length are served; a height or width that patch_size does not
    divide is padded with zeros at the bottom or right, and the prediction is cropped back.

    Submodules: `embedding` (1x1 convolution, or the identity), `cells`, `output` (1x1 convolution).

    Args:
        cell: a name in `fastsam.modules.CELLS`, or a subclass of `RecurrentCell`.
        in_channels: channels of a frame.
        hidden_channels: hidden channels of each layer, the first layer first.
        patch_size: p; a patch is p x p pixels, which become the channels (row * p + column) * in_channels + channel.
        embed_channels: channels of the embedding; None passes the patches to the first cell as they are.
        device, dtype: of the parameters.
        **cell_options: keyword arguments of the cell, such as kernel_size.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above; the cell does not know an
            option, or is one to which the layer below hands more than its output, as it does in PredRNN.
    """

    hands_on: ClassVar[tuple[str, ...]] = ()
    """What a layer hands to the next one beside its output: what the `from_below` of a cell must name."""

    def __init__(
        self,
        cell: str | type[RecurrentCell],
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (64, 64, 64, 64),
        *,
        patch_size: int = 1,
        embed_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        make_cell = cell_class("Forecaster", "cell", cell)
        check_options(make_cell, cell_options)
        self.in_channels = _check.positive_int("Forecaster", "in_channels", in_channels)
        self.hidden_channels = _layer_sizes(hidden_channels)
        self.patch_size = _check.positive_int("Forecaster", "patch_size", patch_size)
        patch_channels = in_channels * patch_size**2
        placement = _check.placement("Forecaster", device, dtype)
        if embed_channels is None:
            self.embedding: nn.Module = nn.Identity()
            below = patch_channels
        else:
            below = _check.positive_int("Forecaster", "embed_channels", embed_channels)
            self.embedding = nn.Conv2d(patch_channels, below, 1, **placement)
        self.cells = nn.ModuleList()
        for hidden in self.hidden_channels:
            self.cells.append(make_cell(below, hidden, **cell_options, **placement))
            below = hidden
        self._check_handing_on(inside_blocks(self.cells[0]))
        self.output = nn.Conv2d(below, patch_channels, 1, **placement)

    def forward(
        self,
        frames: Tensor,
        horizon: int,
        *,
        truth: Tensor | None = None,
        truth_mask: Tensor | None = None,
        all_steps: bool = False,
    ) -> Tensor:
        """Read frames and predict the ones that follow.

        Args:
            frames: (B, T, C, H, W), T at least 1.
            horizon: number of frames to predict, at least 1.
            truth: true future frames (B, at least horizon - 1, C, H, W), to be read in the place of predictions.
            truth_mask: bool, (horizon - 1,) or (B, horizon - 1). True at k reads the true future frame k to predict
                frame k + 1, False the model's own (scheduled sampling). Without a mask all of truth is read.
            all_steps: also return the predictions of the next frame made while reading.

        Returns:
            The predictions (B, horizon, C, H, W); with all_steps (B, T - 1 + horizon, C, H, W), whose first frame
            predicts frames[:, 1].

        Raises:
            TypeError, ValueError: an argument is of another shape, range or dtype, or on another device; a truth_mask
                without truth.
        """
        self._check_frames(frames)
        _check.positive_int("Forecaster", "horizon", horizon)
        _check.flag("Forecaster", "all_steps", all_steps)
        truth_mask = self._checked_mask(frames, horizon, truth, truth_mask)
        first = 0 if all_steps else frames.shape[1] - 1
        return self._roll_out(frames, horizon, truth=truth, truth_mask=truth_mask, first=first)

    @torch.no_grad()
    def attention_maps(
        self,
        frames: Tensor,
        horizon: int,
        points: Tensor | Sequence[Sequence[int]],
        layers: Sequence[int] | None = None,
    ) -> AttentionMaps:
        """Attention from some query points at every step of a free-running prediction (figure 6), without gradients.

        Args:
            frames: (B, T, C, H, W).
            horizon: number of frames to predict.
            points: P query points, integers (P, 2) as (row, column) of the map of patches: the pixel (r, c) lies in
                (r // patch_size, c // patch_size).
            layers: L layers, 0 the lowest; None takes all of them.

        Returns:
            (h, m), each (L, T - 1 + horizon, B, P, ceil(H / patch_size), ceil(W / patch_size)); m is None for cells
            that do not attend to a memory.

        Raises:
            TypeError, ValueError: as in `forward`; points that are no integers, of another shape, or off the map; a
                layer that does not exist; cells without attention.
        """
        self._check_frames(frames)
        _check.positive_int("Forecaster", "horizon", horizon)
        steps: dict[int, list[AttentionMaps]] = {layer: [] for layer in self._checked_layers(layers)}

        def observe(layer: int, x: Tensor, state: Any) -> None:
            if layer in steps:
                steps[layer].append(self.cells[layer].attention_maps(x, state, points))  # type: ignore[operator]

        self._roll_out(frames, horizon, first=frames.shape[1] - 1, observe=observe)
        maps_h = [maps.h for layer in steps.values() for maps in layer]
        maps_m = [maps.m for layer in steps.values() for maps in layer if maps.m is not None]
        by_layer = (len(steps), -1)
        return AttentionMaps(
            torch.stack(maps_h).unflatten(0, by_layer), torch.stack(maps_m).unflatten(0, by_layer) if maps_m else None
        )

    def _roll_out(
        self,
        frames: Tensor,
        horizon: int,
        *,
        truth: Tensor | None = None,
        truth_mask: Tensor | None = None,
        first: int = 0,
        observe: _Observer | None = None,
    ) -> Tensor:
        """The predictions of the steps from `first` on, stacked over time."""
        read = frames.shape[1]
        weights = [cell.fold() for cell in self.cells]  # type: ignore[operator]
        states: list[Any] = [None] * len(self.cells)
        predictions: list[Tensor] = []
        for step in range(read + horizon - 1):
            frame = frames[:, step] if step < read else _next_input(predictions[-1], step - read, truth, truth_mask)
            prediction = self._step(frame, states, weights, observe)
            if step >= first:
                predictions.append(prediction)
        return torch.stack(predictions, dim=1)

    def _step(self, frame: Tensor, states: list[Any], weights: list[Any], observe: _Observer | None) -> Tensor:
        """The prediction of the next frame from this one; `states` is brought up to date in place."""
        height, width = frame.shape[-2:]
        x = self.embedding(patchify(frame, self.patch_size))
        for layer, cell in enumerate(self.cells):
            if observe is not None:
                observe(layer, x, states[layer])
            x, states[layer] = cell(x, states[layer], weights[layer])
        return unpatchify(self.output(x), self.patch_size)[..., :height, :width]

    def _check_handing_on(self, cell: nn.Module) -> None:
        """Check that the cell reads what the layers hand on, all of it and nothing else."""
        owner, name, wanted = type(self).__name__, type(cell).__name__, getattr(cell, "from_below", ())
        missing = [value for value in wanted if value not in self.hands_on]
        if missing:
            raise TypeError(
                f"{owner}: {name} reads the {' and the '.join(missing)} of the layer below, which {owner} does not "
                f"hand on, so it would silently be another model; use {cell.handed_on_by}"
            )
        unread = [value for value in self.hands_on if value not in wanted]
        if unread:
            raise TypeError(
                f"{owner}: {name} does not read the {' and the '.join(unread)} of the layer below, which {owner} hands "
                "on; use fastsam.Forecaster"
            )

    def _check_frames(self, frames: Any) -> None:
        _check.tensor("Forecaster", "frames", frames, "B", "T", self.in_channels, "H", "W")
        _check.same_kind("Forecaster", "frames", frames, self.output.weight)
        if frames.shape[1] == 0:
            raise ValueError(f"Forecaster: frames must hold at least one frame (T >= 1), got {tuple(frames.shape)}")

    def _checked_mask(self, frames: Tensor, horizon: int, truth: Any, mask: Any) -> Tensor | None:
        """The truth mask as (B, horizon - 1) where frames are, after the checks of `truth` and of the mask."""
        if truth is None:
            if mask is not None:
                raise ValueError("Forecaster: truth_mask needs truth, got a truth_mask without it")
            return None
        batch, _, *frame_shape = frames.shape
        _check.tensor("Forecaster", "truth", truth, batch, f"at least {horizon - 1}", *frame_shape)
        if truth.shape[1] < horizon - 1:
            raise ValueError(
                f"Forecaster: truth must hold at least horizon - 1 = {horizon - 1} frames, got {truth.shape[1]}"
            )
        _check.same_kind("Forecaster", "truth", truth, self.output.weight)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"Forecaster: truth_mask must be a torch.Tensor of bool, got {got}")
        if tuple(mask.shape) not in ((horizon - 1,), (batch, horizon - 1)):
            raise ValueError(
                f"Forecaster: truth_mask must have shape (horizon - 1,) = ({horizon - 1},) or (B, horizon - 1) = "
                f"({batch}, {horizon - 1}), got {tuple(mask.shape)}"
            )
        return mask.to(frames.device).expand(batch, horizon - 1)

    def _checked_layers(self, layers: Any) -> list[int]:
        count = len(self.cells)
        if layers is None:
            return list(range(count))
        if not isinstance(layers, Sequence) or not layers or not all(type(layer) is int for layer in layers):
            raise TypeError(f"Forecaster: layers must be None or a non-empty sequence of integers, got {layers!r}")
        for layer in layers:
            if not 0 <= layer < count:
                raise ValueError(f"Forecaster: layers must lie in 0 ... {count - 1}, got {layer}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"Forecaster: layers must differ from each other, got {layers!r}")
        return list(layers)


def patchify(frames: Tensor, patch_size: int) -> Tensor:
    """Patches as channels: (B, C, H, W) -> (B, p p C, ceil(H / p), ceil(W / p)), zeros beyond the bottom and right.

    The pixel (row, column) of a patch in channel c becomes the channel (row * p + column) * C + c.

    Raises:
        TypeError, ValueError: frames is not a tensor of four dimensions; patch_size is not a positive integer.
    """
    _check.tensor("patchify", "frames", frames, "B", "C", "H", "W")
    _check.positive_int("patchify", "patch_size", patch_size)
    if patch_size == 1:
        return frames
    p = patch_size
    batch, channels, height, width = frames.shape
    if height % p or width % p:
        frames = F.pad(frames, (0, -width % p, 0, -height % p))
    rows, columns = frames.shape[2] // p, frames.shape[3] // p
    pixels = frames.reshape(batch, channels, rows, p, columns, p).permute(0, 3, 5, 1, 2, 4)
    return pixels.reshape(batch, p * p * channels, rows, columns)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`, padding included: (B, p p C, h, w) -> (B, C, p h, p w).

    Raises:
        TypeError, ValueError: patches is not a tensor of four dimensions whose channels patch_size**2 divides;
            patch_size is not a positive integer.
    """
    _check.tensor("unpatchify", "patches", patches, "B", "p*p*C", "h", "w")
    _check.positive_int("unpatchify", "patch_size", patch_size)
    if patch_size == 1:
        return patches
    p = patch_size
    batch, channels, rows, columns = patches.shape
    if channels % p**2:
        raise ValueError(
            f"unpatchify: patches must have a multiple of patch_size**2 = {p**2} channels, got {tuple(patches.shape)}"
        )
    pixels = patches.reshape(batch, p, p, channels // p**2, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return pixels.reshape(batch, channels // p**2, rows * p, columns * p)


def _next_input(prediction: Tensor, k: int, truth: Tensor | None, truth_mask: Tensor | None) -> Tensor:
    """What is read as the future frame k: the prediction of it, the true one, or as the mask says."""
    if truth is None:
        return prediction
    if truth_mask is None:
        return truth[:, k]
    return torch.where(truth_mask[:, k, None, None, None], truth[:, k], prediction)


def inside_blocks(cell: nn.Module) -> Any:
    """The cell itself, or the one that a `CellWithBlocks` has inside."""
    return getattr(cell, "inside_blocks", cell)


def cell_class(owner: str, name: str, cell: Any) -> type[RecurrentCell]:
    """The class of a cell given by its name or as it is."""
    if isinstance(cell, str):
        if cell not in CELLS:
            raise ValueError(f"{owner}: there is no cell {cell!r}, known are {', '.join(map(repr, CELLS))}")
        return CELLS[cell]
    if not (isinstance(cell, type) and issubclass(cell, RecurrentCell)):
        raise TypeError(f"{owner}: {name} must be a name or a subclass of fastsam.modules.RecurrentCell, got {cell!r}")
    return cell


def check_options(cell: type[RecurrentCell], options: dict[str, Any]) -> None:
    """Check that the cell's constructor takes these keyword arguments."""
    parameters = list(inspect.signature(cell).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    fixed = ("in_channels", "hidden_channels", "device", "dtype")
    accepted = [parameter.name for parameter in parameters if parameter.name not in fixed]
    for option in options:
        if option not in accepted:
            raise TypeError(f"{cell.__name__} has no option {option!r}; it takes {', '.join(accepted)}")


def _layer_sizes(hidden_channels: Any) -> tuple[int, ...]:
    if not isinstance(hidden_channels, Sequence) or isinstance(hidden_channels, str):
        raise TypeError(
            f"Forecaster: hidden_channels must be a sequence with one positive integer a layer, got {hidden_channels!r}"
        )
    if not hidden_channels:
        raise ValueError("Forecaster: hidden_channels must name at least one layer, got an empty sequence")
    return tuple(
        _check.positive_int("Forecaster", f"hidden_channels[{layer}]", size)
        for layer, size in enumerate(hidden_channels)
    )
