"""Where the tile sizes of Triton's kernels come from, and `python -m fastsam tune`."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastsam import backends, tune
from fastsam.ops._triton import configurations

MAP = torch.zeros(2, 5, 6, 7)
CANDIDATES = [{"ROWS": 16, "num_warps": 2}, {"ROWS": 32, "num_warps": 4}, {"ROWS": 64, "num_warps": 4}]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty results, the project's and the user's, in a folder of the test."""
    monkeypatch.setattr(configurations, "COMMITTED", tmp_path / "committed.json")
    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path / "user"))
    configurations.forget()
    yield tmp_path
    configurations.forget()


def chosen(kernel: str = "some_kernel") -> dict[str, int]:
    return configurations.configuration(kernel, MAP, (5, 16), CANDIDATES)


def known(file: Path, **results: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    key = configurations.problem("some_kernel", MAP, (5, 16))
    file.write_text(json.dumps({key: results}))
    configurations.forget()


def test_the_first_candidate_is_the_default():
    assert chosen() == CANDIDATES[0]


def test_problems_are_told_apart_by_powers_of_two():
    assert configurations.problem("some_kernel", MAP, (5, 16)) == "some_kernel interpreter float32 5-16-64"
    assert configurations.problem("other", MAP.half(), (1,)) == "other interpreter float16 1-64"


def test_the_users_results_go_before_the_projects(files):
    known(files / "committed.json", **CANDIDATES[1])
    assert chosen() == CANDIDATES[1]
    known(files / "user" / "triton.json", **CANDIDATES[2])
    assert chosen() == CANDIDATES[2] and chosen("other_kernel") == CANDIDATES[0]


def test_results_that_are_no_candidates_any_more(files):
    known(files / "committed.json", ROWS=1024, num_warps=4)
    assert chosen() == CANDIDATES[0]


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_file_is_named(files, text):
    (files / "user").mkdir()
    (files / "user" / "triton.json").write_text(text)
    configurations.forget()
    with pytest.raises(ValueError, match=r"user.triton\.json.*delete it"):
        chosen()


def test_the_results_of_this_project():
    file = Path(configurations.__file__).with_name("tuned.json")
    for key, result in configurations.read(file).items():
        assert len(key.split()) == 4 and set(result) >= {"num_warps", "num_stages"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds that a step takes, by the ROWS of the configuration in force."""
    seconds = {16: 1.0, 32: 1.0, 64: 1.0}
    monkeypatch.setattr(tune, "_time", lambda step, device: seconds[chosen()["ROWS"]])
    return seconds


@pytest.mark.parametrize(("times", "best"), [((1.0, 0.9, 0.95), 1), ((1.0, 0.99, 1.2), 0), ((2.0, 3.0, 1.0), 2)])
def test_the_fastest_candidate_if_it_is_clearly_so(clock, times, best):
    clock.update(zip((16, 32, 64), times, strict=True))
    assert tune.fastest("some_kernel", CANDIDATES, lambda: None, CPU) == CANDIDATES[best]


def test_candidates_that_do_not_fit_are_left_out(clock, capsys):
    from triton.runtime.errors import OutOfResources

    def step() -> None:
        if chosen()["ROWS"] == 16:
            raise OutOfResources(200000, 101376, "shared memory")

    assert tune.fastest("some_kernel", CANDIDATES, step, CPU) == CANDIDATES[1]
    assert "does not run here" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="none of the tile sizes of the Triton kernel some_kernel"):
        tune.fastest("some_kernel", CANDIDATES[:1], step, CPU)


def test_tuning_every_operator_and_going_on_where_it_was(files, monkeypatch, capsys):
    """The clock prefers the last candidate of each kernel; a second run has nothing left to measure."""
    ticks = SimpleNamespace(now=1000.0)

    def time(step: object, device: torch.device) -> float:
        ticks.now -= 1.0
        return ticks.now

    monkeypatch.setattr(tune, "_time", time)
    monkeypatch.setattr(tune, "_runs", lambda *_: True)
    problem = tune.Problem("float32", 4, 3, 2, batch=1, kernel_size=3)
    file = files / "user" / "triton.json"
    tune.tune([problem], file, CPU)
    assert "some_kernel" not in file.read_text() and backends.selected() == "auto"
    results = json.loads(file.read_text())
    assert {key.split()[1] for key in results} == {"interpreter"} and len(results) > 3
    measured = ticks.now
    tune.tune([problem], file, CPU)
    assert ticks.now == measured and json.loads(file.read_text()) == results
    assert "SAM (float32, 3 channels, 4x4)" in capsys.readouterr().out


def test_without_a_card(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "the back end triton does not run here: PyTorch sees no CUDA device" in capsys.readouterr().err
