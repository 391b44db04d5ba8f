"""The machinery of the benchmarks: its peers agree, its floors are right, its reports are written. Nothing is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks import cases, floors, machine, memory, report, variants
from benchmarks.cases import GATES, GROUPS, LSTM_GATES, SAM, TRAINING, Case
from benchmarks.peers import EAGER, FASTSAM, Peer, peers

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def small_case(group: str, backward: bool) -> Case:
    return Case(group, size=4, batch=2, backward=backward, frames=2 if group == TRAINING else 0)


def uncompiled(case: Case, dtype: torch.dtype) -> list[Peer]:
    return [peer for peer in peers(case, CPU, dtype) if peer.compile_mode is None]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("group", GROUPS)
def test_peers_agree_with_eager(group: str, backward: bool) -> None:
    case, dtype = small_case(group, backward), torch.float64
    inputs, found = cases.inputs(case, CPU, dtype), uncompiled(case, dtype)
    assert found[0].name == EAGER and found[-1].name == FASTSAM
    for model in case.models:
        parameters = variants.draw_parameters(found[0].module(model, case))
        expected = variants.Variant(found[0], model, case, parameters, inputs).results()
        assert any(name.startswith("gradient") for name in expected) == backward
        for peer in found[1:]:
            if model in peer.models:
                variant = variants.Variant(peer, model, case, parameters, inputs)
                variants.assert_same(variant.results(), expected, 1e-9, f"{peer.name}, {model}")
                variant.lap()


def test_every_peer_of_the_attention_is_there() -> None:
    names = [peer.name for peer in peers(small_case(SAM, True), CPU, torch.float32)]
    assert names[:3] == [EAGER, "SDPA", "torch.compile"] and names[-1] == FASTSAM
    on_gpu = {peer.name for peer in peers(small_case(SAM, True), torch.device("cuda"), torch.float32)}
    assert {"max-autotune", "reduce-overhead", "FlexAttention"} < on_gpu


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_result_is_noticed(wrong: float) -> None:
    right = {"output 0": torch.ones(3), "gradient of input 0": torch.ones(2)}
    variants.assert_same(right, right, 1e-3, "label")
    with pytest.raises(AssertionError, match=r"label: gradient of input 0 differs from eager's by"):
        variants.assert_same({**right, "gradient of input 0": torch.full((2,), wrong)}, right, 1e-3, "label")


@pytest.mark.parametrize(("size", "batch", "gflop"), [(16, 8, 0.9), (32, 8, 10.0), (64, 2, 35.0)])
def test_floor_of_sam(size: int, batch: int, gflop: float) -> None:
    assert floors.work(SAM, Case(SAM, size, batch, backward=True), 4).flops == pytest.approx(gflop * 1e9, rel=0.15)


@pytest.mark.parametrize("group", [GATES, TRAINING])
def test_floors_count_what_pytorch_counts(group: str) -> None:
    case, model = small_case(group, backward=False), {GATES: GATES, TRAINING: "ConvLSTM"}[group]
    (eager, *_) = peers(case, CPU, torch.float32)
    module = eager.module(model, case)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*cases.inputs(case, CPU, torch.float32))
    assert counter.get_total_flops() == floors.work(model, case, 4).flops


@pytest.mark.usefixtures("native_backend")
def test_peak_memory_of_a_fresh_process() -> None:
    case = Case(SAM, size=40, batch=1, backward=True)
    peaks = {
        peer.name: memory.peak_bytes(peer, case, CPU, torch.float32)
        for peer in uncompiled(case, torch.float32)
        if peer.name in (EAGER, FASTSAM)
    }
    matrix = 4 * 40**4
    assert 3 * matrix < peaks[EAGER] < 12 * matrix
    assert 0 < peaks[FASTSAM] < 2 * matrix


def write_results(path: Path) -> Path:
    """What a run writes, with made-up times."""
    records = []
    for case in cases.speed_cases("cpu", quick=False):
        timed = [
            report.variant_record(
                peer.name, model, [0.001 * case.size * (index + 1)] * 3, floors.work(model, case, itemsize=4)
            )
            for model in case.models
            for index, peer in enumerate(peers(case, CPU, torch.float32))
            if model in peer.models
        ]
        records.append(report.speed_record(case, timed, {"torch.compile": "no time left to compile"}))
    for case in cases.memory_cases(quick=False):
        peaks = {EAGER: 16.0 * case.size**4, FASTSAM: 8192.0 * case.batch * case.size**2}
        records.append(report.memory_record(case, peaks, {}))
    facts = {**machine.facts(CPU, torch.float32), "rates": {"flops": 3.5e11, "bytes": 2e10}}
    content = {
        "machine_info": {"fastsam": facts},
        "datetime": "2020-02-07T12:00:00+00:00",
        "benchmarks": [{"extra_info": record} for record in records],
    }
    path.write_text(json.dumps(content))
    return path


def test_report_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_results(tmp_path / "machine-2020-02-07.json")
    assert report.main([str(results), "--out", str(tmp_path / "report")]) == 0
    markdown, image = tmp_path / "report" / "machine-2020-02-07.md", tmp_path / "report" / "machine-2020-02-07.png"
    assert str(markdown) in capsys.readouterr().out
    text = markdown.read_text()
    assert image.read_bytes().startswith(b"\x89PNG") and f"]({image.name})" in text
    for group in GROUPS:
        assert f"## {group}" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    count = len(peers(Case(SAM, 64, 2, backward=True), CPU, torch.float32))  # each slower than the one before
    assert any(row[:3] == ["64x64", "2", f"64, {1 / count:.2f}x"] for row in rows)
    assert ["32x32", "4", "16.0", "32.0", "8.00"] in rows
    assert "350 GFLOP/s and 20 GB/s" in text
    assert "torch.compile (no time left to compile)" in text


def test_readme_is_updated_between_its_markers(tmp_path: Path) -> None:
    results = write_results(tmp_path / "machine.json")
    readme = tmp_path / "docs" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        assert report.main([str(results), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"\n{report.END}\nafter\n")
        assert "old" not in text and text.count("| SAM, forward + backward (ms) |") == 1
        assert "(../machine.png)" in text and (tmp_path / "machine.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the results"),
        ("{", "holds no results of these benchmarks"),
        ('{"benchmarks": []}', "holds no results of these benchmarks"),
        ('{"machine_info": {"fastsam": {}}, "benchmarks": [], "datetime": ""}', "holds no measurements"),
    ],
)
def test_bad_results(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1


def test_newest_results(tmp_path: Path) -> None:
    write_results(tmp_path / "machine-2020-02-07-quick.json")
    with pytest.raises(report.ReportError, match=r"no results of a full run in .*make bench"):
        report.newest(tmp_path)
    assert report.newest(write_results(tmp_path / "machine.json").parent) == tmp_path / "machine.json"


@pytest.mark.parametrize("text", [None, "no markers", f"{report.END} {report.BEGIN}"])
def test_readme_without_markers(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = write_results(tmp_path / "results.json"), tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    assert report.main([str(results), "--readme", str(readme)]) == 2
    assert str(readme) in capsys.readouterr().err
    assert text is None or readme.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--device", "cuda"])
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


def test_a_run_writes_its_report(tmp_path: Path) -> None:
    arguments = [
        "--quick",
        "--device=cpu",
        "--out",
        tmp_path,
        "--name=run",
        "-k",
        f"{LSTM_GATES.replace(' ', '_')}-16x16",
    ]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which the run is not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"## {LSTM_GATES}, forward + backward" in result.stdout
    (record,) = report.load(tmp_path / "run.json").records
    laps = {variant["peer"]: variant["laps_ms"] for variant in record["variants"]}
    assert {EAGER, FASTSAM} <= laps.keys() and all(len(times) >= 3 and min(times) > 0 for times in laps.values())
    assert len({len(times) for times in laps.values()}) == 1
    assert (tmp_path / "run.md").exists() and (tmp_path / "run.png").exists()


def test_an_unknown_option_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--fast"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 4 and "unrecognized arguments: --fast" in result.stderr
