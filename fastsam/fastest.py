"""Which back end is the fastest on a card, by what was measured: the table in fastest.txt."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("fastest.txt")


class Row(NamedTuple):
    """One measurement.

    capability: of the card, such as "9.0". operator: of fastsam.ops. arithmetic: a dtype, or "tf32" for float32 whose
    products may be in it. positions: H * W. order: back ends, the fastest first, eager among them. results: the file in
    benchmarks/results that they were measured in.
    """

    capability: str
    operator: str
    arithmetic: str
    positions: int
    order: tuple[str, ...]
    results: str


def order(index: int, operator: str, dtype: torch.dtype, positions: int) -> tuple[tuple[str, ...], str]:
    """The back ends for a call on the card `index`, the fastest first, and where that comes from.

    The measurement is the one on cards of this capability, else of the nearest, at the next smaller size, else at the
    smallest. () where there is none.
    """
    return _order("{}.{}".format(*_capability(index)), operator, arithmetic_name(dtype), positions)


def arithmetic_name(dtype: torch.dtype) -> str:
    """How products are computed, as the table calls it."""
    matmul: Any = torch.backends.cuda.matmul  # fp32_precision is what set_float32_matmul_precision sets as well
    if dtype == torch.float32 and matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _order(capability: str, operator: str, kind: str, positions: int) -> tuple[tuple[str, ...], str]:
    measured = [row for row in table() if (row.operator, row.arithmetic) == (operator, kind)]
    if not measured:
        return (), f"no measurement of {operator} in {kind} has been made on a card"
    nearest = min(
        {row.capability for row in measured}, key=lambda other: (abs(float(other) - float(capability)), other)
    )
    rows = sorted((row for row in measured if row.capability == nearest), key=lambda row: row.positions)
    row = next((row for row in reversed(rows) if row.positions <= positions), rows[0])
    return row.order, f"the fastest at {row.positions} positions on capability {nearest}: {row.results}"


@functools.cache
def table() -> tuple[Row, ...]:
    """The rows of fastest.txt.

    Raises:
        ValueError: a line does not have the six columns, or names other back ends.
    """
    rows = []
    for number, line in enumerate(TABLE.read_text(encoding="utf-8").splitlines(), 1):
        columns = line.partition("#")[0].split()
        if not columns:
            continue
        if len(columns) != 6:
            raise ValueError(f"fastsam: line {number} of {TABLE} must have 6 columns, got {line!r}")
        capability, operator, kind, positions, names, results = columns
        if not set(names.split(",")) <= {"cuda", "triton", "eager"}:
            raise ValueError(f"fastsam: line {number} of {TABLE} must name cuda, triton and eager only, got {names!r}")
        rows.append(Row(capability, operator, kind, int(positions), tuple(names.split(",")), results))
    return tuple(rows)
