"""The evaluation report: JSON for programs, Markdown for people."""

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastsam
from training.metrics import ForecastMetrics

LABELS = {
    "mse": "MSE",
    "mse_clipped": "MSE, clipped",
    "mae": "MAE",
    "mae_clipped": "MAE, clipped",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ssim_openstl": "SSIM (OpenSTL, range 2.0)",
    "ssim_predrnn": "SSIM (PredRNN, uint8)",
}
DEFINITIONS = (
    "MSE and MAE are sums over the pixels of a frame, averaged over frames and sequences, of raw predictions; clipped: "
    "of predictions clipped to [0, 1]. PSNR and SSIM are means over frames, after clipping; SSIM has data range 1.0 "
    "unless its name says otherwise."
)


@dataclass
class Report:
    """Metrics of the model and of the baseline, and the facts needed to repeat them.

    Args:
        model: name of the model.
        facts: data, checkpoint and versions.
        results: metrics by forecaster, in the order of the table.
    """

    model: str
    facts: dict[str, Any]
    results: dict[str, ForecastMetrics]

    def write(self, folder: Path) -> list[Path]:
        """Write report.json and report.md into the existing `folder`; returns their paths."""
        content = {
            "facts": self.facts,
            "definitions": DEFINITIONS,
            "results": {
                name: {"mean": metrics.means(), "steps": metrics.steps()} for name, metrics in self.results.items()
            },
        }
        paths = [folder / "report.json", folder / "report.md"]
        paths[0].write_text(json.dumps(content, indent=2) + "\n")
        paths[1].write_text(self.markdown())
        return paths

    def table(self) -> str:
        """Means of every metric, a row for each forecaster, as an aligned Markdown table."""
        names = list(next(iter(self.results.values())).sums)
        rows = [["", *(LABELS[name] for name in names)]]
        for forecaster, metrics in self.results.items():
            means = metrics.means()
            rows.append([forecaster, *(_number(name, means[name]) for name in names)])
        return _markdown_table(rows)

    def markdown(self) -> str:
        """The whole report."""
        facts = [f"- {name}: {_plain(value)}" for name, value in self.facts.items()]
        sections = [f"# Evaluation of {self.model}", "\n".join(facts), DEFINITIONS, "## Mean", self.table()]
        for name in next(iter(self.results.values())).sums:
            steps = {forecaster: metrics.steps()[name] for forecaster, metrics in self.results.items()}
            horizon = len(next(iter(steps.values())))
            rows = [["step", *map(str, range(1, horizon + 1))]]
            rows += [[forecaster, *(_number(name, value) for value in values)] for forecaster, values in steps.items()]
            sections += [f"## {LABELS[name]} by step", _markdown_table(rows)]
        return "\n\n".join(sections) + "\n"


def versions() -> dict[str, str]:
    """Versions of what determines the numbers."""
    packages = {name: importlib.metadata.version(name) for name in ("lightning", "numpy", "scikit-image")}
    return {"fastsam": fastsam.__version__, "python": platform.python_version(), "torch": torch.__version__, **packages}


def _number(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric.startswith("ssim") else f"{value:.2f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _markdown_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in cells) + " |"
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])
