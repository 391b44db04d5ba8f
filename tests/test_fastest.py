"""What `auto` chooses on a card: the table of measurements, how it is read, and how the benchmarks make its lines."""

import json
from pathlib import Path

import pytest
import torch

import fastsam
from benchmarks.fastest import OPERATORS, lines, main
from fastsam import backends, fastest

LINES = """
# a comment
8.6 separable_gates tf32 256 triton,eager,cuda ampere.json
8.6 separable_gates tf32 4096 cuda,triton,eager ampere.json  # another
9.0 separable_gates tf32 1024 eager,cuda,triton hopper.json
9.0 lstm_gates bfloat16 1024 cuda,triton,eager hopper.json
"""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The lines above in the place of the table; a path where a test may write others."""
    path = tmp_path / "fastest.txt"
    path.write_text(LINES)
    monkeypatch.setattr(fastest, "TABLE", path)
    fastest.table.cache_clear()
    fastest._order.cache_clear()
    yield path
    fastest.table.cache_clear()
    fastest._order.cache_clear()


@pytest.mark.parametrize(
    ("capability", "positions", "best", "source"),
    [
        ("8.6", 1, "triton", "256 positions on capability 8.6: ampere.json"),
        ("8.6", 256, "triton", "256 positions"),
        ("8.6", 4095, "triton", "256 positions"),
        ("8.6", 4096, "cuda", "4096 positions"),
        ("8.6", 10**6, "cuda", "4096 positions"),
        ("7.5", 256, "triton", "capability 8.6"),
        ("9.0", 16, "eager", "capability 9.0"),
        ("12.0", 16, "eager", "capability 9.0"),
    ],
)
def test_the_nearest_measurement_decides(measured, capability, positions, best, source):
    order, reason = fastest._order(capability, "separable_gates", "tf32", positions)
    assert order[0] == best and source in reason


def test_nothing_measured(measured):
    order, reason = fastest._order("9.0", "lstm_gates", "float32", 64)
    assert order == () and "no measurement of lstm_gates in float32" in reason


def test_float32_and_tf32_are_measured_apart():
    assert fastest.arithmetic_name(torch.bfloat16) == "bfloat16"
    assert fastest.arithmetic_name(torch.float32) == "float32"
    torch.set_float32_matmul_precision("high")
    try:
        assert fastest.arithmetic_name(torch.float32) == "tf32" and fastest.arithmetic_name(torch.float64) == "float64"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_damaged_table(measured):
    measured.write_text("9.0 lstm_gates float32 64 cuda\n")
    fastest.table.cache_clear()
    with pytest.raises(ValueError, match=r"line 1 of .*fastest\.txt must have 6 columns.*'9\.0 lstm_gates"):
        fastest.table()


def test_a_table_with_an_unknown_back_end(measured):
    measured.write_text("9.0 lstm_gates float32 64 cuda,tritn results.json\n")
    fastest.table.cache_clear()
    with pytest.raises(ValueError, match=r"line 1 .* must name cuda, triton and eager only, got 'cuda,tritn'"):
        fastest.table()


def test_the_table_of_this_project():
    for row in fastest.table():
        assert row.operator in fastsam.ops.__all__ and set(row.order) <= {"eager", "cuda", "triton"}
        assert (Path(__file__).resolve().parent.parent / "benchmarks" / "results" / row.results).is_file()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A card of capability 8.6 as `auto` sees it; the reasons why cuda and triton cannot serve on it."""
    reasons: dict[str, str | None] = {"cuda": None, "triton": None}
    monkeypatch.setattr(backends, "unsupported", lambda operator, name, *_: reasons[name])
    monkeypatch.setattr(fastest, "_capability", lambda index: (8, 6))
    torch.set_float32_matmul_precision("high")
    yield reasons
    torch.set_float32_matmul_precision("highest")


def test_auto_goes_by_the_table(measured, card):
    device = torch.device("cuda", 0)
    assert backends.explain("separable_gates", device, torch.float32, 4096)[0] == "cuda"
    card["cuda"] = "it was not built"
    assert backends.explain("separable_gates", device, torch.float32, 4096)[0] == "triton"
    name, reason = backends.explain("double_attention", device, torch.float32, 4096)
    assert name == "eager" and "triton can be named" in reason and "no measurement of double_attention" in reason
    measured.write_text("8.6 separable_gates tf32 4096 cuda ampere.json\n")
    fastest.table.cache_clear()
    fastest._order.cache_clear()
    assert backends.explain("separable_gates", device, torch.float32, 4096)[0] == "eager"
    card["triton"] = "no Triton"
    assert backends.explain("separable_gates", device, torch.float32) == (
        "eager",
        "cuda: it was not built; triton: no Triton",
    )


def test_lines_from_results(tmp_path, capsys):
    def record(group, size, backward=True, kind="speed", **times):
        variants = [{"peer": name.replace("_", " "), "median_ms": time} for name, time in times.items()]
        return {"kind": kind, "group": group, "size": size, "backward": backward, "variants": variants}

    machine = {"name": "card", "capability": "8.6", "dtype": "float32", "matmul_precision": "high"}
    records = [
        record("double attention", 16, eager=0.2, fastsam=0.5, fastsam_eager=3.0, fastsam_cuda=1.0, fastsam_triton=0.4),
        record("double attention", 16, backward=False, eager=0.1, fastsam_cuda=1.0),
        record("LSTM gates", 64, fastsam_eager=1.1, fastsam_triton=2.0),
        record("SAM", 64, eager=1.0, fastsam_triton=2.0),
        {"kind": "memory", "group": "SAM"},
    ]
    path = tmp_path / "card.json"

    def write() -> None:
        benchmarks = [{"extra_info": record} for record in records]
        content = {"machine_info": {"fastsam": machine}, "benchmarks": benchmarks, "datetime": "2026-01-01"}
        path.write_text(json.dumps(content))

    write()
    assert list(lines(path)) == [
        "8.6 double_attention tf32 256 triton,cuda,eager card.json",
        "8.6 self_attention tf32 256 triton,cuda,eager card.json",
        "8.6 lstm_gates tf32 4096 eager,triton card.json",
        "8.6 memory_gates tf32 4096 eager,triton card.json",
        "8.6 norm_gate tf32 4096 eager,triton card.json",
    ]
    machine["capability"] = None
    write()
    assert main([str(path)]) == 2
    assert "not a CUDA device" in capsys.readouterr().err


def test_every_operator_is_measured():
    assert {name for names in OPERATORS.values() for name in names} == set(backends.OPERATORS)


def test_auto_goes_no_further_than_every_card_has_room(measured, card):
    names = ("double_attention", "separable_gates")
    measured.write_text("".join(f"8.6 {name} float64 4096 cuda,eager ampere.json\n" for name in names))
    fastest.table.cache_clear()
    fastest._order.cache_clear()
    device = torch.device("cuda", 0)
    assert backends.explain("double_attention", device, torch.float64, 4096, 64)[0] == "cuda"
    name, reason = backends.explain("double_attention", device, torch.float64, 4096, 65)
    assert name == "eager" and reason == "beyond 64 channels not every card has room; cuda and triton can be named"
    assert backends.explain("separable_gates", device, torch.float64, 4096, 1024)[0] == "cuda"
    measured.write_text("8.6 separable_gates tf32 4096 triton,cuda ampere.json\n")
    fastest.table.cache_clear()
    fastest._order.cache_clear()
    chosen = [backends.explain("separable_gates", device, torch.float32, 4096, channels)[0] for channels in (256, 257)]
    assert chosen == ["triton", "cuda"]
    card["cuda"] = "it was not built"
    name, reason = backends.explain("separable_gates", device, torch.float32, 4096, 257)
    assert (name, reason) == ("eager", "triton has tiles for up to 256 channels")
