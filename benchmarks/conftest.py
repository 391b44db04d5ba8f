"""Options of the benchmarks, the check and timing of a case, and the report at the end of a run."""

import time
from typing import Any

import pytest
import torch

from benchmarks import cases, machine, report
from benchmarks.run import Run
from benchmarks.timing import stopwatch

DTYPES = ("float32", "float64", "bfloat16", "float16")


_RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsam benchmarks")
    group.addoption("--quick", action="store_true", help="small maps, no torch.compile: two minutes on two cores")
    group.addoption("--device", help="cpu or cuda; by default cuda where there is one")
    group.addoption("--dtype", choices=DTYPES, default="float32", help="of inputs and parameters")
    group.addoption("--tf32", action="store_true", help="let float32 matrix products and convolutions use tf32")
    group.addoption(
        "--compile-limit", type=float, metavar="SECONDS", help="compile no more variants this long after the start"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our report takes the place of pytest-benchmark's table
    device = _device(config.getoption("--device"))
    dtype = getattr(torch, config.getoption("--dtype"))
    tf32, quick = config.getoption("--tf32"), config.getoption("--quick")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    limit = config.getoption("--compile-limit")
    limit = (0.0 if quick else float("inf")) if limit is None else limit
    config.stash[_RUN] = Run(
        device,
        dtype,
        quick,
        compile_until=time.monotonic() + limit,
        budget=1.0 if quick else 6.0,
        machine=machine.facts(device, dtype),
        stopwatch=stopwatch(device),
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device is {name!r}, it must be cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is cuda, but PyTorch sees no CUDA device here")
    return torch.device(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run = metafunc.config.stash[_RUN]
    listed = {"speed_case": cases.speed_cases(run.device.type, run.quick), "memory_case": cases.memory_cases(run.quick)}
    for name in listed.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, listed[name], ids=lambda case: str(case).replace(", ", "-").replace(" ", "_"))


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    """The run, with the rates of the machine measured."""
    found = request.config.stash[_RUN]
    if "rates" not in found.machine:
        found.machine["rates"] = machine.rates(found.device, found.dtype)
    return found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastsam"] = config.stash[_RUN].machine


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[_RUN]
    if run.records:
        terminalreporter.section("fastsam benchmarks")
        terminalreporter.write_line(report.text(run.machine, run.records))
