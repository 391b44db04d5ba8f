"""Offsets of maps with more than 2^32 numbers: what the harness finds, and the CUDA kernels of the attention."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy
import pytest
from addresses import SPACE, Touched, assert_to_the_end, new_addresses, run_blocks
from attention_calls import WAYS, plan_backward
from call_fields import Way
from kernel_build import KernelFault, Kernels

# The harness itself.


@pytest.fixture
def copies(compile_host: Callable[..., Kernels]) -> Kernels:
    kernels = compile_host("address_faults.cu")
    kernels.schedule(None)
    return kernels


def copy_rows(kernels: Kernels, rows: int, bits: int, blocks: Sequence[int]) -> list[Touched]:
    x, y = itertools.islice(new_addresses(), 2)
    return run_blocks(kernels, "copy_rows", blocks, lambda: kernels.copy_rows(x, y, rows, 1024, bits))


def test_the_ends_of_right_offsets_are_touched(copies: Kernels) -> None:
    objects = copy_rows(copies, 2**22 + 1, 64, [0, -1])
    assert_to_the_end(objects, read=["x"], written=["y"])
    assert set(objects) == {(2**32 + 1024, 2**32 + 1023, -1, "x"), (2**32 + 1024, -1, 2**32 + 1023, "y")}


def test_only_the_chosen_blocks_run(copies: Kernels) -> None:
    assert max(one.last_written for one in copy_rows(copies, 2**22 + 1, 64, [0, 7])) == 8 * 1024 - 1
    x, y = itertools.islice(new_addresses(), 2)
    of_another = run_blocks(copies, "another", [0], lambda: copies.copy_rows(x, y, 2**22 + 1, 1024, 64))
    assert {(one.name, one.last_read, one.last_written) for one in of_another} == {("x", -1, -1), ("y", -1, -1)}
    for block in (5, -6):
        with pytest.raises(KernelFault, match=f"copy_rows: block {block} of a grid of 5"):
            copy_rows(copies, 5, 64, [block])


def test_an_offset_that_becomes_negative_is_reported(copies: Kernels) -> None:
    copy_rows(copies, 2**21, 32, [0, -1])
    with pytest.raises(KernelFault, match=r"out-of-bounds read at x\[-2147483648\]: x has 2147484672 elements"):
        copy_rows(copies, 2**21 + 1, 32, [0, -1])


def test_an_offset_that_begins_anew_does_not_come_to_the_end(copies: Kernels) -> None:
    assert {max(one[1:3]) for one in copy_rows(copies, 2**22, 33, [0, -1])} == {2**32 - 1}
    objects = copy_rows(copies, 2**22 + 1, 33, [0, -1])
    with pytest.raises(AssertionError, match="x: read up to 1023 instead of 4294968319"):
        assert_to_the_end(objects, read=["x"])
    with pytest.raises(AssertionError, match="y: written up to 1023 instead of 4294968319"):
        assert_to_the_end(objects, written=["y"])


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("read_bounds", "out-of-bounds read at x[64]"),
        ("write_bounds", "out-of-bounds write at y[-1]"),
        ("vector_bounds", "out-of-bounds 16-byte read at x[64]"),
        ("misaligned_load", "misaligned 16-byte read at x[2]"),
        ("misaligned_store", "misaligned 8-byte write at y[1]"),
    ],
)
def test_bounds_and_alignment_are_checked_without_memory(
    compile_host: Callable[..., Kernels], kernel: str, says: str
) -> None:
    kernels = compile_host("memory_faults.cu")
    kernels.schedule(None)
    x, y = itertools.islice(new_addresses(), 2)
    run_blocks(kernels, kernel, [0], lambda: getattr(kernels, kernel)(x, y, 0))
    with pytest.raises(KernelFault) as caught:
        run_blocks(kernels, kernel, [0], lambda: getattr(kernels, kernel)(x, y, 1))
    assert says in str(caught.value)


def test_memory_is_there_again_afterwards(copies: Kernels) -> None:
    copy_rows(copies, 2**22 + 1, 64, [0])
    x, y = numpy.arange(3 * 1024, dtype=numpy.float32), numpy.zeros(3 * 1024, dtype=numpy.float32)
    copies.copy_rows(x, y, 3, 1024, 64)
    assert (x == y).all()


# The attention.

CHANNELS = 64  # also those of the values
SOURCES = 2


class Layout(NamedTuple):
    """How the maps of the attention lie: entries of the batch, of 64 positions each, and the strides of the inputs.

    windows: across, down, width. Outputs are contiguous: `large_outputs` tells whether they have the numbers.
    """

    batch: int
    windows: tuple[int, int, int]
    strides: tuple[int, int]
    large_outputs: bool = True


PLANE = (2**16 + 8) * 2**16
"""Positions of a map that is cut into windows: more than 2^32 in one channel of one sample."""

LAYOUTS = {
    "many_samples": Layout(2**20 + 1, (0, 0, 0), (CHANNELS * 64, 64)),
    "windows": Layout(PLANE // 64, (2**13 + 1, 2**13, 8), (CHANNELS * PLANE, PLANE)),
    "strides": Layout(3, (0, 0, 0), (2**34 + 1, 2**27 + 1), large_outputs=False),
}

LARGE = ["many_samples", "windows"]


def attention_inputs(layout: Layout, keys: int | None, address: Iterator[int]) -> list[int]:
    """What all calls begin with. Sources with a key map have so many query channels, others as many as the map."""
    fields = [layout.batch, CHANNELS, CHANNELS, 64, *layout.windows, SOURCES]
    for _ in range(SOURCES):
        weights = [next(address) for _ in ("score", "score_bias", "value")]
        fields += [next(address), *layout.strides, keys or CHANNELS, *weights, 0 if keys is None else next(address)]
    return fields


@pytest.fixture(scope="module")
def attention(compile_host: Callable[..., Kernels]) -> Kernels:
    kernels = compile_host("attention.cu")
    kernels.schedule(None)
    return kernels


@pytest.mark.parametrize("way", ["float32", "half_16"])
@pytest.mark.parametrize("multiprocessors", [1, 2**30], ids=["large_blocks", "small_blocks"])
@pytest.mark.parametrize("gates", [False, True], ids=["alone", "with_gates"])
@pytest.mark.parametrize("keys", [None, 16], ids=["folded", "projected"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_forward(
    attention: Kernels, name: str, keys: int | None, gates: bool, multiprocessors: int, way: str
) -> None:
    layout, address, on = LAYOUTS[name], new_addresses(), WAYS[way]
    value_bias, z, *contexts = itertools.islice(address, 2 + 3 * SOURCES)
    fields = [*attention_inputs(layout, keys, address), value_bias, z, *contexts]
    read, written, kernel = {"h", "m"}, {"z", "r"}, "attention_forward"
    if gates:
        fields += [next(address), *layout.strides, *itertools.islice(address, 4)]
        read, written, kernel = read | {"memory"}, written | {"h_hat", "m_new"}, "attention_gates_forward"
    call = on.function(attention, "gates" if gates else "forward")
    objects = run_blocks(attention, kernel, [0, -1], lambda: call(numpy.array(fields), *on.card(multiprocessors)))
    assert_to_the_end(objects, read, written if layout.large_outputs else ())


class AttentionBackward(NamedTuple):
    """A call of the backward pass, and the blocks of each of its launches for one source."""

    fields: list[int]
    prepare_blocks: int
    attend_blocks: int  # also of one role
    space: int

    @classmethod
    def make(cls, kernels: Kernels, way: Way, layout: Layout, keys: int | None) -> "AttentionBackward":
        address = new_addresses()
        inputs = attention_inputs(layout, keys, address)
        plan = plan_backward(kernels, way, inputs, 1)
        contexts = itertools.islice(address, 3 * SOURCES)
        fields = [*inputs, next(address), *layout.strides, *contexts]
        for _ in range(SOURCES):
            fields += [*itertools.islice(address, 4), 0 if keys is None else next(address)]
        fields += [next(address)]
        return cls(fields, plan.prepare_blocks // SOURCES, plan.finish_blocks, next(address))

    def run(self, kernels: Kernels, way: Way, kernel: str, blocks: Iterable[int]) -> list[Touched]:
        call = way.function(kernels, "backward")
        arguments = (numpy.array(self.fields), self.space, SPACE, *way.card(1))
        return run_blocks(kernels, kernel, blocks, lambda: call(*arguments))


def last_blocks_of_sums(first: int, keys: int | None) -> list[int]:
    """Of those that add up the parts of the gradients of matrices; all such sums begin with block `first`."""
    of_keys = [] if keys is None else [keys * CHANNELS]
    depth = keys or CHANNELS
    counts = [CHANNELS, *[CHANNELS * CHANNELS, depth * CHANNELS, depth, *of_keys] * SOURCES]
    ends = itertools.accumulate((-(-count // 32) for count in counts), initial=first)
    next(ends)
    return [end - 1 for end, count in zip(ends, counts, strict=True) if count > CHANNELS]


EACH_WAY = pytest.mark.parametrize("way", ["float32_copied_ahead", "half_16", "float64"])
EACH_KEYS = pytest.mark.parametrize("keys", [None, 64], ids=["folded", "projected"])


@EACH_WAY
@EACH_KEYS
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_backward_prepare(attention: Kernels, name: str, keys: int | None, way: str) -> None:
    call = AttentionBackward.make(attention, WAYS[way], LAYOUTS[name], keys)
    blocks = call.prepare_blocks
    objects = call.run(attention, WAYS[way], "attention_backward_prepare", [0, blocks - 1, blocks, 2 * blocks - 1])
    assert_to_the_end(objects, read=["h", "m", "dz"])
    if name in LARGE:
        of_keys = [] if keys is None else ["keys"]
        assert_to_the_end(objects, ["r"], ["columns", "queries", "dR", "parts of dvalue", *of_keys])
    if name == "windows":
        assert_to_the_end(objects, ["lse"], ["padded lse", "delta", "parts of dvalue_bias"])


@EACH_WAY
@EACH_KEYS
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_backward_attend(attention: Kernels, name: str, keys: int | None, way: str) -> None:
    """Two roles of blocks for each source."""
    call = AttentionBackward.make(attention, WAYS[way], LAYOUTS[name], keys)
    ends = [call.attend_blocks * (index + 1) - 1 for index in range(2 * SOURCES)]
    objects = call.run(attention, WAYS[way], "attention_backward_attend", [0, *ends])
    assert_to_the_end(objects, read=["h"])
    if name not in LARGE:
        return
    read, written = ["columns", "queries", "dR"], ["dquery", "parts of dscore"]
    if keys is not None:
        read, written = [*read, "keys"], [*written, "dkeys", "parts of dkey"]
    if way != "half_16":
        written += ["dh", "dm"]
    else:
        written += ["unfinished dx"] if keys else ["unfinished dx", "dm"]
    assert_to_the_end(objects, read, written)
    if name == "windows":
        assert_to_the_end(objects, ["padded lse", "delta"])


@pytest.mark.parametrize("way", ["float32_copied_ahead", "half_16"])
@EACH_KEYS
@pytest.mark.parametrize("name", LARGE)
def test_attention_backward_finish(attention: Kernels, name: str, keys: int | None, way: str) -> None:
    """The sums of the parts only with many samples: they go through all parts, of which windows have too many."""
    call = AttentionBackward.make(attention, WAYS[way], LAYOUTS[name], keys)
    with_maps = SOURCES if keys else 1
    sums = last_blocks_of_sums(with_maps * call.attend_blocks, keys) if name == "many_samples" else []
    ends = [call.attend_blocks * (index + 1) - 1 for index in range(with_maps)]
    objects = call.run(attention, WAYS[way], "attention_backward_finish", [0, *ends, *sums])
    read, parts = ["dquery"], ["parts of dvalue", "parts of dscore"]
    if keys is not None:
        read, parts = [*read, "dkeys"], [*parts, "parts of dkey"]
    if way == "half_16":
        read += ["unfinished dx"]
    else:
        read += ["dh", "dm"][:with_maps]
    assert_to_the_end(objects, [*read, *(parts if sums else [])], ["dh", "dm"][:with_maps])
