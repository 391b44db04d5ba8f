"""The attention operators' backward pass in Triton, three launches. Equations: fastsam/ops/_attention/eager.py.

1. attention_query_gradients: rows are queries, a source's columns stream past: dquery. It keeps for the second launch
   query, dR, dquery, (source, entry, position, channel), rounded, and delta (source, entry, position).
2. attention_column_gradients: most programs have columns as rows, and the queries stream past: dx, and parts of the key
   maps' gradients. The others add up outer products over a range of positions: parts of the other weights' gradients.
3. attention_sum_parts: sums of the parts, in the order of the parts.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._attention.triton_forward import (
    keys_of,
    load_map,
    load_matrix,
    of_source,
    queries_of,
    shifted,
    store_map,
)
from fastsam.ops._triton.language import bound, product, rounded

PARTS_AT_ONCE = tl.constexpr(8)


@triton.jit
def load_rows(rows, first, N, first_column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """The tile (BLOCK, WIDTH) of an (N, COLUMNS) matrix from a row and a column on, 0 beyond its rows."""
    positions = first + tl.arange(0, BLOCK)
    columns = first_column + tl.arange(0, WIDTH)
    pointers = rows + positions.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=positions[:, None] < N, other=0.0)


@triton.jit
def store_rows(rows, tile, first, N, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Store a tile (BLOCK, COLUMNS) where `load_rows` would load it."""
    positions = first + tl.arange(0, BLOCK)
    pointers = rows + positions.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if WHOLE:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=positions[:, None] < N)


@triton.jit
def load_vector(vector, first, count, BLOCK: tl.constexpr):
    """Elements [first, first + BLOCK), 0 beyond the count."""
    index = first + tl.arange(0, BLOCK)
    return tl.load(vector + index, mask=index < count, other=0.0)


@triton.jit
def diagonal_of_product(left, right, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """sum_c left[i, c] right[c, i] (BLOCK,), added up as a product does."""
    full = product(left, right, tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
    index = tl.arange(0, BLOCK)
    return tl.sum(tl.where(index[:, None] == index[None, :], full, 0.0), 1)


@triton.jit
def attention_query_gradients(
    h, h_batch, h_channel, m, m_batch, m_channel,
    score_h, score_bias_h, value_h, key_h, score_m, score_bias_m, value_m, key_m,
    dz, dz_batch, dz_channel, r_h, lse_h, shift_h, r_m, lse_m, shift_m,
    query_rows, dr_rows, dquery_rows, delta_rows, B, N,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr, KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dquery_i = sum_j dE_ij key_j for a block of queries i of one entry of the batch and one source.

    E_ij = query_i . key_j, P_ij = exp(E_ij - lse_i), dR_i = value^T dz_i, dE_ij = P_ij (dR_i . x_j - delta_i) and
    delta_i = dR_i . R_i. Where one column takes all of the softmax R_i is it: so delta comes out of a product like that
    of dR_i and x_j, with operands rounded alike, and dE is 0 to the last bit.
    """
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    source = tl.program_id(0) // (blocks * B)
    entry = (tl.program_id(0) // blocks % B).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_QUERIES
    stride = of_source(source, h_channel, m_channel, SOURCES)
    plane = of_source(source, h, m, SOURCES) + entry * of_source(source, h_batch, m_batch, SOURCES)
    shift = load_vector(of_source(source, shift_h, shift_m, SOURCES) + entry * C, 0, C, CHANNELS)
    key = of_source(source, key_h, key_m, SOURCES) if HAS_KEYS else None
    query = queries_of(
        h + entry * h_batch, h_channel, first, N, of_source(source, score_h, score_m, SOURCES),
        of_source(source, score_bias_h, score_bias_m, SOURCES), D, C, DEPTH, BLOCK_QUERIES, CHUNK, WHOLE, PRECISION,
    )  # fmt: skip

    value = of_source(source, value_h, value_m, SOURCES)
    dr = tl.zeros([BLOCK_QUERIES, CHANNELS], tl.float32)
    for channel in tl.range(0, CZ, CHUNK, num_stages=1):
        upstream = load_map(dz + entry * dz_batch, dz_channel, first, N, channel, CZ, CHUNK, BLOCK_QUERIES, WHOLE)
        dr = product(tl.trans(upstream), load_matrix(value, channel, 0, CZ, C, CHUNK, CHANNELS), dr, PRECISION)
    dr = rounded(dr, h.dtype.element_ty)
    r = of_source(source, r_h, r_m, SOURCES) + entry * C * N
    r = rounded(load_map(r, N, first, N, 0, C, CHANNELS, BLOCK_QUERIES, WHOLE), h.dtype.element_ty)
    delta = diagonal_of_product(dr, r, BLOCK_QUERIES, PRECISION)
    lse = load_vector(of_source(source, lse_h, lse_m, SOURCES) + entry * N, first, N, BLOCK_QUERIES)

    dquery = tl.zeros([BLOCK_QUERIES, DEPTH], tl.float32)
    ahead = load_map(plane, stride, 0, N, 0, C, CHANNELS, BLOCK_COLUMNS, WHOLE)
    for column in tl.range(0, bound(N), BLOCK_COLUMNS, num_stages=1):
        x = shifted(ahead, shift, column, N, BLOCK_COLUMNS, WHOLE)
        ahead = load_map(plane, stride, column + BLOCK_COLUMNS, N, 0, C, CHANNELS, BLOCK_COLUMNS, False)
        keys = keys_of(
            x, key, plane, stride, shift, column, N, D, C, DEPTH, CHANNELS, BLOCK_COLUMNS, KEY_CHUNK, HAS_KEYS, WHOLE,
            PRECISION,
        )  # fmt: skip
        zeros = tl.zeros([BLOCK_QUERIES, BLOCK_COLUMNS], tl.float32)
        weights = tl.exp(product(query, keys, zeros, PRECISION) - lse[:, None])
        dscores = weights * (product(dr, x, zeros, PRECISION) - delta[:, None])
        if not WHOLE:
            dscores = tl.where((column + tl.arange(0, BLOCK_COLUMNS) < N)[None, :], dscores, 0.0)
        dquery = product(rounded(dscores, x.dtype), tl.trans(keys), dquery, PRECISION)

    row = (source * B + entry) * N
    store_rows(query_rows + row * DEPTH, query, first, N, DEPTH, BLOCK_QUERIES, WHOLE)
    store_rows(dr_rows + row * CHANNELS, dr, first, N, CHANNELS, BLOCK_QUERIES, WHOLE)
    store_rows(dquery_rows + row * DEPTH, rounded(dquery, query.dtype), first, N, DEPTH, BLOCK_QUERIES, WHOLE)
    queries = first + tl.arange(0, BLOCK_QUERIES)
    tl.store(delta_rows + row + queries, delta, mask=queries < N)


@triton.jit
def attention_column_gradients(
    h, h_batch, h_channel, m, m_batch, m_channel, score_h, score_m, key_h, key_m, dz, dz_batch, dz_channel,
    r_h, lse_h, shift_h, r_m, lse_m, shift_m, query_rows, dr_rows, dquery_rows, delta_rows, dkey_rows, dh, dm, parts,
    key_parts,
    B, N, splits,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr, KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SCORE_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """dx of a block of columns of one entry of the batch and one source; or parts of the weights' gradients.

    The first programs are those of `column_gradients`, the others those of `weight_parts`. dscore, dvalue and the
    biases' gradients have `splits` parts, (split, elements), each over some of the positions of the batch: see
    `attention_sum_parts`.
    """
    blocks = tl.cdiv(N, BLOCK_COLUMNS)
    program = tl.program_id(0)
    if program < SOURCES * B * blocks:
        source = program // (blocks * B)
        entry = (program // blocks % B).to(tl.int64)
        first = program % blocks * BLOCK_COLUMNS
        stride = of_source(source, h_channel, m_channel, SOURCES)
        plane = of_source(source, h, m, SOURCES) + entry * of_source(source, h_batch, m_batch, SOURCES)
        shift = of_source(source, shift_h, shift_m, SOURCES) + entry * C
        lse = of_source(source, lse_h, lse_m, SOURCES) + entry * N
        dx = of_source(source, dh, dm, SOURCES) + entry * C * N
        key = of_source(source, key_h, key_m, SOURCES) if HAS_KEYS else None
        key_part = key_parts + ((entry * blocks + program % blocks) * SOURCES + source) * D * C if HAS_KEYS else None
        column_gradients(
            plane, stride, shift, key, lse, query_rows, dr_rows, dquery_rows, delta_rows, dkey_rows, score_h, score_m,
            dx, key_part, source, entry, first, B, N, C, D, CHANNELS, DEPTH, CHUNK, KEY_CHUNK, SOURCES, HAS_KEYS, WHOLE,
            PRECISION, BLOCK_QUERIES, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        weight_parts(
            program - SOURCES * B * blocks, h, h_batch, h_channel, dz, dz_batch, dz_channel, r_h, shift_h, r_m,
            shift_m, dquery_rows, parts, B, N, splits, C, D, CZ, DEPTH, SOURCES, WHOLE, PRECISION, SCORE_TILE,
            VALUE_TILE, CHANNEL_TILE, BLOCK_POSITIONS,
        )  # fmt: skip


@triton.jit
def column_gradients(
    plane, stride, shift, key, lse, query_rows, dr_rows, dquery_rows, delta_rows, dkey_rows, score_h, score_m, dx,
    key_part, source, entry, first, B, N,
    C: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
    KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx_j = sum_i P_ij dR_i + key^T dkey_j, dkey_j = sum_i dE_ij query_i, for a block of columns j.

    The first source, the hidden state, also has what flows back through the queries: score^T dquery_j of all sources.
    The part of the key map's gradient is that of these columns, sum_j dkey_j x_j^T.
    """
    x = load_map(plane, stride, first, N, 0, C, CHANNELS, BLOCK_COLUMNS, WHOLE)
    of_channels = load_vector(shift, 0, C, CHANNELS)
    x = shifted(x, of_channels, first, N, BLOCK_COLUMNS, WHOLE)
    keys = keys_of(
        x, key, plane, stride, of_channels, first, N, D, C, DEPTH, CHANNELS, BLOCK_COLUMNS, KEY_CHUNK, HAS_KEYS, WHOLE,
        PRECISION,
    )  # fmt: skip
    row = (source * B + entry) * N
    query_rows += row * DEPTH
    dr_rows += row * CHANNELS
    delta_rows += row
    sums = tl.zeros([BLOCK_COLUMNS, CHANNELS], tl.float32)
    dkeys = tl.zeros([BLOCK_COLUMNS, DEPTH], tl.float32)
    for start in tl.range(0, bound(N), BLOCK_QUERIES):
        query = load_rows(query_rows, start, N, 0, DEPTH, BLOCK_QUERIES, DEPTH, WHOLE)
        dr = load_rows(dr_rows, start, N, 0, CHANNELS, BLOCK_QUERIES, CHANNELS, WHOLE)
        of_rows = load_vector(lse, start, N, BLOCK_QUERIES)
        delta = load_vector(delta_rows, start, N, BLOCK_QUERIES)
        zeros = tl.zeros([BLOCK_COLUMNS, BLOCK_QUERIES], tl.float32)
        weights = tl.exp(product(tl.trans(keys), tl.trans(query), zeros, PRECISION) - of_rows[None, :])
        dscores = weights * (product(tl.trans(x), tl.trans(dr), zeros, PRECISION) - delta[None, :])
        if not WHOLE:
            inside = (start + tl.arange(0, BLOCK_QUERIES) < N)[None, :]
            weights = tl.where(inside, weights, 0.0)
            dscores = tl.where(inside, dscores, 0.0)
        sums = product(rounded(weights, x.dtype), dr, sums, PRECISION)
        if HAS_KEYS:
            dkeys = product(rounded(dscores, x.dtype), query, dkeys, PRECISION)
        else:
            sums = product(rounded(dscores, x.dtype), query, sums, PRECISION)

    if HAS_KEYS:
        of_columns = dkey_rows + row * DEPTH
        store_rows(of_columns, rounded(dkeys, x.dtype), first, N, DEPTH, BLOCK_COLUMNS, WHOLE)
        tl.debug_barrier()  # other threads have stored what is read now
        sums = add_mapped(
            sums, of_columns, key, first, N, D, C, DEPTH, CHANNELS, BLOCK_COLUMNS, CHUNK, WHOLE, PRECISION
        )  # fmt: skip
        store_key_part(
            key_part, of_columns, plane, stride, shift, first, N, D, C, DEPTH, BLOCK_COLUMNS, CHUNK, WHOLE, PRECISION
        )  # fmt: skip
    for asking in tl.range(0, bound(tl.where(source == 0, SOURCES, 0)), num_stages=1):
        of_queries = dquery_rows + (asking * B + entry) * N * DEPTH
        score = of_source(asking, score_h, score_m, SOURCES)
        sums = add_mapped(
            sums, of_queries, score, first, N, D, C, DEPTH, CHANNELS, BLOCK_COLUMNS, CHUNK, WHOLE, PRECISION
        )  # fmt: skip
    store_map(dx, N, tl.trans(sums), first, N, 0, C, CHANNELS, BLOCK_COLUMNS, WHOLE)


@triton.jit
def add_mapped(sums, rows, weights, first, N, D: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
               CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """sums (BLOCK, CHANNELS) + weights^T rows_j, weights (D, C), for the rows (N, DEPTH) of a block of positions j."""
    WIDTH: tl.constexpr = min(CHUNK, DEPTH)
    for depth in tl.range(0, D, WIDTH, num_stages=1):
        some = load_rows(rows, first, N, depth, DEPTH, BLOCK, WIDTH, WHOLE)
        sums = product(some, load_matrix(weights, depth, 0, D, C, WIDTH, CHANNELS), sums, PRECISION)
    return sums


@triton.jit
def store_key_part(part, dkey_rows, plane, stride, shift, first, N, D: tl.constexpr, C: tl.constexpr,
                   DEPTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """sum_j dkey_j x_j^T (D, C) over a block of columns j."""
    WIDTH: tl.constexpr = min(CHUNK, DEPTH)
    for channel in tl.range(0, C, CHUNK, num_stages=1):
        x = load_map(plane, stride, first, N, channel, C, CHUNK, BLOCK, WHOLE)
        x = shifted(x, load_vector(shift, channel, C, CHUNK), first, N, BLOCK, WHOLE)
        for depth in tl.range(0, D, WIDTH, num_stages=1):
            dkeys = load_rows(dkey_rows, first, N, depth, DEPTH, BLOCK, WIDTH, WHOLE)
            tile = product(tl.trans(dkeys), tl.trans(x), tl.zeros([WIDTH, CHUNK], tl.float32), PRECISION)
            store_matrix(part, tile, depth, channel, D, C, WIDTH, CHUNK)


@triton.jit
def store_matrix(matrix, tile, first_row, first_column, ROWS, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """Store a tile (HEIGHT, WIDTH) where `load_matrix` would load it."""
    rows = first_row + tl.arange(0, HEIGHT)
    columns = first_column + tl.arange(0, WIDTH)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    tl.store(matrix + rows[:, None] * COLUMNS + columns[None, :], tile, mask=inside)


@triton.jit
def weight_parts(
    program, h, h_batch, h_channel, dz, dz_batch, dz_channel, r_h, shift_h, r_m, shift_m, dquery_rows, parts,
    B, N, splits,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, DEPTH: tl.constexpr, SOURCES: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, SCORE_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of a part of dscore or dvalue, and of their biases' gradients.

    The positions of all entries of the batch are cut into blocks, of which a part has an equal share.
    """
    across: tl.constexpr = (C + CHANNEL_TILE - 1) // CHANNEL_TILE
    of_score: tl.constexpr = (D + SCORE_TILE - 1) // SCORE_TILE * across
    of_both: tl.constexpr = of_score + (CZ + VALUE_TILE - 1) // VALUE_TILE * across
    elements: tl.constexpr = (D + CZ) * C + D
    split = program // (SOURCES * of_both)
    source = program // of_both % SOURCES
    tile = program % of_both
    blocks = tl.cdiv(N, BLOCK)
    share = tl.cdiv(B * blocks, splits)
    begin = split * share
    end = tl.minimum(begin + share, B * blocks)
    part = parts + split.to(tl.int64) * (SOURCES * elements + CZ)
    channel = tile % across * CHANNEL_TILE
    if tile < of_score:
        score_part(
            part + source * elements, tile // across * SCORE_TILE, channel, begin, end, blocks,
            dquery_rows + source.to(tl.int64) * B * N * DEPTH, h, h_batch, h_channel, N, C, D, CZ, DEPTH, WHOLE,
            PRECISION, SCORE_TILE, CHANNEL_TILE, BLOCK,
        )  # fmt: skip
    else:
        value_part(
            part + source * elements + D * C, part + SOURCES * elements, source == 0,
            (tile - of_score) // across * VALUE_TILE, channel, begin, end, blocks, dz, dz_batch, dz_channel,
            of_source(source, r_h, r_m, SOURCES),
            of_source(source, shift_h, shift_m, SOURCES), N, C, CZ, WHOLE, PRECISION, VALUE_TILE, CHANNEL_TILE, BLOCK,
        )  # fmt: skip


@triton.jit
def score_part(
    part, row, channel, begin, end, blocks, dquery_rows, h, h_batch, h_channel, N,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i dquery_i h_i^T, and sum_i dquery_i behind it and dvalue, over the positions i of blocks [begin, end)."""
    total = tl.zeros([TILE, CHANNEL_TILE], tl.float32)
    bias = tl.zeros([TILE], tl.float32)
    for block in tl.range(bound(begin), bound(end)):
        entry = (block // blocks).to(tl.int64)
        first = block % blocks * BLOCK
        dquery = load_rows(dquery_rows + entry * N * DEPTH, first, N, row, DEPTH, BLOCK, TILE, WHOLE)
        hidden = load_map(h + entry * h_batch, h_channel, first, N, channel, C, CHANNEL_TILE, BLOCK, WHOLE)
        total = product(tl.trans(dquery), tl.trans(hidden), total, PRECISION)
        bias += tl.sum(dquery.to(tl.float32), 0)
    store_matrix(part, total, row, channel, D, C, TILE, CHANNEL_TILE)
    rows = row + tl.arange(0, TILE)
    tl.store(part + (D + CZ) * C + rows, bias, mask=(rows < D) & (channel == 0))


@triton.jit
def value_part(
    part, bias_part, has_bias, row, channel, begin, end, blocks, dz, dz_batch, dz_channel, r, shift, N,
    C: tl.constexpr, CZ: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i dz_i R_i^T, R with its shift and rounded, and sum_i dz_i, over the positions i of blocks [begin, end)."""
    total = tl.zeros([TILE, CHANNEL_TILE], tl.float32)
    bias = tl.zeros([TILE], tl.float32)
    for block in tl.range(bound(begin), bound(end)):
        entry = (block // blocks).to(tl.int64)
        first = block % blocks * BLOCK
        upstream = load_map(dz + entry * dz_batch, dz_channel, first, N, row, CZ, TILE, BLOCK, WHOLE)
        averaged = load_map(r + entry * C * N, N, first, N, channel, C, CHANNEL_TILE, BLOCK, WHOLE)
        averaged += load_vector(shift + entry * C, channel, C, CHANNEL_TILE)[:, None]
        total = product(upstream, tl.trans(rounded(averaged, upstream.dtype)), total, PRECISION)
        bias += tl.sum(upstream.to(tl.float32), 1)
    store_matrix(part, total, row, channel, CZ, C, TILE, CHANNEL_TILE)
    rows = row + tl.arange(0, TILE)
    tl.store(bias_part + rows, bias, mask=(rows < CZ) & (channel == 0) & has_bias)


@triton.jit
def sum_of_parts(parts, count, first, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements [first, first + BLOCK) of the sum of `count` parts (count, ELEMENTS)."""
    element = first + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS_AT_ONCE, BLOCK], tl.float32)
    for start in tl.range(0, bound(count), PARTS_AT_ONCE):
        part = start + tl.arange(0, PARTS_AT_ONCE)
        inside = (part[:, None] < count) & (element[None, :] < ELEMENTS)
        pointers = parts + part.to(tl.int64)[:, None] * ELEMENTS + element[None, :]
        total += tl.load(pointers, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def store_range(out, total, first, begin, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Store those of the elements [first, first + BLOCK) that are in [begin, begin + COUNT), where `out` begins."""
    element = first + tl.arange(0, BLOCK) - begin
    inside = (element >= 0) & (element < COUNT)
    tl.store(out + element, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit
def attention_sum_parts(
    parts, splits, key_parts, key_count, dscore_h, dscore_bias_h, dvalue_h, dkey_h, dscore_m, dscore_bias_m, dvalue_m,
    dkey_m, dvalue_bias, C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, SOURCES: tl.constexpr,
    HAS_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over the parts that `attention_column_gradients` has stored, in the dtype of the weights.

    An element is one of dscore, dvalue, dscore_bias of each source and then of dvalue_bias. The first programs have
    these, the others the key maps' gradients.
    """
    of_source_: tl.constexpr = (D + CZ) * C + D
    elements: tl.constexpr = SOURCES * of_source_ + CZ
    programs: tl.constexpr = (elements + BLOCK - 1) // BLOCK
    if tl.program_id(0) < programs:
        first = tl.program_id(0) * BLOCK
        total = sum_of_parts(parts, splits, first, elements, BLOCK)
        store_range(dscore_h, total, first, 0, D * C, BLOCK)
        store_range(dvalue_h, total, first, D * C, CZ * C, BLOCK)
        store_range(dscore_bias_h, total, first, (D + CZ) * C, D, BLOCK)
        if SOURCES == 2:
            store_range(dscore_m, total, first, of_source_, D * C, BLOCK)
            store_range(dvalue_m, total, first, of_source_ + D * C, CZ * C, BLOCK)
            store_range(dscore_bias_m, total, first, of_source_ + (D + CZ) * C, D, BLOCK)
        store_range(dvalue_bias, total, first, SOURCES * of_source_, CZ, BLOCK)
    elif HAS_KEYS:
        first = (tl.program_id(0) - programs) * BLOCK
        total = sum_of_parts(key_parts, key_count, first, SOURCES * D * C, BLOCK)
        store_range(dkey_h, total, first, 0, D * C, BLOCK)
        if SOURCES == 2:
            store_range(dkey_m, total, first, D * C, D * C, BLOCK)
