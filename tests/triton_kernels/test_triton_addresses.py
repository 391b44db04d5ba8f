"""Offsets of tensors with more than 2^31 numbers: programs run on no memory, and their addresses are looked at.

Real tensors of that size do not fit many machines. Here the operators get tensors without memory, loads give zeros, and
of all programs of a launch some run, those of the last positions among them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from fastsam.ops._attention import Source
from fastsam.ops._attention import triton as attention
from fastsam.ops._gates import triton as gates
from fastsam.ops._gates.update import Term, Update, new_statistics
from fastsam.ops._triton.launch import ceil_div
from fastsam.ops.separable_gates import triton as separable_gates

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no card")

APART = 2**44
"""Bytes between the addresses of two tensors: more than any of them has."""


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Memory:
    """What is called instead of the interpreter's loads and stores; notes the addresses that are not masked."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.touched: list[numpy.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._note(pointers, mask)
        return numpy.zeros(pointers.shape, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        self._note(pointers, mask)

    def _note(self, pointers: Any, mask: Any) -> None:
        self.touched.append(numpy.broadcast_to(pointers, mask.shape)[mask].astype(numpy.int64))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", memory)
    return memory


def new(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def launches(module: Any, call: Callable[[], Any]) -> Iterator[Launch]:
    """What `call` asks a module to launch, but for sums of parts, which are small and take a loop over all parts."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
        found.append(Launch(kernel, grid[0], arguments, constants))

    with mock.patch.object(module, "run", record):
        call()
    return (launch for launch in found if "sum" not in launch.kernel.fn.__name__)


def offsets(memory: Memory, launch: Launch, programs: Sequence[int]) -> dict[str, tuple[Tensor, numpy.ndarray]]:
    """The tensors that these programs touch, by the names of the arguments, and at which of their numbers."""
    memory.touched.clear()
    names = launch.kernel.arg_names
    tensors = {name: value for name, value in zip(names, launch.arguments, strict=False) if isinstance(value, Tensor)}
    bases = {name: APART * (index + 1) for index, name in enumerate(tensors)}
    arguments = [
        pointer(bases[name], value) if name in bases else value
        for name, value in zip(names, launch.arguments, strict=False)
    ]
    for program in programs:
        number = interpreter.TensorHandle(numpy.array([program], numpy.int32), tl.int32)
        with mock.patch.object(interpreter.InterpreterBuilder, "create_get_program_id", return_value=number):
            launch.kernel[(1,)](*arguments, **launch.constants)
    addresses = numpy.concatenate(memory.touched)
    owners = (addresses + APART // 2) // APART  # the nearest one, also of an address before it
    assert set(owners) <= set(range(1, len(bases) + 1)), "an address that is near no tensor"
    of = ((name, base, addresses[owners == base // APART]) for name, base in bases.items())
    return {name: (tensors[name], (found - base) // tensors[name].itemsize) for name, base, found in of if found.size}


def pointer(address: int, like: Tensor) -> tl.tensor:
    kind = tl.pointer_type({torch.float32: tl.float32}[like.dtype])
    return tl.tensor(interpreter.TensorHandle(numpy.array([address], numpy.uint64), kind), kind)


def assert_inside_and_to_the_end(found: dict[str, tuple[Tensor, numpy.ndarray]], large: set[str]) -> None:
    """No number before or behind a tensor, and of each large one the last."""
    assert large <= set(found)
    for name, (tensor, numbers) in found.items():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        assert numbers.min() >= 0 and numbers.max() <= last, f"{name}: {numbers.min()} to {numbers.max()}, not {last}"
        assert name not in large or numbers.max() == last, f"{name}: {numbers.max()} instead of {last}"
        assert name not in large or last > 2**31


@pytest.mark.parametrize("kernel_size", [None, 3])
@pytest.mark.parametrize("inputs", [0, 20])
def test_separable_gates(memory, monkeypatch, inputs, kernel_size):
    """One sample alone has more than 2^31 numbers: 20 channels of 2^27 positions."""
    monkeypatch.setattr(separable_gates, "_PARTS", 2**21)  # short ones
    maps = [new(2, 20, 2**13, 2**14) for _ in range(3)]
    maps[0] = maps[0] if inputs else None
    wide = 20 + inputs
    depthwise = None if kernel_size is None else new(wide, 1, kernel_size, kernel_size)
    arguments = (*maps, depthwise, new(60, wide, 1, 1), new(60))
    forward, backward, products = (
        *launches(separable_gates, lambda: separable_gates.forward(*arguments)),
        *launches(separable_gates, lambda: separable_gates.backward(maps[1], maps[2], *arguments)),
    )
    with_z = {"z"} if inputs else set()
    found = offsets(memory, forward, [0, forward.programs - 1])
    assert_inside_and_to_the_end(found, {"h", "m", "h_hat", "m_new"} | with_z)
    found = offsets(memory, backward, [0, backward.programs - 1])
    made = {"dh"} if kernel_size else {"dh", *(["dz"] if inputs else [])}
    assert_inside_and_to_the_end(found, {"h", "m", "dh_hat", "dm_new", "dm", "dgates", *made} | with_z)
    of_channels = products.constants["CHANNEL_TILE"]
    ends = [products.programs - 1]  # of h
    if kernel_size:  # behind dpointwise the channels of z, then those of h
        ends += [products.programs - 1 - ceil_div(20, of_channels), products.programs - 1 - ceil_div(wide, of_channels)]
    found = offsets(memory, products, [0, *ends])
    made = {"u", "du", "dh", *(["dz"] if inputs else [])} if kernel_size else set()
    assert_inside_and_to_the_end(found, {"h", "dgates", *made} | with_z)


@pytest.mark.parametrize("keys", [None, 5])
@pytest.mark.parametrize("count", [1, 2])
def test_attention(memory, monkeypatch, keys, count):
    """2^26 samples of 64 positions."""
    monkeypatch.setattr(attention, "MOST_PARTS", 2**23)  # short ones
    batch = 2**26
    depth = keys or 20
    key = None if keys is None else new(keys, 20)
    weights = (new(depth, 20), new(depth), new(20, 20), key)
    sources = [Source(new(batch, 20, 8, 8), *weights) for _ in range(count)]
    contexts, dz = attention._new_contexts(sources), new(batch, 20, 8, 8)
    (forward,) = launches(attention, lambda: attention.forward(sources, new(20), save=True))
    rows, columns = launches(attention, lambda: attention.backward(dz, sources, contexts))
    of_sources = ["h", "m"][:count]
    found = offsets(memory, forward, [0, forward.programs - 1])
    made = {"z", *(f"{name}_{x}" for name in ("r", "lse") for x in of_sources)}
    assert_inside_and_to_the_end(found, {*made, *of_sources})
    found = offsets(memory, rows, [0, rows.programs // count - 1, rows.programs - 1])
    made = {"query_rows", "dr_rows", "dquery_rows", "delta_rows"}
    assert_inside_and_to_the_end(found, {"dz", *of_sources, *made, *(f"r_{x}" for x in of_sources)})
    blocks = count * batch * ceil_div(64, columns.constants["BLOCK_COLUMNS"])
    down = [ceil_div(depth, columns.constants["SCORE_TILE"]), ceil_div(20, columns.constants["VALUE_TILE"])]
    assert columns.programs == blocks + sum(down) * count * 2**23
    ends = [columns.programs - 1, columns.programs - 1 - down[1], columns.programs - 1 - sum(down) * (count - 1)]
    found = offsets(memory, columns, [0, blocks // count - 1, blocks - 1, *ends])
    made = {"query_rows", "dr_rows", "dquery_rows", "delta_rows", "parts"}
    made |= {"dkey_rows", "key_parts"} if keys else set()
    assert_inside_and_to_the_end(found, {*made, *of_sources, *(f"d{x}" for x in of_sources)})


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # moments of no numbers: loads give zeros
@pytest.mark.parametrize("shape", [(1, 20, 2**13, 2**14), (2**26, 20, 8, 8)], ids=["one_sample", "many_samples"])
@pytest.mark.parametrize(
    "update", [Update("lstm", "hidden", 1.0), Update("product", "tanh", 1.0)], ids=["lstm", "product"]
)
@pytest.mark.parametrize("of_positions", [False, True])
def test_gates(memory, of_positions, update, shape):
    batch, channels, *size = shape
    rows = update.gates * channels
    weights = (new(rows, *size), new(rows, *size)) if of_positions else (new(rows), new(rows))
    x, c, dh, dc_new = new(batch, rows, *size), new(*shape), new(*shape), new(*shape)
    terms = [Term(x, *weights), Term(new(*x.shape), None, None)]
    statistics = new_statistics(x, 1)
    _moments, forward = launches(gates, lambda: gates.forward(update, terms, c, 1e-5))
    backward, _norm = launches(gates, lambda: gates.backward(update, dh, dc_new, terms, c, statistics))
    inputs = {"x", "recurrent", "c"}
    found = offsets(memory, forward, [0, forward.programs - 1])
    assert_inside_and_to_the_end(found, {*inputs, "h", "c_new"})
    found = offsets(memory, backward, [0, backward.programs - 1])
    assert_inside_and_to_the_end(found, {*inputs, "dh", "dc_new", "dgates", "dc"})
