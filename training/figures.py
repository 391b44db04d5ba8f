"""Pictures in the manner of the paper: forecasts (Fig. 3), absolute errors (Fig. 4), attention maps (Fig. 6).

Frames are arrays (T, C, H, W) in [0, 1]; their first channel is drawn, on one grey scale from 0 to 1. Time counts from
t = 1, the first frame read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLUMNS = 10
# Inches: a cell with its gap, the room for titles above a row, for row labels and for the colour bar, and the margin.
CELL, TITLE, LABELS, COLOUR_BAR, MARGIN = 0.95, 0.22, 1.15, 0.65, 0.08
GREY = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
ERROR = {"cmap": "inferno", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
FRAME_MILLISECONDS = 200


def strip(path: Path, frames: NDArray, truth: NDArray, forecast: NDArray) -> Path:
    """Rows: frames read, true future, prediction, and its absolute error; at most ten columns. Returns `path`.

    Args:
        path: PNG file to write.
        frames: frames read (T, C, H, W).
        truth, forecast: future frames (horizon, C, H, W).
    """
    shown_frames, shown_future = _shown(len(frames)), _shown(len(truth))
    error = np.abs(forecast.clip(0, 1) - truth)
    rows = [
        ("input", frames, shown_frames, 1, GREY),
        ("truth", truth, shown_future, len(frames) + 1, GREY),
        ("prediction", forecast, shown_future, None, GREY),
        ("|error|", error, shown_future, None, ERROR),
    ]
    figure, grid = _grid(
        [first_time is not None for *_, first_time, _ in rows], max(map(len, (shown_frames, shown_future)))
    )
    for axes, (label, video, shown, first_time, style) in zip(grid, rows, strict=True):
        _label(axes[0], label)
        for axis, index in zip(axes, shown, strict=False):
            image = axis.imshow(video[index, 0], **style)
            axis.set_visible(True)
            if first_time is not None:
                axis.set_title(f"t = {first_time + index}", fontsize=8, pad=3)
    _colour_bar(figure, grid[-1][-1], image)
    return _save(figure, path)


def animation(path: Path, frames: NDArray, truth: NDArray, forecast: NDArray) -> Path:
    """A looping GIF of truth, forecast and absolute error side by side; while reading, only the input moves.

    Args:
        path: GIF file to write.
        frames: frames read (T, C, H, W).
        truth, forecast: future frames (horizon, C, H, W).

    Returns:
        `path`.
    """
    figure = Figure(figsize=(6, 2.4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(0.02, 0.02, 0.98, 0.82, wspace=0.06)
    blank = np.zeros_like(truth[0, 0])
    images = [panel.imshow(blank, **style) for panel, style in zip(panels, (GREY, GREY, ERROR), strict=True)]
    for panel, label in zip(panels, ("truth", "prediction", "|error|"), strict=True):
        panel.set_axis_off()
        panel.set_title(label, fontsize=10)
    pages = []
    for time in range(len(frames) + len(truth)):
        ahead = time - len(frames)
        reading = ahead < 0
        figure.suptitle(f"t = {time + 1}" + (", reading" if reading else f", {ahead + 1} ahead"), fontsize=11)
        if reading:
            pictures = (frames[time, 0], blank, blank)
        else:
            error = np.abs(forecast[ahead, 0].clip(0, 1) - truth[ahead, 0])
            pictures = (truth[ahead, 0], forecast[ahead, 0], error)
        for image, picture in zip(images, pictures, strict=True):
            image.set_data(picture)
        canvas.draw()
        pages.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    imageio.imwrite(path, pages, extension=".gif", duration=FRAME_MILLISECONDS, loop=0)
    return path


def attention(
    path: Path,
    frames: NDArray,
    truth: NDArray,
    forecast: NDArray,
    *,
    maps: Any,
    layers: Sequence[int],
    query: tuple[int, int],
) -> Path:
    """Where a query point attends: the frame read at each step, and below it the maps of the layers. Returns `path`.

    Warm colours are high attention; each map is scaled to its own maximum. Digits are outlined, "+" is the query.

    Args:
        path: PNG file to write.
        frames, truth, forecast: as in `strip`; in the future the model reads its own forecast.
        maps: (h, m) of ``Forecaster.attention_maps`` for one sequence and one point; m may be None.
        layers: layers that the maps are of, 0 the lowest.
        query: row and column of the query point, pixels.
    """
    read = np.concatenate([frames, forecast])[: len(frames) + len(truth) - 1, 0]
    shown = _shown(len(read))
    named = [
        (f"layer {layer + 1},\n{name}", source[position, :, 0, 0].float().cpu().numpy())
        for position, layer in enumerate(layers)
        for name, source in (("hidden state", maps.h), ("memory", maps.m))
        if source is not None
    ]
    figure, grid = _grid([True] + [False] * len(named), len(shown))
    height, width = read.shape[1:]
    _label(grid[0][0], "frame read")
    for axis, step in zip(grid[0], shown, strict=True):
        axis.imshow(read[step], **GREY)
        axis.set_title(f"t = {step + 1}", fontsize=8, pad=3)
    for axes, (label, values) in zip(grid[1:], named, strict=True):
        _label(axes[0], label)
        for axis, step in zip(axes, shown, strict=True):
            rows, columns = values.shape[1:]
            scale = max(height / rows, width / columns)
            extent = (-0.5, columns * scale - 0.5, rows * scale - 0.5, -0.5)
            image = axis.imshow(
                values[step] / values[step].max(), cmap="turbo", vmin=0, vmax=1, extent=extent, interpolation="nearest"
            )
            if read[step].max() > 0.5:
                axis.contour(read[step], levels=[0.5], colors="white", linewidths=0.5)
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for axis in (axis for axes in grid for axis in axes):
        axis.set_visible(True)
        axis.plot(query[1], query[0], "+", color="black", markersize=8, markeredgewidth=2.6)
        axis.plot(query[1], query[0], "+", color="white", markersize=7, markeredgewidth=1.2)
    _colour_bar(figure, grid[-1][-1], image, "of the\nmaximum")
    return _save(figure, path)


def brightest_pixel(frame: NDArray) -> tuple[int, int]:
    """Row and column of the largest value in the first channel of a frame (C, H, W)."""
    row, column = np.unravel_index(np.argmax(frame[0]), frame[0].shape)
    return int(row), int(column)


def _shown(count: int) -> list[int]:
    """At most COLUMNS indices below `count`, evenly spaced, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, COLUMNS))})


def _grid(titled: Sequence[bool], columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure of square cells, a row for each entry of `titled`, which says whether the row leaves room for titles.

    On the left is room for row labels, on the right for a colour bar. Cells are hidden until something is drawn.
    """
    heights = [CELL + (TITLE if room else 0.0) for room in titled]
    width, height = LABELS + columns * CELL + COLOUR_BAR, sum(heights) + 2 * MARGIN
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    grid: list[list[Axes]] = []
    for row in range(len(heights)):
        bottom = height - MARGIN - sum(heights[: row + 1])
        grid.append([])
        for column in range(columns):
            left = LABELS + column * CELL
            axis = figure.add_axes((left / width, bottom / height, 0.94 * CELL / width, 0.94 * CELL / height))
            axis.set(xticks=[], yticks=[])
            axis.set_visible(False)
            grid[-1].append(axis)
    return figure, grid


def _label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=9, rotation=0, ha="right", va="center", labelpad=8)


def _colour_bar(figure: Figure, beside: Axes, image: Any, title: str = "") -> None:
    box = beside.get_position()
    axis = figure.add_axes((box.x1 + 0.12 * box.width, box.y0, 0.1 * box.width, box.height))
    figure.colorbar(image, cax=axis).ax.tick_params(labelsize=7)
    axis.set_title(title, fontsize=7, loc="left")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
