"""The figure of a report: time and memory against N, and the training iteration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.cases import SAM, TRAINED_MODELS, TRAINING
from benchmarks.peers import EAGER, FASTSAM
from benchmarks.tables import peer_names

Record = dict[str, Any]

_COLOURS = {
    EAGER: "#7f7f7f",
    "SDPA": "#1f77b4",
    "torch.compile": "#2ca02c",
    "max-autotune": "#98df8a",
    "reduce-overhead": "#bcbd22",
    "FlexAttention": "#17becf",
    f"{FASTSAM} {EAGER}": "#e7969c",
    FASTSAM: "#d62728",
}


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw the panels that there are records for and save them as PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    speed = [record for record in records if record["kind"] == "speed"]
    memory = [record for record in records if record["kind"] == "memory" and record["batch"] == 1]
    for axis, direction in zip(axes[0], ("forward", "forward + backward"), strict=True):
        _lines(axis, _times(speed, direction), f"{SAM}, {direction}", "ms a sample")
    _lines(axes[1, 0], _peaks(memory), f"{SAM}, forward + backward: peak memory", "MiB a sample")
    _bars(axes[1, 1], [record for record in speed if record["group"] == TRAINING and record["backward"]])
    figure.savefig(path, dpi=110)
    plt.close(figure)


Lines = dict[str, list[tuple[int, float]]]
"""Points (N, value) of each peer."""


def _times(records: Sequence[Record], direction: str) -> Lines:
    """ms a sample; of a map measured with several batches the largest counts."""
    chosen: dict[int, Record] = {}
    for record in records:
        if record["group"] == SAM and record["direction"] == direction:
            known = chosen.get(record["size"])
            chosen[record["size"]] = record if known is None or record["batch"] > known["batch"] else known
    lines: Lines = {}
    for size, record in sorted(chosen.items()):
        for variant in record["variants"]:
            lines.setdefault(variant["peer"], []).append((size**2, variant["median_ms"] / record["batch"]))
    return lines


def _peaks(records: Sequence[Record]) -> Lines:
    lines: Lines = {}
    for record in sorted(records, key=lambda record: record["size"]):
        for peer, peak in record["peaks"].items():
            lines.setdefault(peer, []).append((record["size"] ** 2, peak / 2**20))
    return lines


def _lines(axis: Axes, lines: Lines, title: str, unit: str) -> None:
    if not lines:
        axis.set_axis_off()
        return
    for peer, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=peer, color=_COLOURS.get(peer))
    positions = sorted({n for points in lines.values() for n, _ in points})
    axis.set(title=title, xlabel="N, positions of the map", ylabel=unit, xscale="log", yscale="log")
    axis.set_xticks(positions, [f"{n}\n{round(n**0.5)}x{round(n**0.5)}" for n in positions])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _bars(axis: Axes, records: Sequence[Record]) -> None:
    """Time over that of eager ConvLSTM on the same map."""
    if not records:
        axis.set_axis_off()
        return
    peers = peer_names(records)
    width = 0.8 / len(peers)
    labels = []
    for place, (record, model) in enumerate((record, model) for record in records for model in TRAINED_MODELS):
        medians = {(variant["model"], variant["peer"]): variant["median_ms"] for variant in record["variants"]}
        labels.append(f"{model}\n{record['size']}x{record['size']}")
        present = [peer for peer in peers if (model, peer) in medians]
        for index, peer in enumerate(present):
            offset = (index - (len(present) - 1) / 2) * width
            ratio = medians[model, peer] / medians["ConvLSTM", EAGER]
            bar = axis.bar(place + offset, ratio, width, color=_COLOURS.get(peer))
            axis.bar_label(bar, fmt="%.2f", fontsize="xx-small", rotation=90, padding=2)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS.get(peer)) for peer in peers]
    axis.legend(handles, peers, fontsize="small", loc="upper left", ncols=2)
    axis.set_xticks(range(len(labels)), labels, fontsize="small")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.margins(y=0.3)  # room for the legend above the bars
    axis.set(title="Training iteration", ylabel="time over eager ConvLSTM on the same map")
