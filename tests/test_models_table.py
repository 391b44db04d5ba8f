"""The table of all models: it says what the code makes, and the tool that writes it survives what it measures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsam
from benchmarks import models
from fastsam.comparators import QUOTED

TEXT = models.DOCUMENT.read_text(encoding="utf-8")
ROWS = {row.group(1): row.group(0).strip("| ").split(" | ") for row in re.finditer(r"^\| `(\w+)` \|.*$", TEXT, re.M)}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_document_lists_every_model() -> None:
    assert list(ROWS) == list(fastsam.MODELS)


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_row_of_the_document(name: str) -> None:
    _, call, row, count, *_ = ROWS[name]
    with torch.device("meta"):
        model = eval(call.strip("`"), {"fastsam": fastsam})
    assert call == f"`{models.constructor(name)}`" and row.endswith(fastsam.MODELS[name].row)
    assert type(model) is fastsam.MODELS[name].model
    assert int(count.replace(",", "")) == parameters(model)


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_commands_of_the_document(name: str) -> None:
    pytest.importorskip("jsonargparse")
    pytest.importorskip("lightning")
    from training.cli import make_parser, read_config
    from training.module import build_model

    arguments = ROWS[name][-1].strip("`").removeprefix("python -m training ")
    command, config = read_config(make_parser(), arguments.split())
    assert command == "fit" and config.training.run_dir == f"runs/{name}"
    with torch.device("meta"):
        assert f"{parameters(build_model(config.model)):,}" == ROWS[name][3]


def test_published_counts() -> None:
    for name, given, count, _ in models.PUBLISHED:
        assert parameters(fastsam.build(name, device="meta", **given)) == count and f"{count:,} parameters" in TEXT


def test_quoted_tables_hold_what_is_quoted() -> None:
    found = set()
    for section in re.split(r"^### ", TEXT, flags=re.M)[1:]:
        title, _, head, _, *rows = section.strip().splitlines()
        paper, table, dataset = re.fullmatch(r"(.*) paper, Table (.*), (.*)", title).groups()
        _, *metrics = head.replace(" (M)", "").strip("| ").split(" | ")
        for model, *values in (row.strip("| ").split(" | ") for row in rows):
            numbers = ((metric, value) for metric, value in zip(metrics, values, strict=True) if value != "–")
            found |= {(model, paper, table, dataset, metric, float(value)) for metric, value in numbers}
    assert found == {tuple(quoted) for quoted in QUOTED}


def test_flops_by_hand() -> None:
    """Of ConvLSTM: two convolutions 5x5 a layer and the 1x1 at both ends. The base model adds its attention to them."""
    n, c, d, layers, steps = 16 * 16, 64, 16, 4, 19
    convlstm = layers * 2 * n * (c + c) * 4 * c * 25 + 2 * (2 * n * 16 * c)
    maps = 2 * n * n * (d + c)
    projections = 2 * n * c * (d + d + c) + 2 * c**3 / steps  # value and output are folded into one, once a sequence
    for name, expected in [("convlstm", convlstm), ("base", convlstm + 2 * layers * (maps + projections))]:
        assert models.cost(name)["flops"] == pytest.approx(expected, rel=1e-12)
        assert ROWS[name][4] == f"{expected / 1e9:.2f}"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is measured, of which nothing is: TrajGRU's memory always fails."""
    calls: list[tuple[str, str]] = []

    def pretend(kind: str, name: str, limit: float) -> dict[str, Any]:
        calls.append((name, kind))
        if (name, kind) == ("traj_gru", "memory"):
            return {"failed": "killed by SIGKILL"}
        return {"cost": {"parameters": 1234567, "flops": 2e9}, "time": {"seconds": [1.0, 9.0, 2.0]}}.get(
            kind, {"bytes": 3 * 2**20}
        )

    monkeypatch.setattr(models, "measure_apart", pretend)
    return calls


def test_measuring_goes_on_where_it_was(measured: list[tuple[str, str]], tmp_path: Path) -> None:
    files = [f"--results={tmp_path / 'new' / 'results.json'}", f"--out={tmp_path / 'models.md'}"]
    count = len(fastsam.MODELS)
    assert models.main([*files, "--no-timing"]) == 0
    assert measured == [(name, "cost") for name in fastsam.MODELS]
    text = (tmp_path / "models.md").read_text()
    assert "Time and memory are not measured yet." in text and text.count("| not measured | not measured |") == count
    assert models.main(files) == 1, "TrajGRU's memory failed"
    assert len(measured) == 3 * count and ("mim", "memory") in measured
    text = (tmp_path / "models.md").read_text()
    assert "fastsam.MIM()` | SA-ConvLSTM, Table 2: MIM | 1,234,567 | 2.00 | 2.00 | 3 |" in text
    assert "| 2.00 | 2.00 | killed by SIGKILL |" in text and f"PyTorch {torch.__version__}" in text
    del measured[:]
    assert models.main(files) == 1
    assert measured == [("traj_gru", "memory")], "only what failed is tried again"
    del measured[:]
    assert models.main([*files, "--only", "mim", "--no-timing"]) == 0
    assert measured == [("mim", "cost")], "what is named is measured again"


def test_a_process_that_fails_costs_its_own_number_only() -> None:
    assert models.measure_apart("cost", "traj_gru", 1e-3) == {"failed": "stopped after 0 s"}
    assert models.measure_apart("cost", "lstm", 100)["failed"].startswith("ValueError: build: there is no model 'lstm'")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert models.measure_apart("memory", "mim", 100) == {"failed": "killed by SIGKILL"}


MEMORY = """
from benchmarks.models import training_memory
print(*(training_memory("convlstm", batch=batch, frames=3)["bytes"] for batch in (2, 16)))
"""


def test_memory_of_an_iteration() -> None:
    child = subprocess.run([sys.executable, "-c", MEMORY], cwd=models.ROOT, capture_output=True, text=True, check=True)
    small, large = map(int, child.stdout.split())
    assert 0 < small < large - 2**20


def test_time_of_an_iteration() -> None:
    seconds = models.training_time("convlstm", batch=1, frames=1)["seconds"]
    assert len(seconds) == models.LAPS and min(seconds) > 0


def test_what_the_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["--measure", "cost", "convlstm"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 3_284_048
