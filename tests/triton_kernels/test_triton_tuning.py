"""Where the tile sizes of Triton's kernels come from, and `python -m fastsam tune`."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from on_device import DEVICE

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fastsam import backends, tune
from fastsam.ops._attention import triton_tiles
from fastsam.ops._gates import triton as gates
from fastsam.ops._gates.update import Term
from fastsam.ops._triton import configurations
from fastsam.ops.separable_gates.triton import backward_candidates, forward_candidates, products_candidates

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


class Launches:
    """Makes launches on a card that has room for tiles of some numbers of ROWS, and notes which are tried."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def __call__(self, fitting: Sequence[int]) -> Callable[[dict[str, int]], int]:
        def launch(choice: dict[str, int]) -> int:
            self.tried.append(choice["ROWS"])
            if choice["ROWS"] not in fitting:
                raise OutOfResources(200000, 101376, "shared memory")
            return choice["ROWS"]

        return launch


@pytest.fixture
def launches() -> Launches:
    return Launches()


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


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff"])
def test_a_damaged_file_is_named(files, text):
    (files / "user").mkdir()
    (files / "user" / "triton.json").write_bytes(text)
    configurations.forget()
    with pytest.raises(ValueError, match=r"user.triton\.json.*delete it$"):
        chosen()


def test_norms_of_channels_and_of_positions_are_told_apart():
    """Their kernels are other programs."""
    of_rows, of_positions = (Term(MAP, weight, weight) for weight in (torch.zeros(5), torch.zeros(5, 6, 7)))
    plain = Term(MAP, None, None)
    terms = [[plain], [of_rows], [of_positions], [of_rows, of_rows], [of_positions, plain]]
    assert [gates._sizes(20, some) for some in terms] == [(20, 0, 0), (20, 1, 0), (20, 1, 1), (20, 2, 0), (20, 1, 1)]


def test_the_results_of_this_project():
    file = Path(configurations.__file__).with_name("tuned.json")
    for key, result in configurations.read(file).items():
        assert len(key.split()) == 4 and set(result) >= {"num_warps", "num_stages"}


@pytest.mark.parametrize("card_fits", [(16,), (32,), (16, 64)])
def test_a_launch_takes_tiles_that_fit(card_fits, launches):
    """The safe candidate first, then the others; what fits is chosen at once from then on."""

    def launched() -> int:
        return configurations.launched("some_operator", "some_kernel", MAP, (5, 16), CANDIDATES, launches(card_fits))

    assert launched() == launched() == card_fits[0]
    tried = [rows for rows in (16, 32, 64) if rows <= card_fits[0]]
    assert launches.tried == [*tried, card_fits[0]]
    configurations.forget()
    assert launched() == card_fits[0] and launches.tried[-len(tried) :] == tried


def test_a_tuned_tile_that_does_not_fit_any_more(files, launches):
    known(files / "user" / "triton.json", **CANDIDATES[2])
    arguments = ("some_operator", "some_kernel", MAP, (5, 16), CANDIDATES, launches((16, 32)))
    assert configurations.launched(*arguments) == 16 and launches.tried == [64, 16]


def test_nothing_fits(launches):
    """The error says which operator and kernel on which maps, what is missing, and what to do."""
    message = (
        r"fastsam\.some_operator: the Triton kernel some_kernel .* on maps \(2, 5, 6, 7\) in float32: with ROWS=16, "
        r"num_warps=2 it needs 200000 of shared memory, and there are 101376\. Use fewer channels.*backend\(\"eager\"\)"
    )
    with pytest.raises(configurations.DoesNotFitError, match=message):
        configurations.launched("some_operator", "some_kernel", MAP, (5, 16), CANDIDATES, launches(()))
    assert launches.tried == [16, 32, 64]


def test_errors_that_are_not_about_room_are_not_caught(launches):
    def launch(choice: dict[str, int]) -> None:
        launches.tried.append(choice["ROWS"])
        raise RuntimeError("a wrong address")

    with pytest.raises(RuntimeError, match="a wrong address"):
        configurations.launched("some_operator", "some_kernel", MAP, (5, 16), CANDIDATES, launch)
    with configurations.forced("some_kernel", CANDIDATES[1]), pytest.raises(OutOfResources):
        configurations.launched("some_operator", "some_kernel", MAP, (5, 16), CANDIDATES, launches((16,)))
    assert launches.tried == [16, 32]


def test_candidates_are_tried_once_each():
    assert configurations.distinct(iter([*CANDIDATES, *CANDIDATES[::-1]])) == tuple(CANDIDATES)
    separable = [products_candidates(5, 8, 3), forward_candidates(3, 5, True), backward_candidates(3, False)]
    for candidates in (*separable, triton_tiles.forward(triton_tiles.Sizes("ieee", 4, 3, 3, 3, 1, False, "ieee"))):
        assert len({tuple(candidate.items()) for candidate in candidates}) == len(candidates)
    assert len(products_candidates(5, 8, 3)) < len(products_candidates(64, 128, 5))


class Clock:
    """Seconds that a launch takes, by the ROWS of its tiles, instead of measured ones."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.rows = 0

    def launch(self, choice: dict[str, int]) -> None:
        self.rows = choice["ROWS"]

    def time(self, step: Callable[[], None], device: torch.device) -> float:
        step()
        return self.seconds[self.rows]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock({16: 1.0, 32: 1.0, 64: 1.0})
    monkeypatch.setattr(tune, "_time", clock.time)
    return clock


@pytest.mark.parametrize(("times", "best"), [((1.0, 0.9, 0.95), 1), ((1.0, 0.99, 1.2), 0), ((2.0, 3.0, 1.0), 2)])
def test_the_fastest_candidate_if_it_is_clearly_so(clock, times, best):
    clock.seconds = dict(zip((16, 32, 64), times, strict=True))
    found = tune.fastest("some_kernel", CANDIDATES, clock.launch, CPU)
    assert found == (CANDIDATES[best], times[best], times[0])


@pytest.mark.parametrize(
    "error",
    [OutOfResources(200000, 101376, "shared memory"), PTXASError("too many registers"), CompilationError("", None)],
)
def test_candidates_that_do_not_run_are_left_out(clock, capsys, error):
    def launch(choice: dict[str, int]) -> None:
        if choice["ROWS"] == 16:
            raise error
        clock.launch(choice)

    assert tune.fastest("some_kernel", CANDIDATES, launch, CPU).configuration == CANDIDATES[1]
    assert f"some_kernel: {CANDIDATES[0]} does not run here: {type(error).__name__}" in capsys.readouterr().out
    assert tune.fastest("some_kernel", CANDIDATES[:1], launch, CPU) is None


def test_errors_of_another_kind_end_tuning(clock):
    def launch(choice: dict[str, int]) -> None:
        raise RuntimeError("a wrong address")

    with pytest.raises(RuntimeError, match="a wrong address"):
        tune.fastest("some_kernel", CANDIDATES, launch, CPU)


def asked_for(kernel: str, launch: Callable[[dict[str, int]], object], channels: int = 1) -> None:
    configurations.launched("some_operator", kernel, MAP, (channels,), CANDIDATES, launch)


def test_a_kernel_is_timed_alone(clock):
    """The step runs once, to see what it launches: each of its problems, also of one kernel, by itself."""
    calls = []

    def step() -> None:
        calls.append("step")
        asked_for("known", clock.launch)
        asked_for("unknown", clock.launch, 1)
        asked_for("unknown", clock.launch, 2)

    clock.seconds = {16: 3.0, 32: 1.0, 64: 2.0}
    tuned = list(tune._tuned(step, CPU, {configurations.problem("known", MAP, (1,)): {}}))
    problems = [configurations.problem("unknown", MAP, (channels,)) for channels in (1, 2)]
    assert tuned == [("unknown", problem, (CANDIDATES[1], 1.0, 3.0)) for problem in problems] and calls == ["step"]


def test_an_operator_that_does_not_fit_is_left_out(clock, capsys):
    """Its kernels that do run are tuned all the same."""

    def step() -> None:
        asked_for("first", clock.launch)
        raise configurations.DoesNotFitError("the second kernel does not fit")

    clock.seconds = {16: 3.0, 32: 1.0, 64: 2.0}
    assert [kernel for kernel, *_ in tune._tuned(step, CPU, {})] == ["first"]
    assert "the second kernel does not fit" in capsys.readouterr().out


def some_work(clock: Clock, *kernels: str) -> tune.Work:
    def step() -> None:
        for kernel in kernels:
            asked_for(kernel, clock.launch)

    return tune.Work("some work", "float32", lambda device: step)


def test_what_is_known_stays(files, clock):
    """Of other cards and dtypes too; and it is measured again when asked for only."""
    file = files / "user" / "triton.json"
    file.parent.mkdir()
    elsewhere = {"kernel 9.0 float16 1-64": {"ROWS": 128}}
    first, second = (configurations.problem(kernel, MAP, (1,)) for kernel in ("first", "second"))
    file.write_text(json.dumps({**elsewhere, first: {"ROWS": 1}}))
    clock.seconds = {16: 3.0, 32: 1.0, 64: 2.0}
    tune.tune([some_work(clock, "first", "second")], file, CPU)
    assert json.loads(file.read_text()) == {**elsewhere, first: {"ROWS": 1}, second: CANDIDATES[1]}
    clock.seconds = {16: 3.0, 32: 2.0, 64: 1.0}
    tune.tune([some_work(clock, "first")], file, CPU, again=True)
    assert json.loads(file.read_text()) == {**elsewhere, first: CANDIDATES[2], second: CANDIDATES[1]}


def test_again_measures_a_problem_once(files, monkeypatch, clock):
    measured = []
    monkeypatch.setattr(tune, "fastest", lambda kernel, candidates, *_: measured.append(kernel) or tune.Best({}, 1, 1))
    work = some_work(clock, "first")
    tune.tune([work, work], files / "user" / "triton.json", CPU, again=True)
    assert measured == ["first"]


ADDING = """
import sys
from pathlib import Path
from fastsam import tune
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    tune._add(Path(sys.argv[1]), {f"{sys.argv[2]} {number}": {"ROWS": number}})
"""


def test_programs_that_tune_at_a_time_lose_nothing(files):
    """Each waits for the other to be ready, and then writes as often as it can."""
    file, pipes = files / "user" / "triton.json", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    programs = [subprocess.Popen([sys.executable, "-c", ADDING, file, name], **pipes) for name in "ab"]
    assert all(program.stdout.readline() == b"ready\n" for program in programs)
    for program in programs:
        program.communicate(b"\n", timeout=120)
    assert [program.returncode for program in programs] == [0, 0]
    assert configurations.read(file) == {f"{name} {number}": {"ROWS": number} for name in "ab" for number in range(100)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that prefers the last candidate of each kernel, none of which runs; its only number is the last time."""
    ticks = [1.0]

    def time(step: object, device: torch.device) -> float:
        ticks[0] *= 0.9
        return ticks[0]

    monkeypatch.setattr(tune, "_time", time)
    monkeypatch.setattr(tune, "_runs", lambda *_: True)
    return ticks


@pytest.mark.usefixtures("triton_backend")
def test_tuning_every_operator_and_going_on_where_it_was(files, quick, capsys):
    """A second run has nothing left to measure."""
    works = tune.of_operators(tune.Problem("float32", 4, 3, 2, batch=1, kernel_size=3))
    file, selected = files / "user" / "triton.json", backends.selected()
    tune.tune(works, file, DEVICE)
    assert backends.selected() == selected
    results = json.loads(file.read_text())
    assert {key.split()[1] for key in results} == {configurations._capability(DEVICE)}
    operators = {"attention", "separable_gates", "lstm_gates", "memory_gates", "norm_gate"}
    assert all(any(key.startswith(operator) for key in results) for operator in operators)
    for operator, rows in (("lstm_gates", 12), ("memory_gates", 9), ("norm_gate", 3)):
        of_rows = [problem(f"{operator}_norm_backward", rows, norms) for norms in ((1, 0), (1, 1), (2, 0), (2, 1))]
        assert set(of_rows[:2] if operator == "norm_gate" else of_rows[2:]) <= set(results)
    measured, printed = quick[0], capsys.readouterr().out
    tune.tune(works, file, DEVICE)
    assert quick[0] == measured and json.loads(file.read_text()) == results
    for number, operator in enumerate(tune.OPERATORS, 1):
        assert f"[{number}/{len(works)}, " in printed
        assert f"s] {operator} (float32, 3 channels, 4x4)\n" in printed
    assert "  attention_forward: " in printed and " times the default's speed, BLOCK_QUERIES=" in printed
    assert "  attention_forward: " not in capsys.readouterr().out


def problems_in(file: Path) -> set[tuple[str, str]]:
    """Kernels and numbers."""
    return {(key.split()[0], key.split()[3]) for key in configurations.read(file)}


def problem(kernel: str, rows: int, norms: tuple[int, int]) -> str:
    return configurations.problem(kernel, torch.zeros(1, 1, 4, 4, device=DEVICE), (rows, *norms))


@pytest.mark.usefixtures("triton_backend")
def test_gates_without_filters_and_folded_keys(files, quick):
    """What has 0 for a kernel size, and no key map, because keys have as many channels as the maps."""
    works = tune.of_operators(tune.Problem("float32", 4, 3, 3, batch=1, kernel_size=0))[:3]
    tune.tune(works, files / "results.json", DEVICE)
    found = problems_in(files / "results.json")
    assert {("attention_forward", f"3-3-3-{sources}-0-16") for sources in (1, 2)} <= found
    assert ("separable_gates_backward", "3-3-0-16") in found


@pytest.mark.usefixtures("triton_backend")
def test_tuning_a_model(files, quick):
    """What three steps of its training launch: every kind of gate with its norms, and attention over windows."""
    options = {"hidden_channels": [3], "patch_size": 2, "embed_channels": 3, "scales": [1, 2]}
    work = tune.of_model("cms_lstm", "float32", 8, options, batch=1)
    tune.tune([work], files / "results.json", DEVICE)
    found = problems_in(files / "results.json")
    assert {("attention_forward", f"3-3-3-1-0-{positions}") for positions in (32, 8)} <= found
    kernels = {kernel for kernel, _ in found}
    assert {"attention_column_gradients", "lstm_gates_norm_backward", "norm_gate_norm_backward"} <= kernels


def test_a_model_that_does_not_take_its_options(monkeypatch, capsys):
    monkeypatch.setattr(backends, "unsupported", lambda *_: None)
    with pytest.raises(SystemExit):
        tune.main(["--model", "cms_lstm", "--options", '{"scale_count": 3}'])
    assert "scale_count" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("file/triton.json", "name another with --file or FASTSAM_CACHE"),
        ("folder", "name another with --file or FASTSAM_CACHE"),
        ("file", "is not JSON"),
    ],
)
def test_an_unusable_file_is_told_before_anything_is_measured(monkeypatch, tmp_path, capsys, name, expected):
    monkeypatch.setattr(backends, "unsupported", lambda *_: None)
    monkeypatch.setattr(tune, "tune", lambda *_, **__: pytest.fail("measures"))
    (tmp_path / "file").write_text("no results")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        tune.main(["--file", str(tmp_path / name)])
    assert expected in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder", "file.lock"}
    assert (tmp_path / "file").read_text() == "no results"


def works_of(*arguments: str) -> list[str]:
    return [f"{work.kind}: {work.name}" for work in tune._of_command_line(tune._parser().parse_args(arguments))]


def test_the_command_line():
    names = works_of("--dtypes", "tf32", "--sizes", "8", "16", "--channels", "32", "--batch", "2", "--kernel-size", "0")
    assert names[0] == "tf32: double_attention (tf32, 32 channels, 8x8)" and len(names) == 2 * len(tune.OPERATORS)
    assert len(works_of()) == len(tune.DTYPES) * 3 * len(tune.OPERATORS)
    options = ["--options", '{"hidden_channels": [4]}']
    names = works_of("--model", "sa_convlstm", "--dtypes", "tf32", "float16", *options)
    assert names == [f"{kind}: sa_convlstm ({kind}, frames of 64x64)" for kind in ("tf32", "float16")]


def test_without_a_card(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "the back end triton does not run here: PyTorch sees no CUDA device" in capsys.readouterr().err
