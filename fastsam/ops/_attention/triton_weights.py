"""Gradients of the attention's weights in Triton: parts of them, and the sums of the parts (triton_backward.py)."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._attention.triton_maps import load_map, load_rows, load_vector, of_source, store_matrix
from fastsam.ops._triton.language import bound, product, rounded, store_range, sum_of_parts

PARTS_AT_ONCE = tl.constexpr(8)


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
            of_source(source, r_h, r_m, SOURCES), of_source(source, shift_h, shift_m, SOURCES), N, C, CZ, WHOLE,
            PRECISION, VALUE_TILE, CHANNEL_TILE, BLOCK,
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
    tl.store(part + (D + CZ) * C + rows, bias, mask=rows < tl.where(channel == 0, D, 0))


@triton.jit
def value_part(
    part, bias_part, has_bias, row, channel, begin, end, blocks, dz, dz_batch, dz_channel, r, shift, N,
    C: tl.constexpr, CZ: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i dz_i R_i^T, R with its shift and rounded, over the positions i of blocks [begin, end).

    And sum_i dz_i over them, if `has_bias`, for one source only.
    """
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
    tl.store(bias_part + rows, bias, mask=rows < tl.where((channel == 0) & has_bias, CZ, 0))


@triton.jit(do_not_specialize=["splits", "key_count"])
def attention_sum_parts(
    parts, splits, key_parts, key_count, dscore_h, dscore_bias_h, dvalue_h, dkey_h, dscore_m, dscore_bias_m, dvalue_m,
    dkey_m, dvalue_bias, C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, SOURCES: tl.constexpr,
    HAS_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over the parts that `attention_column_gradients` has stored, in the dtype of the weights.

    An element is one of dscore, dvalue, dscore_bias of each source and then of dvalue_bias. The first programs have
    these, the others the key maps' gradients.
    """
    own: tl.constexpr = (D + CZ) * C + D  # of one source
    elements: tl.constexpr = SOURCES * own + CZ
    programs: tl.constexpr = (elements + BLOCK - 1) // BLOCK
    if tl.program_id(0) < programs:
        first = tl.program_id(0) * BLOCK
        total = sum_of_parts(parts, splits, first, elements, BLOCK, PARTS_AT_ONCE)
        store_range(dscore_h, total, first, 0, D * C, BLOCK)
        store_range(dvalue_h, total, first, D * C, CZ * C, BLOCK)
        store_range(dscore_bias_h, total, first, (D + CZ) * C, D, BLOCK)
        if SOURCES == 2:
            store_range(dscore_m, total, first, own, D * C, BLOCK)
            store_range(dvalue_m, total, first, own + D * C, CZ * C, BLOCK)
            store_range(dscore_bias_m, total, first, own + (D + CZ) * C, D, BLOCK)
        store_range(dvalue_bias, total, first, SOURCES * own, CZ, BLOCK)
    elif HAS_KEYS:
        first = (tl.program_id(0) - programs) * BLOCK
        total = sum_of_parts(key_parts, key_count, first, SOURCES * D * C, BLOCK, PARTS_AT_ONCE)
        store_range(dkey_h, total, first, 0, D * C, BLOCK)
        if SOURCES == 2:
            store_range(dkey_m, total, first, D * C, D * C, BLOCK)
