"""The attention operators' forward pass in Triton: one launch. Equations: fastsam/ops/_attention/eager.py."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._attention.triton_maps import (
    keys_of,
    load_map,
    load_matrix,
    of_source,
    queries_of,
    sampled_mean,
    shifted,
    store_map,
)
from fastsam.ops._triton.language import bound, product, rounded

MORE_THAN_SOURCES = tl.constexpr(256)
"""What the number of a source, 0 or 1, is divided by for a zero that the compiler cannot know."""


@triton.jit
def softmax_step(scores, maximum, total):
    """The online softmax (equations 3 and 6): weights of one more tile of scores (rows, columns).

    maximum and total (rows,) are the largest score so far, and the sum of exponentials less that. Returns the weights,
    the factor that brings earlier sums to the new maximum, the new maximum and the new total. Scores stay as they are,
    in natural units: where one takes a whole row, maximum is it to the last bit, and so is the log of the sum.
    """
    largest = tl.maximum(maximum, tl.max(scores, 1))
    # While every score is -inf, later finite ones must not meet inf - inf.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(scores - shift[:, None])
    factor = tl.exp(maximum - shift)
    return weights, factor, largest, total * factor + tl.sum(weights, 1)


@triton.jit
def average(query, plane, stride, shift, key, N, D: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
            CHANNELS: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, KEY_CHUNK: tl.constexpr,
            HAS_KEYS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """R_i = sum_j softmax_j(query_i . key_j) x_j, (BLOCK_QUERIES, CHANNELS), x_j less the shift, and the log-sum-exps.

    Both float32.
    """
    maximum = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    r = tl.zeros([BLOCK_QUERIES, CHANNELS], tl.float32)
    ahead = load_map(plane, stride, 0, N, 0, C, CHANNELS, BLOCK_COLUMNS, WHOLE)
    for first in tl.range(0, bound(N), BLOCK_COLUMNS, num_stages=1):
        x = shifted(ahead, shift, first, N, BLOCK_COLUMNS, WHOLE)
        ahead = load_map(plane, stride, first + BLOCK_COLUMNS, N, 0, C, CHANNELS, BLOCK_COLUMNS, False)
        keys = keys_of(
            x, key, plane, stride, shift, first, N, D, C, DEPTH, CHANNELS, BLOCK_COLUMNS, KEY_CHUNK, HAS_KEYS, WHOLE,
            PRECISION,
        )  # fmt: skip
        scores = product(query, keys, tl.zeros([BLOCK_QUERIES, BLOCK_COLUMNS], tl.float32), PRECISION)
        if not WHOLE:
            scores = tl.where((first + tl.arange(0, BLOCK_COLUMNS) < N)[None, :], scores, float("-inf"))
        weights, factor, maximum, total = softmax_step(scores, maximum, total)
        r = product(rounded(weights, x.dtype), tl.trans(x), r * factor[:, None], PRECISION)
    return r / total[:, None], maximum + tl.log(total)


@triton.jit
def add_values(z, stride, r, value, value_bias, source, first, N, C: tl.constexpr, CZ: tl.constexpr,
               CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Add value r, r being (BLOCK, CHANNELS), to a block of an entry of z; before the first source it is value_bias."""
    for channel in tl.range(0, CZ, CHUNK, num_stages=1):
        weights = load_matrix(value, channel, 0, CZ, C, CHUNK, CHANNELS)
        values = tl.trans(product(r, tl.trans(weights), tl.zeros([BLOCK, CHUNK], tl.float32), PRECISION))
        if source == 0:
            channels = channel + tl.arange(0, CHUNK)
            values += tl.load(value_bias + channels, mask=channels < CZ, other=0.0).to(tl.float32)[:, None]
        else:
            values += load_map(z, stride, first, N, channel, CZ, CHUNK, BLOCK, WHOLE).to(tl.float32)
        store_map(z, stride, values, first, N, channel, CZ, CHUNK, BLOCK, WHOLE)


@triton.jit
def attention_forward(
    h, h_batch, h_channel, m, m_batch, m_channel,
    score_h, score_bias_h, value_h, key_h, score_m, score_bias_m, value_m, key_m, value_bias,
    z, r_h, lse_h, shift_h, r_m, lse_m, shift_m, N, count,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr, KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, SAVE: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """z_i = value_h R_h,i + value_m R_m,i + value_bias for a block of queries i of one entry of the batch.

    R_i = sum_j softmax_j((score h_i + score_bias) . (key x_j)) x_j of each source x, h or m. With SAVE, r (R less the
    shift, before it is rounded), lse and shift are stored: `Context`. The number of sources is SOURCES, and `count` as
    well: with a bound that it knows the compiler might unroll the loop over them, or see through `zero` in it.
    """
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_QUERIES
    queries, channels = first + tl.arange(0, BLOCK_QUERIES), tl.arange(0, CHANNELS)
    for source in tl.range(0, bound(count), num_stages=1):
        # 0, and no alignment is lost, but the compiler cannot know: it makes addresses where they are used, instead of
        # keeping those of all steps in registers, out of this loop.
        zero = source // MORE_THAN_SOURCES * 16
        stride = of_source(source, h_channel, m_channel, SOURCES)
        plane = of_source(source, h, m, SOURCES) + entry * of_source(source, h_batch, m_batch, SOURCES)
        mean = sampled_mean(plane, stride, N, C, CHANNELS)
        score = of_source(source, score_h, score_m, SOURCES)
        score_bias = of_source(source, score_bias_h, score_bias_m, SOURCES)
        query = queries_of(
            h + entry * h_batch, h_channel + zero, first, N, score, score_bias, D, C, DEPTH, BLOCK_QUERIES, CHUNK,
            WHOLE, PRECISION,
        )  # fmt: skip
        key = of_source(source, key_h, key_m, SOURCES) if HAS_KEYS else None
        averaged, logarithms = average(
            query, plane, stride, mean, key, N, D, C, DEPTH, CHANNELS, BLOCK_QUERIES, BLOCK_COLUMNS, KEY_CHUNK,
            HAS_KEYS, WHOLE, PRECISION,
        )  # fmt: skip
        if SAVE:
            lse = of_source(source, lse_h, lse_m, SOURCES) + entry * N
            tl.store(lse + queries, logarithms, mask=queries < N)
            r = of_source(source, r_h, r_m, SOURCES) + entry * C * N
            store_map(r, N + zero, tl.trans(averaged), first, N, 0, C, CHANNELS, BLOCK_QUERIES, WHOLE)
            shift = of_source(source, shift_h, shift_m, SOURCES) + entry * C
            tl.store(shift + channels, mean, mask=channels < tl.where(first == 0, C, 0))
        averaged = rounded(averaged + mean[None, :], h.dtype.element_ty)
        value = of_source(source, value_h, value_m, SOURCES)
        tl.debug_barrier()  # other threads may have stored what is read of z
        add_values(
            z + entry * CZ * N, N + zero, averaged, value, value_bias, source, first, N, C, CZ, CHANNELS,
            BLOCK_QUERIES, CHUNK, WHOLE, PRECISION,
        )  # fmt: skip
