"""Runs blocks of CUDA kernels on objects that have addresses only, so that maps may have more than 2^32 numbers.

Real maps of that size do not fit many machines. Of each launch the first block is to run and those that come to the end
of something: all accesses must be inside of their objects, and the last element of each large one among them. Offsets
of so many elements have no room in 32 bits, with a sign or without.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy
from kernel_build import Kernels

SPACE = 2**62
"""Bytes of a workspace: enough for anything."""


class Touched(NamedTuple):
    """An object of a launch: its elements, and the last of them that was read and written, -1 if none was."""

    elements: int
    last_read: int
    last_written: int
    name: str


def new_addresses() -> Iterator[int]:
    """Addresses of arrays that are nowhere, far apart and aligned."""
    return itertools.count(2**48, 2**48)


def run_blocks(kernels: Kernels, kernel: str, blocks: Iterable[int], call: Callable[[], None]) -> list[Touched]:
    """What some blocks of one kernel touch in a call with addresses only. Numbers below 0 count from the last block."""
    numbers = numpy.array(list(blocks), dtype=numpy.int64)
    library = kernels.library
    library.simt_touched.restype = ctypes.c_char_p
    library.simt_addresses_only(kernel.encode(), ctypes.c_void_p(numbers.ctypes.data), ctypes.c_int64(len(numbers)))
    try:
        call()
    finally:
        library.simt_addresses_only(None, None, ctypes.c_int64(0))
    lines = [line.split(" ", 3) for line in library.simt_touched().decode().splitlines()]
    return [Touched(*map(int, numbers), name) for *numbers, name in lines]


def assert_to_the_end(objects: Sequence[Touched], read: Iterable[str] = (), written: Iterable[str] = ()) -> None:
    """All objects of these names have more than 2^32 elements, and the last one was read, or written."""
    ends = [(one.name, "read", one.last_read, one.elements - 1) for one in objects if one.name in set(read)]
    ends += [(one.name, "written", one.last_written, one.elements - 1) for one in objects if one.name in set(written)]
    assert {name for name, *_ in ends} == {*read, *written}
    for name, how, last, end in ends:
        assert last == end, f"{name}: {how} up to {last} instead of {end}"
        assert end >= 2**32, name
