"""The Triton kernels of the gates: one launch, with norms one more before it for the moments of the samples."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._gates.triton_terms import gates_of, joined, load_term, tile_of
from fastsam.ops._gates.triton_updates import updated
from fastsam.ops._triton.language import bound, rounded


@triton.jit(do_not_specialize=["tile_count", "parts"])
def moments_kernel(
    x,
    other,
    moments,
    x_batch,
    x_channel,
    other_batch,
    other_channel,
    N,
    tile_count,
    parts,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
):
    """Count, mean and sum of squared distances from it of every `parts`-th tile of a sample, a program a part and term.

    Tile by tile they are joined (Chan, Golub, LeVeque 1983): with n' of the tile, n = n + n',
        mean = mean + (mean' - mean) n' / n        squares = squares + squares' + (mean' - mean)^2 (n - n') n' / n
    """
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    is_other = tl.program_id(1) == 1
    strides = (tl.where(is_other, other_batch, x_batch), tl.where(is_other, other_channel, x_channel))
    term = (tl.where(is_other, other, x), None, None, strides[0], strides[1])
    count = 0.0
    mean = 0.0
    squares = 0.0
    for tile in range(bound(part), bound(tile_count), bound(parts)):
        row, position, there = tile_of(tile, N, ROWS, ROW_TILE, POSITION_TILE)
        value = load_term(term, sample, row, position, there)
        size = tl.sum(tl.sum(there.to(tl.float32), 1), 0)
        of_tile = tl.sum(tl.sum(value, 1), 0) / size
        of_tile += tl.sum(tl.sum(tl.where(there, value - of_tile, 0.0), 1), 0) / size  # what rounding left
        centred = tl.where(there, value - of_tile, 0.0)
        distance, share = of_tile - mean, size / (count + size)
        squares += tl.sum(tl.sum(centred * centred, 1), 0) + distance * distance * (share * count)
        mean += distance * share
        count += size
    to = moments + ((sample * TERMS + tl.program_id(1)) * parts + part) * 3
    tl.store(to, count)
    tl.store(to + 1, mean)
    tl.store(to + 2, squares)


@triton.jit
def _statistics(term, index, sample, tile, moments, parts, statistics, batch, eps, TERMS: tl.constexpr):
    """The statistics of the index-th norm, which the first program of a sample keeps for the backward pass."""
    mean, rstd = 0.0, 1.0
    if term[1] is not None:
        mean, rstd = joined(moments + (sample * TERMS + index) * parts * 3, parts, eps)
        if tile == 0:
            to = statistics + (index * batch + sample) * 2
            tl.store(to, mean)
            tl.store(to + 1, rstd)
    return mean, rstd


@triton.jit(do_not_specialize=["batch", "parts"])
def forward_kernel(
    x,
    weight,
    bias,
    recurrent,
    recurrent_weight,
    recurrent_bias,
    c,
    h,
    c_new,
    moments,
    statistics,
    x_batch,
    x_channel,
    recurrent_batch,
    recurrent_channel,
    c_batch,
    c_channel,
    constant,
    eps,
    N,
    batch,
    parts,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    GATES: tl.constexpr,
    C: tl.constexpr,
    OF_POSITIONS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
):
    """h and c_new of a tile of channels and positions, see `updated`, from the gates

        a = N(x; weight, bias) + N(recurrent; ...)        N(x) = (x - mean) rstd weight + bias

    c_new is None where it is not wanted. Every program of a sample joins the sample's moments for itself.
    """
    tiles = tl.cdiv(C, ROW_TILE) * tl.cdiv(N, POSITION_TILE)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, position, there = tile_of(tile, N, C, ROW_TILE, POSITION_TILE)
    first = (x, weight, bias, x_batch, x_channel)
    second = (recurrent, recurrent_weight, recurrent_bias, recurrent_batch, recurrent_channel)
    FIRST: tl.constexpr = 1 if weight is not None else 0
    TERMS: tl.constexpr = FIRST + 1 if recurrent_weight is not None else FIRST
    of_first = _statistics(first, 0, sample, tile, moments, parts, statistics, batch, eps, TERMS)
    of_second = _statistics(second, FIRST, sample, tile, moments, parts, statistics, batch, eps, TERMS)
    place = (sample, row, position, there)
    a = gates_of(first, second, of_first, of_second, *place, N, C, GATES, OF_POSITIONS)
    of_h, of_c = updated(a, load_term((c, None, None, c_batch, c_channel), *place), constant, KIND, FORM)
    at = (sample.to(tl.int64) * C + row) * N + position
    tl.store(h + at, rounded(of_h, h.dtype.element_ty), mask=there)
    if c_new is not None:
        tl.store(c_new + at, rounded(of_c, c_new.dtype.element_ty), mask=there)
