"""The table of all models, docs/models.md, and what it is made of.

    python -m benchmarks.models [--only NAME ...] [--no-timing] [--limit SECONDS]

Every number is measured by a process of its own and kept in benchmarks/results/models/<machine>-<date>.json, so that a
model that takes too much memory or time costs its own cell only, and a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

import fastsam
from benchmarks import machine, memory, tables, timing
from benchmarks.cases import FRAME_SIZE, INPUT_FRAMES
from fastsam.comparators import QUOTED

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "models", ROOT / "docs" / "models.md"
CPU = torch.device("cpu")

BATCH, LAPS, LAPS_END = 8, 3, 60.0
"""Sequences of a training iteration, how many iterations are timed, and the seconds after which no more are begun."""

PUBLISHED: tuple[tuple[str, dict[str, Any], int, str], ...] = (
    ("predrnn", {"in_channels": 2, "patch_size": 2, "shared_input": True, "bias": True}, 4_599_560, "13.799M printed"),
    ("mim", {"in_channels": 2, "patch_size": 2, "frame_size": (32, 32)}, 9_511_112, "28.533M printed"),
    ("e3d_lstm", {}, 12_898_576, "38.696M printed"),
    ("cms_lstm", {}, 7_967_580, "that of the published code"),
)
"""Parameter counts that are reproduced: model, arguments, count, and where it stands."""

INTRODUCTION = """
# Models

Every model that `fastsam` has, in its paper's MovingMNIST configuration: frames of 64x64 in patches of 4x4.
`fastsam.build(name)` makes it, `--model.name` trains it. Written by `python -m benchmarks.models`, which takes 34
minutes and a quiet machine; `--no-timing` leaves out what needs them, `--only NAME` measures a model anew.

- *GFLOP a step*: of one sequence, the mean over the 19 steps of a prediction of 10 frames from 10.
  `torch.utils.flop_counter` counts convolutions and matrix products, a multiplication and an addition as two, in the
  eager back end, where attention is matrix products and so included. Norms, gates, softmax and the sampling of
  TrajGRU's warps are not.
- *s an iteration*, *peak MiB*: one training iteration of 8 sequences of 10 + 10 frames on the CPU (forward, backward,
  Adam) with the back end that fastsam chooses: the median time, and the peak of memory beyond parameters and Adam's
  slots.
- *training*: for MNIST add `--data.root DIRECTORY` or `--data.download true`; scikit-learn's digits are taken without.
  The recipe is that of SA-ConvLSTM for all models (Adam 1e-3, batch 8, scheduled sampling, 80,000 iterations), not that
  of each model's own paper. Other arguments of a model go in `--model.options '{"name": value}'`.
"""

NOTES = """
## What the names mean

- `convlstm` to `sa_convlstm` are the ablation of SA-ConvLSTM: the baseline; attention over the hidden state and the
  input without memory; memory without attention; attention without the memory's; everything.
- `ce` and `se` are the two blocks of CMS-LSTM around another cell. The context embedding (CE) lets input and hidden
  state gate each other before the cell. The spatiotemporal expression (SE) attends within windows of the hidden state
  behind it, on one, two or three scales (`se1`, `se2`, `se`). A map is cut into as many windows a side as the scale
  says, so that frames whose maps of patches a scale does not divide are refused.
- The ConvLSTM rows of CMS-LSTM's Table 3 are CMS-LSTM with blocks removed: `convlstm_ce_se` is `cms_lstm` itself, and
  the row without any block is `cms_lstm_without_blocks`, since `convlstm` is the other paper's baseline, another model.
  `fastsam.transplant` calls it `"convlstm"`, as the table does. `sa_convlstm` is the same model in both tables.
- `predrnn` (ST-LSTM), `predrnn_plus_plus` (causal LSTM and gradient highway), `mim`, `mim_star` (MIM with causal
  LSTMs), `e3d_lstm` and `traj_gru` are what the two papers compare with, from those models' own papers. TrajGRU's cells
  stand in the stack that all models have here, not in the encoder and forecaster of its paper.
- `cms_lstm`, with its rows of Table 3, `mim` and `mim_star` have parameters for each position of a map and serve frames
  of the size that they were made for; `frame_size=None` gives them one a channel instead, for any size.

## Published parameter counts

The papers print three times the parameters, with Adam's two slots for each. They count PredRNN and MIM on frames of
TaxiBJ (2 channels, 32x32, patches of 2x2), where the table above has MovingMNIST's. Reproduced exactly:
"""

DIFFERENT = """
SA-ConvLSTM (10.471M) and the base model (10.102M), counted on those frames too, agree within half a percent. Not
reproduced: PredRNN++ (13.237M) and MIM* (27.971M). No configuration of their equations was found that gives those
counts: a causal LSTM of 64 channels has 22 convolutions 5x5 from 64 to 64 channels, and the printed count leaves about
11 a layer.
"""

QUOTATION = """
## Quoted from the papers

These numbers are the papers' own, for models other than their own; nothing here was measured with `fastsam`. Parameters
in millions, with Adam's slots. `fastsam.comparators.QUOTED` holds them.
"""

Result = dict[str, Any]


def cost(name: str) -> Result:
    """Parameters, and floating-point operations of a step of batch 1.

    The step is the mean one of a prediction of 10 frames from 10, which takes 19. PyTorch's flop counter counts its
    convolutions and matrix products, with two operations a multiplication and addition, in the eager back end, which
    does attention as matrix products. Nothing is computed.
    """
    model = fastsam.build(name, device="meta").requires_grad_(False)
    frames = torch.empty(1, INPUT_FRAMES, 1, FRAME_SIZE, FRAME_SIZE, device="meta")
    with fastsam.backend("eager"), FlopCounterMode(display=False) as counter:
        model(frames, INPUT_FRAMES)
    steps = 2 * INPUT_FRAMES - 1
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops() / steps,
    }


def training_time(name: str, batch: int = BATCH, frames: int = INPUT_FRAMES) -> Result:
    """Seconds of some training iterations on the CPU, after a small one."""
    iteration, stopwatch = _training(name), timing.stopwatch(CPU)
    iteration(1, 2)
    laps: list[float] = []
    while len(laps) < LAPS and sum(laps) < LAPS_END:
        laps.append(stopwatch(partial(iteration, batch, frames)))
    return {"seconds": laps}


def training_memory(name: str, batch: int = BATCH, frames: int = INPUT_FRAMES) -> Result:
    """Bytes by which a training iteration on the CPU raises the resident set at its peak.

    Parameters, Adam's slots and libraries are there before; gradients are not.
    """
    iteration = _training(name)
    iteration(1, 2)
    memory.forget_peak()
    before = memory.peak_resident()
    iteration(batch, frames)
    return {"bytes": memory.peak_resident() - before}


def _training(name: str) -> Callable[[int, int], None]:
    """An iteration on `batch` random sequences of twice `frames` frames: forward, backward, and a step of Adam."""
    torch.manual_seed(0)
    model = fastsam.build(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def iteration(batch: int, frames: int) -> None:
        video = torch.rand(batch, 2 * frames, 1, FRAME_SIZE, FRAME_SIZE)
        optimizer.zero_grad()
        prediction = model(video[:, :frames], frames, truth=video[:, frames:-1], all_steps=True)
        mse_loss(prediction, video[:, 1:]).backward()
        optimizer.step()

    return iteration


MEASURES: dict[str, Callable[[str], Result]] = {"cost": cost, "time": training_time, "memory": training_memory}


def measure_apart(kind: str, name: str, limit: float) -> Result:
    """What the function of MEASURES returns in a process of its own, or {"failed": the reason}."""
    environment = {**os.environ}
    if kind == "memory":  # freed blocks go back to the system at once, as in benchmarks.memory
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.models", "--measure", kind, name]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {limit:.0f} s"}
    if done.returncode < 0:
        return {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout)


def _print_measure(kind: str, name: str) -> None:
    """What the process of `measure_apart` does. Where memory runs out, Linux is to stop it before anything else."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    print(json.dumps(MEASURES[kind](name)))


def missing(rows: dict[str, dict[str, Result]], kinds: Sequence[str], only: Sequence[str]) -> list[tuple[str, str]]:
    """The (name, kind) that are to be measured: all of the models named by `only`, or those without a result."""
    return [
        (name, kind)
        for name in fastsam.MODELS
        for kind in kinds
        if (name in only if only else "failed" in rows.get(name, {}).get(kind, {"failed": "never measured"}))
    ]


def document(results: dict[str, Any]) -> str:
    """docs/models.md."""
    conditions = "Time and memory are not measured yet."
    if results["machine"] is not None:
        conditions = f"Time and memory: {tables.conditions(results['machine'])}"
    head = ["name", "model", "paper: row", "parameters", "GFLOP a step", "s an iteration", "peak MiB", "training"]
    rows = [_row(name, results["models"].get(name, {})) for name in fastsam.MODELS]
    reproduced = [
        f"- {model.row}: {count:,} parameters, {paper}, by `fastsam.build({', '.join([_quote(name), *options])})`"
        for name, given, count, paper in PUBLISHED
        for model in [fastsam.MODELS[name]]
        for options in [[f"{option}={value!r}" for option, value in given.items()]]
    ]
    parts = [INTRODUCTION, _table(head, rows, right=range(3, 7)), conditions, NOTES, "\n".join(reproduced), DIFFERENT]
    return "\n\n".join(part.strip() for part in [*parts, QUOTATION, *_quoted()]) + "\n"


def _row(name: str, row: dict[str, Result]) -> list[str]:
    model = fastsam.MODELS[name]
    return [
        f"`{name}`",
        f"`{constructor(name)}`",
        f"{model.paper}: {model.row}",
        _cell(row, "cost", lambda result: f"{result['parameters']:,}"),
        _cell(row, "cost", lambda result: f"{result['flops'] / 1e9:.2f}"),
        _cell(row, "time", lambda result: f"{statistics.median(result['seconds']):.2f}"),
        _cell(row, "memory", lambda result: f"{result['bytes'] / 2**20:,.0f}"),
        f"`{command(name)}`",
    ]


def _cell(row: dict[str, Result], kind: str, spell: Callable[[Result], str]) -> str:
    result = row.get(kind, {"failed": "not measured"})
    return result["failed"] if "failed" in result else spell(result)


def constructor(name: str) -> str:
    """The call that makes the model without `build`."""
    make = fastsam.MODELS[name].make
    if isinstance(make, partial):
        return f"fastsam.{make.func.__name__}({_quote(make.args[0])})"
    return f"fastsam.{make.__name__}()"


def command(name: str) -> str:
    """The command line that trains the model."""
    return f"python -m training fit --model.name {name} --training.run_dir runs/{name}"


def _quoted() -> list[str]:
    """A heading and a table for each of the papers' tables that numbers are quoted from."""
    parts = []
    for paper, table, dataset in dict.fromkeys((quoted.paper, quoted.table, quoted.dataset) for quoted in QUOTED):
        found = [quoted for quoted in QUOTED if (quoted.paper, quoted.table) == (paper, table)]
        metrics = list(dict.fromkeys(quoted.metric for quoted in found))
        decimals = {
            metric: max(len(f"{quoted.value:g}".partition(".")[2]) for quoted in found if quoted.metric == metric)
            for metric in metrics
        }
        values = {(quoted.model, quoted.metric): f"{quoted.value:.{decimals[quoted.metric]}f}" for quoted in found}
        rows = [
            [model, *(values.get((model, metric), "–") for metric in metrics)]
            for model in dict.fromkeys(quoted.model for quoted in found)
        ]
        heads = [f"{metric} (M)" if metric == "parameters" else metric for metric in metrics]
        parts.append(f"### {paper} paper, Table {table}, {dataset}")
        parts.append(_table(["quoted", *heads], rows, right=range(1, 1 + len(metrics))))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int]) -> str:
    """Markdown; the columns of these numbers are aligned to the right."""
    ruler = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def _quote(text: str) -> str:
    return f'"{text}"'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 where something could not be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description="Measure all models and write docs/models.md."
    )
    parser.add_argument("--only", nargs="+", choices=fastsam.MODELS, default=[], help="measure these, again too")
    parser.add_argument("--no-timing", action="store_true", help="parameters and FLOPs only, for a busy machine")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for each measurement (600)")
    parser.add_argument("--results", type=Path, help="JSON to go on with, in the place of <machine>-<date>.json")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="file to write (docs/models.md)")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "NAME"), help="print one measurement, made here")
    options = parser.parse_args(arguments)
    if options.measure:
        _print_measure(*options.measure)
        return 0
    path = options.results or RESULTS / f"{machine.name(CPU)}-{datetime.date.today().isoformat()}.json"
    results = _load(path)
    if not options.no_timing and results["machine"] is None:
        results["machine"] = machine.facts(CPU, torch.float32)
    kinds = ["cost"] if options.no_timing else list(MEASURES)
    failed = 0
    for name, kind in missing(results["models"], kinds, options.only):
        result = measure_apart(kind, name, options.limit)
        print(f"{name}, {kind}: {json.dumps(result)}", flush=True)
        failed += "failed" in result
        results["models"].setdefault(name, {})[kind] = result
        _save(path, results)
    options.out.write_text(document(results), encoding="utf-8")
    print(f"wrote {options.out}")
    return 1 if failed else 0


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": None, "models": {}}


def _save(path: Path, results: dict[str, Any]) -> None:
    """Replace the file by a whole new one, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
