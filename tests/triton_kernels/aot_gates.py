"""What the ahead-of-time test compiles of the operators on gates: the launches of ordinary calls, and of odd sizes.

The operators' own functions run with a `run` that writes down what it is asked to launch, so that signatures, constants
and tile sizes are those of real calls.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastsam.ops._gates import triton as gates
from fastsam.ops._gates.update import Term, Update
from fastsam.ops.separable_gates import triton as separable_gates

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SIZE = (64, 64)
ODD_SIZE = (15, 17)


class Case(NamedTuple):
    """A kernel to compile; `tensor_cores` says that its machine code has to use them."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int
    tensor_cores: bool


class _Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def _launches_of(module: Any, call: Callable[[], Any]) -> list[_Launch]:
    """What `call` asks a module of an operator to launch."""
    launches: list[_Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
        launches.append(_Launch(kernel, arguments, constants))

    with mock.patch.object(module, "run", record):
        call()
    return launches


def _case(name: str, launch: _Launch) -> Case:
    """The types that Triton would find at this call, and which arguments are multiples of 16; 1 is a constant."""
    constants, attributes, types = dict(launch.constants), {}, {}
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)
    for index, (parameter, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None:
            constants[parameter] = None
        elif isinstance(value, float):
            types[parameter] = "fp32"
        elif not isinstance(value, Tensor) and value == 1 and parameter not in launch.kernel.do_not_specialize:
            constants[parameter] = 1
        else:
            types[parameter] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (value % 16 == 0 and parameter not in launch.kernel.do_not_specialize):
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature = {parameter: types.get(parameter, "constexpr") for parameter in launch.kernel.arg_names}
    kernel_name = launch.kernel.fn.__name__
    half = launch.arguments[0] is not None and launch.arguments[0].dtype != torch.float32
    tensor_cores = "PRECISION" in constants and (half or constants["PRECISION"] == "tf32")
    name = f"{name} {kernel_name}"
    return Case(name, launch.kernel, signature, constants, attributes, warps, stages, tensor_cores)


def _gates_cases(
    update: Update, dtype: torch.dtype, channels: int, norm: str | None, size: tuple[int, int] = SIZE
) -> Iterator[Case]:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    rows, c = update.gates * channels, new(2, channels, *size)
    shape = (rows,) if norm == "channel" else (rows, *size)
    weights = [(None, None) if norm is None else (new(*shape), new(*shape)) for _ in range(2)]
    terms = [Term(new(2, rows, *size), *pair) for pair in weights]
    statistics, dc_new = torch.empty(0 if norm is None else 2, 2, 2), c if update.keeps_state else None
    launches = _launches_of(gates, lambda: gates.forward(update, terms, c, 1e-5))
    launches += _launches_of(gates, lambda: gates.backward(update, c, dc_new, terms, c, statistics))
    for launch in launches:
        yield _case(f"{update.kind} {update.form} {dtype} C={channels} norm={norm}", launch)


def _separable_cases(
    dtype: torch.dtype, precision: str, channels: int, kernel_size: int | None, size: tuple[int, int] = SIZE
) -> Iterator[Case]:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    maps = [new(2, channels, *size) for _ in range(3)]
    depthwise = None if kernel_size is None else new(2 * channels, 1, kernel_size, kernel_size)
    arguments = (*maps, depthwise, new(3 * channels, 2 * channels, 1, 1), new(3 * channels))
    with mock.patch.object(separable_gates, "precision", lambda like: precision):
        launches = _launches_of(separable_gates, lambda: separable_gates.forward(*arguments))
        launches += _launches_of(separable_gates, lambda: separable_gates.backward(*maps[:2], *arguments))
    for launch in launches:
        yield _case(f"separable_gates {dtype} {precision} C={channels} k={kernel_size}", launch)


def aot_cases() -> Iterator[Case]:
    """Every launch of the operators, forward and backward, in the default configurations."""
    lstm, memory = Update("lstm", "hidden", 1.0), Update("memory", "hidden")
    for norm in (None, "channel", "position"):
        yield from _gates_cases(lstm, torch.float32, 64, norm)
    yield from _gates_cases(lstm, torch.bfloat16, 128, "channel")
    yield from _gates_cases(lstm._replace(form="gate"), torch.float16, 37, "position", ODD_SIZE)
    yield from _gates_cases(memory, torch.float32, 64, "channel")
    yield from _gates_cases(memory._replace(form="gate"), torch.bfloat16, 64, "position")
    yield from _gates_cases(memory, torch.float32, 37, None, ODD_SIZE)
    yield from _gates_cases(Update("product", "tanh", 1.0), torch.float32, 64, "position")
    yield from _gates_cases(Update("product", "identity", 1.0), torch.bfloat16, 64, "channel")
    yield from _gates_cases(
        Update("product", "sigmoid", 2.0, keeps_state=False), torch.float32, 37, "channel", ODD_SIZE
    )
    for channels in (64, 128, 256):
        yield from _separable_cases(torch.float32, "tf32", channels, 5)
        yield from _separable_cases(torch.bfloat16, "ieee", channels, 5)
    for channels in (64, 256):
        yield from _separable_cases(torch.float32, "ieee", channels, 5)
    yield from _separable_cases(torch.float32, "tf32", 64, None)
    yield from _separable_cases(torch.float16, "ieee", 64, 7)
    yield from _separable_cases(torch.float32, "tf32", 40, 5, ODD_SIZE)
    yield from _separable_cases(torch.bfloat16, "ieee", 37, 5, ODD_SIZE)
