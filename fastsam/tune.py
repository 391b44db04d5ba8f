"""Measuring the tile sizes of the Triton kernels: `python -m fastsam tune`."""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam import backends, ops
from fastsam.modules import SAM, SelfAttention
from fastsam.ops._triton import configurations
from fastsam.ops._triton.configurations import Asked, Configuration, DoesNotFitError

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WORTHWHILE = 0.98
"""A candidate replaces the default when it takes at most this part of its time: less is noise."""

ROUNDS = 5

Step = Callable[[], None]
Launch = Callable[[Configuration], Any]


class Problem(NamedTuple):
    """Maps (batch, channels, size, size), D attention channels and k x k depthwise filters, in a key of DTYPES."""

    kind: str
    size: int
    channels: int
    attention_channels: int = 16
    batch: int = 8
    kernel_size: int = 5

    def __str__(self) -> str:
        return f"{self.kind}, {self.channels} channels, {self.size}x{self.size}"


class Best(NamedTuple):
    """A kernel's best configuration, and the seconds of its launch with that and with the default one."""

    configuration: Configuration
    seconds: float
    default_seconds: float


def tune(problems: Sequence[Problem], file: Path, device: torch.device, *, again: bool = False) -> None:
    """Time every kernel of every operator with each of its candidates, and write the best ones to the file.

    The file is written after every kernel, and what is in it already is not measured again unless `again`.
    """
    results = {} if again else configurations.read(file)
    precision, start = torch.get_float32_matmul_precision(), time.perf_counter()
    calls = list(itertools.product(problems, OPERATORS))
    try:
        with backends.backend("triton"):
            for number, (problem, operator) in enumerate(calls, 1):
                elapsed = time.perf_counter() - start
                print(f"[{number}/{len(calls)}, {elapsed:.0f} s] {operator} ({problem})", flush=True)
                for kernel, key, best in _tuned(step_of(operator, problem, device), device, results):
                    results[key] = best.configuration
                    _write(file, results)
                    print(f"  {kernel}: {_in_words(best)}", flush=True)
    finally:
        torch.set_float32_matmul_precision(precision)
        configurations.forget()


def _in_words(best: Best) -> str:
    tiles = ", ".join(f"{name}={size}" for name, size in best.configuration.items())
    return f"{1e6 * best.seconds:.1f} us, {best.default_seconds / best.seconds:.2f} times the default's speed, {tiles}"


def _write(file: Path, results: dict[str, Any]) -> None:
    """Write the results; whoever reads meanwhile finds the old ones or the new ones, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _tuned(step: Step, device: torch.device, known: dict[str, Any]) -> Iterator[tuple[str, str, Best]]:
    """The kernels that the step runs, their keys in the results, and the best configurations."""
    with configurations.recorded() as asked:
        try:
            step()
        except DoesNotFitError as error:
            print(f"  {error}", flush=True)
    for kernel, of in asked.items():
        if of.problem in known or len(of.candidates) == 1:
            continue
        best = fastest(kernel, of.candidates, _launch_of(kernel, of, step), device)
        if best is not None:
            yield kernel, of.problem, best


def _launch_of(kernel: str, asked: Asked, step: Step) -> Launch:
    """What runs the kernel with a configuration: its launch where that can be had alone, else the step."""

    def run_step(candidate: Configuration) -> None:
        with configurations.forced(kernel, candidate):
            step()

    return asked.launch or run_step


def fastest(kernel: str, candidates: Sequence[Configuration], launch: Launch, device: torch.device) -> Best | None:
    """The candidate with the shortest median time; the first where no other is clearly better, None where none runs."""
    usable = [candidate for candidate in candidates if _runs(kernel, candidate, launch)]
    if not usable:
        return None
    laps: list[list[float]] = [[] for _ in usable]
    for _ in range(ROUNDS):
        for candidate, taken in zip(usable, laps, strict=True):
            taken.append(_time(lambda candidate=candidate: launch(candidate), device))  # type: ignore[misc]
    medians = [statistics.median(taken) for taken in laps]
    best = min(range(len(usable)), key=medians.__getitem__)
    best = best if medians[best] <= WORTHWHILE * medians[0] else 0
    return Best(usable[best], medians[best], medians[0])


def _runs(kernel: str, candidate: Configuration, launch: Launch) -> bool:
    """Whether the kernel compiles, and the card has the registers and the shared memory."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        launch(candidate)
    except (OutOfResources, PTXASError, CompilationError) as error:
        print(f"  {kernel}: {candidate} does not run here: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def _time(step: Step, device: torch.device) -> float:
    """Seconds of one step: on a card the mean over enough of them to hide what the host does."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    from triton.testing import do_bench

    milliseconds: float = do_bench(step, warmup=5, rep=20)
    return milliseconds / 1000


class _Draw:
    """Random tensors for a problem."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.placement: dict[str, Any] = {"device": device, "dtype": DTYPES[problem.kind]}

    def map(self, channels: int) -> Tensor:
        """A map that gets a gradient."""
        size = self.problem.size
        return torch.randn(self.problem.batch, channels, size, size, requires_grad=True, **self.placement)

    def norm(self, rows: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm."""
        return torch.randn(rows, **self.placement), torch.randn(rows, **self.placement)


def _operands(weights: Any) -> dict[str, Any]:
    """A module's folded weights, each of which gets a gradient."""
    named = weights._asdict().items()
    return {name: weight.detach().requires_grad_() for name, weight in named if weight is not None}


def _double_attention(draw: _Draw) -> Step:
    of = draw.problem
    operands = _operands(SAM(of.channels, of.attention_channels, of.kernel_size, **draw.placement).fold())
    return _step(lambda h, m: ops.double_attention(h, m, **operands), draw.map(of.channels), draw.map(of.channels))


def _self_attention(draw: _Draw) -> Step:
    of = draw.problem
    operands = _operands(SelfAttention(of.channels, of.attention_channels, **draw.placement).fold())
    return _step(lambda x: ops.self_attention(x, **operands), draw.map(of.channels))


def _separable_gates(draw: _Draw) -> Step:
    of = draw.problem
    sam = SAM(of.channels, of.attention_channels, of.kernel_size, **draw.placement)
    weights = (sam.depthwise.weight, sam.pointwise.weight, sam.pointwise.bias)
    maps = [draw.map(of.channels) for _ in range(3)]
    return _step(lambda z, h, m: ops.separable_gates(z, h, m, *weights), *maps)


def _gates(operator: Callable[..., Any], count: int, normalised: bool) -> Callable[[_Draw], Step]:
    """A step of lstm_gates or memory_gates, `count` gates in two summands."""

    def make(draw: _Draw) -> Step:
        channels, norms = draw.problem.channels, {}
        if normalised:
            rows = {"norm": count * channels, "recurrent_norm": count * channels, "state_norm": channels}
            norms = {name: draw.norm(size) for name, size in rows.items()}
        maps = [draw.map(count * channels), draw.map(channels), draw.map(count * channels)]
        return _step(lambda gates, state, recurrent: operator(gates, state, recurrent=recurrent, **norms), *maps)

    return make


def _norm_gate(draw: _Draw) -> Step:
    channels = draw.problem.channels
    norm = draw.norm(channels)
    return _step(lambda x, y: ops.norm_gate(x, y, norm=norm), draw.map(channels), draw.map(channels))


OPERATORS: dict[str, Callable[[_Draw], Step]] = {
    "double_attention": _double_attention,
    "self_attention": _self_attention,
    "separable_gates": _separable_gates,
    "lstm_gates": _gates(ops.lstm_gates, 4, False),
    "lstm_gates with norms": _gates(ops.lstm_gates, 4, True),
    "memory_gates": _gates(ops.memory_gates, 3, False),
    "memory_gates with norms": _gates(ops.memory_gates, 3, True),
    "norm_gate": _norm_gate,
}


def step_of(operator: str, problem: Problem, device: torch.device) -> Step:
    """Forward and backward of an operator, by its name in OPERATORS."""
    torch.set_float32_matmul_precision("high" if problem.kind == "tf32" else "highest")
    torch.manual_seed(0)
    return OPERATORS[operator](_Draw(problem, device))


def _step(function: Callable[..., Any], *inputs: Tensor) -> Step:
    def step() -> None:
        outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.autograd.backward(outputs, [output.detach() for output in outputs])

    return step


def main(arguments: Sequence[str]) -> None:
    """The command line of `python -m fastsam tune`."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsam tune",
        description="Measure the tile sizes of the Triton kernels on the current CUDA device, and keep the best.",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="by default all")
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 32, 64], help="height and width of the maps")
    parser.add_argument("--channels", nargs="+", type=int, default=[64], help="of the maps (64)")
    parser.add_argument("--file", type=Path, help=f"to write to ({configurations.user_file()})")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file already")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    reason = backends.unsupported("double_attention", "triton", device, torch.float32)
    if reason is not None:
        parser.error(f"the back end triton does not run here: {reason}")
    order = itertools.product(options.channels, options.dtypes, options.sizes)
    problems = [Problem(kind, size, channels) for channels, kind, size in order]
    tune(problems, options.file or configurations.user_file(), device, again=options.again)
