"""The attention operators' backward pass in Triton, three launches. Equations: fastsam/ops/_attention/eager.py.

1. attention_query_gradients: rows are queries, a source's columns stream past: dquery. It keeps for the second launch
   query, dR, dquery, (source, entry, position, channel), rounded, and delta (source, entry, position).
2. attention_column_gradients: most programs have columns as rows, and the queries stream past: dx, and parts of the key
   maps' gradients. The others, in triton_weights.py, add up outer products over some of the positions: parts of the
   other weights' gradients.
3. attention_sum_parts, in triton_weights.py: sums of the parts, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._attention.triton_maps import (
    keys_of,
    load_map,
    load_matrix,
    load_rows,
    load_vector,
    of_source,
    queries_of,
    shifted,
    store_map,
    store_matrix,
    store_rows,
)
from fastsam.ops._attention.triton_weights import weight_parts
from fastsam.ops._triton.language import bound, product, rounded


@triton.jit
def diagonal_of_product(left, right, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """sum_c left[i, c] right[c, i] (BLOCK,), added up as a product does."""
    full = product(left, right, tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
    index = tl.arange(0, BLOCK)
    return tl.sum(tl.where(index[:, None] == index[None, :], full, 0.0), 1)


@triton.jit(do_not_specialize=["B"])
def attention_query_gradients(
    h, h_batch, h_channel, m, m_batch, m_channel,
    score_h, score_bias_h, value_h, key_h, score_m, score_bias_m, value_m, key_m,
    dz, dz_batch, dz_channel, r_h, lse_h, shift_h, r_m, lse_m, shift_m,
    query_rows, dr_rows, dquery_rows, delta_rows, B, N,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr, KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
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


@triton.jit(do_not_specialize=["B", "splits"])
def attention_column_gradients(
    h, h_batch, h_channel, m, m_batch, m_channel, score_h, score_m, key_h, key_m, dz, dz_batch, dz_channel,
    r_h, lse_h, shift_h, r_m, lse_m, shift_m, query_rows, dr_rows, dquery_rows, delta_rows, dkey_rows, dh, dm,
    parts, key_parts, B, N, splits,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr, KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SCORE_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
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
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
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
    WIDTH: tl.constexpr = CHUNK if CHUNK < DEPTH else DEPTH
    for depth in tl.range(0, D, WIDTH, num_stages=1):
        some = load_rows(rows, first, N, depth, DEPTH, BLOCK, WIDTH, WHOLE)
        sums = product(some, load_matrix(weights, depth, 0, D, C, WIDTH, CHANNELS), sums, PRECISION)
    return sums


@triton.jit
def store_key_part(part, dkey_rows, plane, stride, shift, first, N, D: tl.constexpr, C: tl.constexpr,
                   DEPTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """sum_j dkey_j x_j^T (D, C) over a block of columns j."""
    WIDTH: tl.constexpr = CHUNK if CHUNK < DEPTH else DEPTH
    for channel in tl.range(0, C, CHUNK, num_stages=1):
        x = load_map(plane, stride, first, N, channel, C, CHUNK, BLOCK, WHOLE)
        x = shifted(x, load_vector(shift, channel, C, CHUNK), first, N, BLOCK, WHOLE)
        for depth in tl.range(0, D, WIDTH, num_stages=1):
            dkeys = load_rows(dkey_rows, first, N, depth, DEPTH, BLOCK, WIDTH, WHOLE)
            tile = product(tl.trans(dkeys), tl.trans(x), tl.zeros([WIDTH, CHUNK], tl.float32), PRECISION)
            store_matrix(part, tile, depth, channel, D, C, WIDTH, CHUNK)
