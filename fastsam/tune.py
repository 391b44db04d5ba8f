"""Measuring the tile sizes of the Triton kernels: `python -m fastsam tune`."""

import argparse
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
from fastsam.ops._triton.configurations import Configuration

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WORTHWHILE = 0.98
"""A candidate replaces the default when it takes at most this part of its time: less is noise."""

ROUNDS = 5

Step = Callable[[], None]


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


def tune(problems: Sequence[Problem], file: Path, device: torch.device, *, again: bool = False) -> None:
    """Time forward and backward of every operator with each candidate of each kernel, and write the best to the file.

    The file is written after every kernel, and what is in it already is not measured again unless `again`.
    """
    results = {} if again else configurations.read(file)
    precision = torch.get_float32_matmul_precision()
    with backends.backend("triton"):
        for problem in problems:
            for operator, step in steps(problem, device):
                for key, best in _tuned(step, device, results):
                    results[key] = best
                    _write(file, results)
                    print(f"{operator} ({problem}): {key}: {best}", flush=True)
    torch.set_float32_matmul_precision(precision)
    configurations.forget()


def _write(file: Path, results: dict[str, Any]) -> None:
    """Write the results; whoever reads meanwhile finds the old ones or the new ones, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _tuned(step: Step, device: torch.device, known: dict[str, Any]) -> Iterator[tuple[str, Configuration]]:
    """The best configuration of each kernel that the step runs, by its key in the results."""
    with configurations.recorded() as asked:
        step()
    for kernel, (key, candidates) in asked.items():
        if key in known or len(candidates) == 1:
            continue
        yield key, fastest(kernel, candidates, step, device)


def fastest(kernel: str, candidates: Sequence[Configuration], step: Step, device: torch.device) -> Configuration:
    """The candidate with the shortest median time of the step; the first where no other is clearly better."""
    usable = [candidate for candidate in candidates if _runs(kernel, candidate, step)]
    if not usable:
        raise RuntimeError(f"fastsam: none of the tile sizes of the Triton kernel {kernel} runs on {device}")
    laps: list[list[float]] = [[] for _ in usable]
    for _ in range(ROUNDS):
        for candidate, taken in zip(usable, laps, strict=True):
            with configurations.forced(kernel, candidate):
                taken.append(_time(step, device))
    medians = [statistics.median(taken) for taken in laps]
    best = min(range(len(usable)), key=medians.__getitem__)
    return usable[best] if medians[best] <= WORTHWHILE * medians[0] else usable[0]


def _runs(kernel: str, candidate: Configuration, step: Step) -> bool:
    """Whether the card has the registers and the shared memory; compiles, too."""
    from triton.runtime.errors import OutOfResources

    try:
        with configurations.forced(kernel, candidate):
            step()
    except OutOfResources as error:
        print(f"{kernel}: {candidate} does not run here: {error}", flush=True)
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


def steps(problem: Problem, device: torch.device) -> Iterator[tuple[str, Step]]:
    """Forward and backward of what calls the operators, by its name."""
    torch.set_float32_matmul_precision("high" if problem.kind == "tf32" else "highest")
    torch.manual_seed(0)
    channels = problem.channels
    placement: dict[str, Any] = {"device": device, "dtype": DTYPES[problem.kind]}

    def draw(count: int) -> Tensor:
        return torch.randn(problem.batch, count, problem.size, problem.size, requires_grad=True, **placement)

    sam = SAM(channels, problem.attention_channels, problem.kernel_size, **placement)
    yield "SAM", _step(sam, draw(channels), draw(channels))
    yield "SelfAttention", _step(SelfAttention(channels, problem.attention_channels, **placement), draw(channels))
    weights = [torch.randn(4 * channels, **placement) for _ in range(4)]
    norms: dict[str, Any] = {"norm": (weights[0], weights[1]), "recurrent_norm": (weights[2], weights[3])}
    gates = [draw(4 * channels), draw(channels), draw(4 * channels)]
    yield "lstm_gates", _step(lambda x, c, recurrent: ops.lstm_gates(x, c, recurrent=recurrent, **norms), *gates)
    yield "lstm_gates without norms", _step(lambda x, c, recurrent: ops.lstm_gates(x, c, recurrent=recurrent), *gates)


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
    problems = [Problem(*of) for of in _product(options.dtypes, options.sizes, options.channels)]
    tune(problems, options.file or configurations.user_file(), device, again=options.again)


def _product(kinds: Sequence[str], sizes: Sequence[int], channels: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    return ((kind, size, count) for count in channels for kind in kinds for size in sizes)
