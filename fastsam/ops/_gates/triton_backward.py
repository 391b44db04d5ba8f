"""The Triton kernels of the gradients of the gates: one launch, with norms a second one through them."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._gates.triton_terms import gates_of, load_norm, load_term, tile_of
from fastsam.ops._gates.triton_updates import gradients_of
from fastsam.ops._triton.language import bound, rounded, store_range, sum_of_parts

SUMS_AT_ONCE = tl.constexpr(128)
"""Parts of a sum that a program has in registers at a time."""

ROWS_AT_ONCE = tl.constexpr(32)
"""Rows whose weights' gradients one program sums up: as many floats as a sector of memory transports well."""


@triton.jit
def _saved(term, index, sample, batch, statistics):
    """The statistics of a sample that the forward pass kept for the index-th norm."""
    mean, rstd = 0.0, 1.0
    if term[1] is not None:
        mean = tl.load(statistics + (index * batch + sample) * 2)
        rstd = tl.load(statistics + (index * batch + sample) * 2 + 1)
    return mean, rstd


@triton.jit
def _sum_up(
    term,
    index,
    of_term,
    gradients,
    sample,
    tile,
    tiles,
    row,
    position,
    there,
    N,
    batch,
    of_samples,
    of_rows,
    C: tl.constexpr,
    GATES: tl.constexpr,
    TERMS: tl.constexpr,
    OF_POSITIONS: tl.constexpr,
):
    """The sums of dy and of dy (x - mean) over the tile, dy = da weight, to of_samples; with weights of one a row those
    of da and of da y, y = (x - mean) rstd, over each of its rows to of_rows, (norms, 2, entries, GATES C)."""
    ROWS: tl.constexpr = GATES * C
    chunks = tl.cdiv(N, position.shape[1])
    entry, entries = tl.cast(sample * chunks + tile % chunks, tl.int64), tl.cast(batch, tl.int64) * chunks
    dy = 0.0
    dy_centred = 0.0
    for k in tl.static_range(GATES):
        gate_row = row + k * C
        # As it is stored: the next launch takes the mean off that, and of a sample of one number nothing may be left.
        stored = rounded(gradients[k], term[0].dtype.element_ty).to(tl.float32)
        da = tl.where(there, stored, 0.0)
        centred = load_term(term, sample, gate_row, position, there) - of_term[0]
        weight = load_norm(term[1], gate_row, position, there, N, ROWS, OF_POSITIONS)
        da_centred = tl.where(there, da * centred, 0.0)
        dy += tl.sum(tl.sum(da * weight, 1), 0)
        dy_centred += tl.sum(tl.sum(da_centred * weight, 1), 0)
        if not OF_POSITIONS:
            to = of_rows + (2 * index * entries + entry) * ROWS + gate_row
            tl.store(to, tl.sum(da, 1)[:, None], mask=row < C)
            tl.store(to + entries * ROWS, of_term[1] * tl.sum(da_centred, 1)[:, None], mask=row < C)
    to = of_samples + ((tl.cast(sample, tl.int64) * TERMS + index) * tiles + tile) * 2
    tl.store(to, dy)
    tl.store(to + 1, dy_centred)


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(
    x,
    weight,
    bias,
    recurrent,
    recurrent_weight,
    recurrent_bias,
    c,
    dh,
    dc_new,
    dgates,
    dc,
    statistics,
    of_samples,
    of_rows,
    x_batch,
    x_channel,
    recurrent_batch,
    recurrent_channel,
    c_batch,
    c_channel,
    dh_batch,
    dh_channel,
    dc_new_batch,
    dc_new_channel,
    constant,
    N,
    batch,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    GATES: tl.constexpr,
    C: tl.constexpr,
    OF_POSITIONS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
):
    """The gradients of a tile's gates before their activations, (B, GATES C, N), and of c: see `gradients_of`.

    The gates are made again. dc_new is None where c_new was not wanted. With norms also the sums that their gradients
    need, see `_sum_up`.
    """
    tiles = tl.cdiv(C, ROW_TILE) * tl.cdiv(N, POSITION_TILE)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, position, there = tile_of(tile, N, C, ROW_TILE, POSITION_TILE)
    first = (x, weight, bias, x_batch, x_channel)
    second = (recurrent, recurrent_weight, recurrent_bias, recurrent_batch, recurrent_channel)
    FIRST: tl.constexpr = 1 if weight is not None else 0
    TERMS: tl.constexpr = FIRST + 1 if recurrent_weight is not None else FIRST
    of_first = _saved(first, 0, sample, batch, statistics)
    of_second = _saved(second, FIRST, sample, batch, statistics)
    place = (sample, row, position, there)
    a = gates_of(first, second, of_first, of_second, *place, N, C, GATES, OF_POSITIONS)
    state = load_term((c, None, None, c_batch, c_channel), *place)
    of_h = load_term((dh, None, None, dh_batch, dh_channel), *place)
    of_state = 0.0
    if dc_new is not None:
        of_state = load_term((dc_new, None, None, dc_new_batch, dc_new_channel), *place)
    gradients, of_c = gradients_of(a, state, of_h, of_state, constant, KIND, FORM)
    at = (tl.cast(sample, tl.int64) * C + row) * N + position
    tl.store(dc + at, rounded(of_c, dc.dtype.element_ty), mask=there)
    for k in tl.static_range(GATES):
        to = dgates + (tl.cast(sample, tl.int64) * (GATES * C) + row + k * C) * N + position
        tl.store(to, rounded(gradients[k], dgates.dtype.element_ty), mask=there)
    rest = (gradients, sample, tile, tiles, row, position, there, N, batch, of_samples, of_rows)
    if weight is not None:
        _sum_up(first, 0, of_first, *rest, C, GATES, TERMS, OF_POSITIONS)
    if recurrent_weight is not None:
        _sum_up(second, FIRST, of_second, *rest, C, GATES, TERMS, OF_POSITIONS)


@triton.jit
def _correction(term, index, sample, batch, statistics, of_samples, sums, size, TERMS: tl.constexpr):
    """mean, rstd, rstd mean(dy) and rstd^3 mean(dy (x - mean)) of a sample, the means over its `size` numbers."""
    mean, rstd = _saved(term, index, sample, batch, statistics)
    dy = tl.zeros([SUMS_AT_ONCE], tl.float32)
    dy_centred = tl.zeros([SUMS_AT_ONCE], tl.float32)
    part = tl.arange(0, SUMS_AT_ONCE)
    from_ = of_samples + (tl.cast(sample, tl.int64) * TERMS + index) * sums * 2
    for start in range(0, bound(sums), SUMS_AT_ONCE):
        there = start + part < sums
        dy += tl.load(from_ + (start + part) * 2, mask=there, other=0.0)
        dy_centred += tl.load(from_ + (start + part) * 2 + 1, mask=there, other=0.0)
    offset = rstd * (tl.sum(dy, 0) / size)
    return mean, rstd, offset, rstd * rstd * rstd * (tl.sum(dy_centred, 0) / size)


@triton.jit
def _through_norm(
    term,
    dx,
    index,
    da,
    weight,
    sample,
    row,
    position,
    there,
    N,
    batch,
    statistics,
    of_samples,
    sums,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Stores dx of a tile of one sample; returns da y, y = (x - mean) rstd, which dweight is the sum of."""
    size = tl.cast(N, tl.float32) * ROWS
    mean, rstd, offset, slope = _correction(term, index, sample, batch, statistics, of_samples, sums, size, TERMS)
    centred = load_term(term, sample, row, position, there) - mean
    scaled = rstd * da
    to = dx + (tl.cast(sample, tl.int64) * ROWS + row) * N + position
    tl.store(to, rounded(scaled * weight - offset - slope * centred, dx.dtype.element_ty), mask=there)
    return scaled * centred


@triton.jit
def _sum_of_rows(index, first_row, dweight, dbias, of_rows, entries, ROWS: tl.constexpr):
    """dweight and dbias of some rows of the index-th norm from of_rows, with weights of one a row."""
    parts = of_rows + 2 * index * tl.cast(entries, tl.int64) * ROWS
    of_bias = sum_of_parts(parts, entries, first_row, ROWS, ROWS_AT_ONCE, ROWS_AT_ONCE)
    store_range(dbias, of_bias, first_row, 0, ROWS, ROWS_AT_ONCE)
    parts += tl.cast(entries, tl.int64) * ROWS
    of_weight = sum_of_parts(parts, entries, first_row, ROWS, ROWS_AT_ONCE, ROWS_AT_ONCE)
    store_range(dweight, of_weight, first_row, 0, ROWS, ROWS_AT_ONCE)


@triton.jit(do_not_specialize=["batch", "sums", "entries"])
def norm_backward_kernel(
    x,
    weight,
    recurrent,
    recurrent_weight,
    dgates,
    dx,
    dweight,
    dbias,
    drecurrent,
    drecurrent_weight,
    drecurrent_bias,
    statistics,
    of_samples,
    of_rows,
    x_batch,
    x_channel,
    recurrent_batch,
    recurrent_channel,
    N,
    batch,
    sums,
    entries,
    ROWS: tl.constexpr,
    OF_POSITIONS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
):
    """The gradients through the norms, from da = dgates, the gradient of their outputs:

        dx = rstd (dy - mean(dy) - y mean(dy y)), dy = da weight, y = (x - mean) rstd, the means over the sample
        dweight = sum da y        dbias = sum da

    Weights of one a position: a program has a tile of them and goes through all samples. Weights of one a row: a
    program has a tile of one sample; further programs sum the rows up, from of_rows.

    dx or drecurrent, not both, may be dgates. That is safe because each element of dgates is loaded by one program
    only, the one that has its tile, which keeps it in registers (`da`) for both norms and their weights, and stores to
    its place afterwards, when all of its threads have loaded theirs.
    """
    first = (x, weight, None, x_batch, x_channel)
    second = (recurrent, recurrent_weight, None, recurrent_batch, recurrent_channel)
    FIRST: tl.constexpr = 1 if weight is not None else 0
    TERMS: tl.constexpr = FIRST + 1 if recurrent_weight is not None else FIRST
    tiles = tl.cdiv(ROWS, ROW_TILE) * tl.cdiv(N, POSITION_TILE)
    program = tl.program_id(0)
    begin, end = program // tiles, program // tiles + 1
    if OF_POSITIONS:
        begin, end = 0, batch
    if OF_POSITIONS or program < tiles * batch:
        row, position, there = tile_of(program % tiles, N, ROWS, ROW_TILE, POSITION_TILE)
        of_weight = tl.zeros([ROW_TILE, POSITION_TILE], tl.float32)
        of_recurrent_weight = tl.zeros([ROW_TILE, POSITION_TILE], tl.float32)
        of_bias = tl.zeros([ROW_TILE, POSITION_TILE], tl.float32)
        for sample in range(bound(begin), bound(end)):
            from_ = dgates + (tl.cast(sample, tl.int64) * ROWS + row) * N + position
            da = tl.load(from_, mask=there, other=0.0).to(tl.float32)
            tl.debug_barrier()  # other threads may load what this one stores to below
            of_bias += da
            place = (sample, row, position, there, N, batch, statistics, of_samples, sums)
            if weight is not None:
                w = load_norm(weight, row, position, there, N, ROWS, OF_POSITIONS)
                of_weight += _through_norm(first, dx, 0, da, w, *place, ROWS, TERMS)
            if recurrent_weight is not None:
                w = load_norm(recurrent_weight, row, position, there, N, ROWS, OF_POSITIONS)
                of_recurrent_weight += _through_norm(second, drecurrent, FIRST, da, w, *place, ROWS, TERMS)
        if OF_POSITIONS:
            at = row.to(tl.int64) * N + position
            if weight is not None:
                tl.store(dweight + at, rounded(of_weight, dweight.dtype.element_ty), mask=there)
                tl.store(dbias + at, rounded(of_bias, dbias.dtype.element_ty), mask=there)
            if recurrent_weight is not None:
                tl.store(drecurrent_weight + at, rounded(of_recurrent_weight, dgates.dtype.element_ty), mask=there)
                tl.store(drecurrent_bias + at, rounded(of_bias, dgates.dtype.element_ty), mask=there)
    else:
        first_row = (program - tiles * batch) * ROWS_AT_ONCE
        if weight is not None:
            _sum_of_rows(0, first_row, dweight, dbias, of_rows, entries, ROWS)
        if recurrent_weight is not None:
            _sum_of_rows(FIRST, first_row, drecurrent_weight, drecurrent_bias, of_rows, entries, ROWS)
