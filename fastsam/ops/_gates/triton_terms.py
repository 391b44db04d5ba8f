"""What the Triton kernels of the gates share: where a program is, the terms of the gates, the moments of a sample.

A term is a tuple (x, weight, bias, batch stride, channel stride): a map (B, GATES C, N) and its norm, weight and bias
None where it has none; x None where there is no such term. The statistics of a sample are (mean, 1 / sqrt(variance +
eps)).
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

PARTS_AT_ONCE = tl.constexpr(128)
"""Of a sample's moments there are at most so many parts: each program of the next launch loads them all."""


@triton.jit
def tile_of(index, N, ROWS: tl.constexpr, ROW_TILE: tl.constexpr, POSITION_TILE: tl.constexpr):
    """Rows (ROW_TILE, 1) and positions (1, POSITION_TILE) of a tile of a (ROWS, N) map, and which of them exist."""
    chunks = tl.cdiv(N, POSITION_TILE)
    row = (index // chunks * ROW_TILE + tl.arange(0, ROW_TILE))[:, None]
    position = (index % chunks * POSITION_TILE + tl.arange(0, POSITION_TILE))[None, :]
    return row, position, (row < ROWS) & (position < N)


@triton.jit
def load_term(term, sample, row, position, there):
    """x of a term at some rows and positions of a sample, float32."""
    x = term[0] + tl.cast(sample, tl.int64) * term[3] + row.to(tl.int64) * term[4]
    return tl.load(x + position, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_norm(values, row, position, there, N, ROWS: tl.constexpr, OF_POSITIONS: tl.constexpr):
    """Weights or biases of a norm, one for each row (ROWS) or for each row and position (ROWS, N), float32."""
    if OF_POSITIONS:
        loaded = tl.load(values + row.to(tl.int64) * N + position, mask=there, other=0.0)
    else:
        loaded = tl.load(values + row, mask=row < ROWS, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def _output(term, statistics, sample, row, position, there, N, ROWS: tl.constexpr, OF_POSITIONS: tl.constexpr):
    """(x - mean) rstd weight + bias, or x of a term without norm."""
    x = load_term(term, sample, row, position, there)
    if term[1] is not None:
        weight = load_norm(term[1], row, position, there, N, ROWS, OF_POSITIONS)
        bias = load_norm(term[2], row, position, there, N, ROWS, OF_POSITIONS)
        x = (x - statistics[0]) * statistics[1] * weight + bias
    return x


@triton.jit
def gates_of(
    first,
    second,
    of_first,
    of_second,
    sample,
    row,
    position,
    there,
    N,
    C: tl.constexpr,
    GATES: tl.constexpr,
    OF_POSITIONS: tl.constexpr,
):
    """The gates of some channels before their activations, a tuple: the sums of the terms at their rows."""
    gates = ()
    for k in tl.static_range(GATES):
        place = (sample, row + k * C, position, there, N)
        a = _output(first, of_first, *place, GATES * C, OF_POSITIONS)
        if second[0] is not None:
            a += _output(second, of_second, *place, GATES * C, OF_POSITIONS)
        gates += (a,)  # type: ignore[assignment]
    return gates


@triton.jit
def joined(parts, count, eps):
    """The statistics of a sample from its `count` parts (count, mean, sum of squared distances from that mean)."""
    part = tl.arange(0, PARTS_AT_ONCE)
    there = part < count
    size = tl.load(parts + 3 * part, mask=there, other=0.0)
    mean = tl.load(parts + 3 * part + 1, mask=there, other=0.0)
    squares = tl.load(parts + 3 * part + 2, mask=there, other=0.0)
    total = tl.sum(size, 0)
    near = tl.load(parts + 1)  # a mean, from which the others differ by little
    of_all = near + tl.sum(size * (mean - near), 0) / total
    distance = mean - of_all
    variance = tl.sum(squares + size * distance * distance, 0) / total
    return of_all, tl.rsqrt(variance + eps)
