"""Measuring the tile sizes of the Triton kernels: `python -m fastsam tune`."""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam import backends, models, ops
from fastsam.modules import SAM, Forecaster, SelfAttention
from fastsam.ops._triton import configurations
from fastsam.ops._triton.configurations import Configuration, DoesNotFitError

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WORTHWHILE = 0.98
"""A candidate replaces the default when it takes at most this part of its time: less is noise."""

ROUNDS = 5

BATCH = 8

Step = Callable[[], None]
Launch = Callable[[Configuration], Any]


class Problem(NamedTuple):
    """Maps (batch, channels, size, size), D attention channels and k x k depthwise filters, in a key of DTYPES.

    D of as many channels as the maps is folded into the scores; a kernel_size of 0 is that of gates without filters.
    """

    kind: str
    size: int
    channels: int
    attention_channels: int = 16
    batch: int = BATCH
    kernel_size: int = 5

    def __str__(self) -> str:
        return f"{self.kind}, {self.channels} channels, {self.size}x{self.size}"


class Work(NamedTuple):
    """Something whose kernels are to be measured: its name, its key of DTYPES, and what makes a step of it."""

    name: str
    kind: str
    step_on: Callable[[torch.device], Step]


class Best(NamedTuple):
    """A kernel's best configuration, and the seconds of its launch with that and with the default one."""

    configuration: Configuration
    seconds: float
    default_seconds: float


def tune(works: Sequence[Work], file: Path, device: torch.device, *, again: bool = False) -> None:
    """Time every kernel that a step of each work launches with each of its candidates, and keep the best in the file.

    The file is written after every kernel. What is in it already stays there, and is measured once more with `again`
    only.
    """
    measured: dict[str, Configuration] = {}
    precision, start = torch.get_float32_matmul_precision(), time.perf_counter()
    try:
        with backends.backend("triton"):
            for number, work in enumerate(works, 1):
                print(f"[{number}/{len(works)}, {time.perf_counter() - start:.0f} s] {work.name}", flush=True)
                torch.set_float32_matmul_precision("high" if work.kind == "tf32" else "highest")
                torch.manual_seed(0)
                known = measured if again else configurations.read(file)
                for kernel, key, best in _tuned(work.step_on(device), device, known):
                    measured[key] = best.configuration
                    _add(file, {key: best.configuration})
                    print(f"  {kernel}: {_in_words(best)}", flush=True)
    finally:
        torch.set_float32_matmul_precision(precision)
        configurations.forget()


def _in_words(best: Best) -> str:
    tiles = ", ".join(f"{name}={size}" for name, size in best.configuration.items())
    return f"{1e6 * best.seconds:.1f} us, {best.default_seconds / best.seconds:.2f} times the default's speed, {tiles}"


def _add(file: Path, found: dict[str, Configuration]) -> None:
    """Add results to the file; whoever reads meanwhile finds the old ones or the new ones, whole.

    Several programs may tune at a time, for several cards or dtypes: none loses what another has found.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.with_suffix(".lock")):
        unfinished = file.with_suffix(f".{os.getpid()}")
        results = {**configurations.read(file), **found}
        unfinished.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        unfinished.replace(file)


def _try(file: Path) -> None:
    """Read the file, if there is one, and write it as it is; OSError or ValueError where that fails."""
    if file.exists():
        file.read_bytes()
    _add(file, {})


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One program at a time is inside, on systems and file systems that have locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tuned(step: Step, device: torch.device, known: dict[str, Any]) -> Iterator[tuple[str, str, Best]]:
    """The kernels that the step runs, their keys in the results, and the best configurations."""
    with configurations.recorded() as asked:
        try:
            step()
        except DoesNotFitError as error:
            print(f"  {error}", flush=True)
    for problem, of in asked.items():
        if problem in known or len(of.candidates) == 1:
            continue
        best = fastest(of.kernel, of.candidates, of.launch, device)
        if best is not None:
            yield of.kernel, problem, best


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

    def norm(self, rows: int, of: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm, one of each row ("channel") or of each row and position ("position")."""
        shape = (rows,) if of == "channel" else (rows, self.problem.size, self.problem.size)
        return torch.randn(shape, **self.placement), torch.randn(shape, **self.placement)

    def sam(self) -> SAM:
        """A SAM whose weights are those of the attention and of the gates."""
        of = self.problem
        return SAM(of.channels, of.attention_channels, of.kernel_size or None, **self.placement)


def _operands(weights: Any) -> dict[str, Any]:
    """A module's folded weights, each of which gets a gradient."""
    named = weights._asdict().items()
    return {name: weight.detach().requires_grad_() for name, weight in named if weight is not None}


def _double_attention(draw: _Draw) -> Step:
    of = draw.problem
    operands = _operands(draw.sam().fold())
    return _step(lambda h, m: ops.double_attention(h, m, **operands), draw.map(of.channels), draw.map(of.channels))


def _self_attention(draw: _Draw) -> Step:
    of = draw.problem
    operands = _operands(SelfAttention(of.channels, of.attention_channels, **draw.placement).fold())
    return _step(lambda x: ops.self_attention(x, **operands), draw.map(of.channels))


def _separable_gates(draw: _Draw) -> Step:
    of = draw.problem
    sam = draw.sam()
    weights = (sam.depthwise.weight if of.kernel_size else None, sam.pointwise.weight, sam.pointwise.bias)
    maps = [draw.map(of.channels) for _ in range(3)]
    return _step(lambda z, h, m: ops.separable_gates(z, h, m, *weights), *maps)


def _gates(operator: Callable[..., Any], count: int, norms: str | None = None) -> Callable[[_Draw], Step]:
    """A step of lstm_gates or memory_gates, `count` gates in two summands; norms of "channel" or "position"."""

    def make(draw: _Draw) -> Step:
        channels = draw.problem.channels
        of_terms: dict[str, tuple[Tensor, Tensor]] = {}
        if norms is not None:
            rows = {"norm": count * channels, "recurrent_norm": count * channels, "state_norm": channels}
            of_terms = {name: draw.norm(size, norms) for name, size in rows.items()}
        maps = [draw.map(count * channels), draw.map(channels), draw.map(count * channels)]
        return _step(lambda gates, state, recurrent: operator(gates, state, recurrent=recurrent, **of_terms), *maps)

    return make


def _norm_gate(norms: str) -> Callable[[_Draw], Step]:
    def make(draw: _Draw) -> Step:
        channels = draw.problem.channels
        norm = draw.norm(channels, norms)
        return _step(lambda x, y: ops.norm_gate(x, y, norm=norm), draw.map(channels), draw.map(channels))

    return make


OPERATORS: dict[str, Callable[[_Draw], Step]] = {
    "double_attention": _double_attention,
    "self_attention": _self_attention,
    "separable_gates": _separable_gates,
    "lstm_gates": _gates(ops.lstm_gates, 4),
    "lstm_gates with norms": _gates(ops.lstm_gates, 4, "channel"),
    "lstm_gates with norms of positions": _gates(ops.lstm_gates, 4, "position"),
    "memory_gates": _gates(ops.memory_gates, 3),
    "memory_gates with norms": _gates(ops.memory_gates, 3, "channel"),
    "memory_gates with norms of positions": _gates(ops.memory_gates, 3, "position"),
    "norm_gate": _norm_gate("channel"),
    "norm_gate with a norm of positions": _norm_gate("position"),
}


def of_operators(problem: Problem) -> list[Work]:
    """Forward and backward of every operator."""
    return [
        Work(f"{name} ({problem})", problem.kind, partial(_step_of, make, problem)) for name, make in OPERATORS.items()
    ]


def _step_of(make: Callable[[_Draw], Step], problem: Problem, device: torch.device) -> Step:
    return make(_Draw(problem, device))


def of_model(name: str, kind: str, size: int, options: dict[str, Any], batch: int = BATCH) -> Work:
    """Training of a model of `fastsam.MODELS` with these options, on frames (batch, T, C, size, size).

    Raises:
        TypeError, ValueError: no such model; an option that it does not take.
    """
    if name in models.MODELS and models.MODELS[name].takes_frame_size:
        options = {"frame_size": (size, size), **options}
    model = models.build(name, **options)
    return Work(f"{name} ({kind}, frames of {size}x{size})", kind, partial(_training, model, kind, size, batch))


def _training(model: Forecaster, kind: str, size: int, batch: int, device: torch.device) -> Step:
    """Three steps of time: the first has no states yet, the last no gradients of new ones, the other has both."""
    placement: dict[str, Any] = {"device": device, "dtype": DTYPES[kind]}
    model.to(**placement)
    frames = torch.rand(batch, 2, model.in_channels, size, size, **placement)
    return _step(lambda frames: model(frames, horizon=2), frames)


def _step(function: Callable[..., Any], *inputs: Tensor) -> Step:
    def step() -> None:
        outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.autograd.backward(outputs, [output.detach() for output in outputs])

    return step


def main(arguments: Sequence[str]) -> None:
    """The command line of `python -m fastsam tune`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    reason = backends.unsupported("double_attention", "triton", device, torch.float32)
    if reason is not None:
        parser.error(f"the back end triton does not run here: {reason}")
    try:
        works = _of_command_line(options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    file = options.file or configurations.user_file()
    try:
        _try(file)
    except OSError as error:
        parser.error(f"{file} cannot be read and written ({error}): name another with --file or FASTSAM_CACHE")
    except ValueError as error:
        parser.error(str(error))
    tune(works, file, device, again=options.again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastsam tune",
        description="Measure the tile sizes of the Triton kernels on the current CUDA device, and keep the best.",
    )
    parser.add_argument("--model", choices=models.MODELS, help="only the kernels that training this model launches")
    parser.add_argument("--options", type=json.loads, help="of the model, in JSON: '{\"hidden_channels\": [32, 32]}'")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="by default all")
    parser.add_argument("--sizes", nargs="+", type=int, help="of maps (16 32 64); with --model of frames (64)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples ({BATCH})")
    parser.add_argument("--file", type=Path, help=f"to write to ({configurations.user_file()})")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file already")
    operators = parser.add_argument_group("what the operators are measured on, without --model")
    operators.add_argument("--channels", nargs="+", type=int, default=[64], help="of the maps (64)")
    operators.add_argument("--attention-channels", type=int, default=16, help="(16); as many as the maps': folded keys")
    operators.add_argument("--kernel-size", type=int, default=5, help="of the depthwise filters (5), 0 for 1x1 gates")
    return parser


def _of_command_line(options: argparse.Namespace) -> list[Work]:
    """What is to be measured."""
    if options.model is not None:
        of_model_in = partial(of_model, options.model, options=options.options or {}, batch=options.batch)
        return [of_model_in(kind, size) for kind in options.dtypes for size in options.sizes or [64]]
    order = itertools.product(options.channels, options.dtypes, options.sizes or [16, 32, 64])
    rest = (options.attention_channels, options.batch, options.kernel_size)
    return [work for channels, kind, size in order for work in of_operators(Problem(kind, size, channels, *rest))]
