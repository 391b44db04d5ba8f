"""The attention operators' forward pass in Triton: one launch. Equations: fastsam/ops/_attention/eager.py.

Tiles of maps are (channels, positions), as maps lie in memory. Sums of queries are (queries, channels).
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._triton.language import bound, product, rounded

SAMPLES = tl.constexpr(128)
SAMPLE_GROUP = tl.constexpr(8)
SAMPLES_AT_ONCE = tl.constexpr(16)


@triton.jit
def load_map(plane, stride, first, N, first_channel, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
             WHOLE: tl.constexpr):  # fmt: skip
    """The tile (CHANNELS, BLOCK) of an entry's map (C, N) from a channel and a position on, 0 beyond the map.

    stride is that of the channels; WHOLE says that no tile reaches beyond the positions.
    """
    channels = first_channel + tl.arange(0, CHANNELS)
    positions = first + tl.arange(0, BLOCK)
    inside = channels[:, None] < C
    if not WHOLE:
        inside = inside & (positions[None, :] < N)
    return tl.load(plane + channels.to(tl.int64)[:, None] * stride + positions[None, :], mask=inside, other=0.0)


@triton.jit
def store_map(plane, stride, tile, first, N, first_channel, C: tl.constexpr, CHANNELS: tl.constexpr,
              BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Store a float32 tile (CHANNELS, BLOCK) where `load_map` would load it."""
    channels = first_channel + tl.arange(0, CHANNELS)
    positions = first + tl.arange(0, BLOCK)
    inside = channels[:, None] < C
    if not WHOLE:
        inside = inside & (positions[None, :] < N)
    pointers = plane + channels.to(tl.int64)[:, None] * stride + positions[None, :]
    tl.store(pointers, rounded(tile, plane.dtype.element_ty), mask=inside)


@triton.jit
def load_matrix(matrix, first_row, first_column, ROWS, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """The tile (HEIGHT, WIDTH) of a (ROWS, COLUMNS) matrix from a row and a column on, 0 beyond it."""
    rows = first_row + tl.arange(0, HEIGHT)
    columns = first_column + tl.arange(0, WIDTH)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    return tl.load(matrix + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)


@triton.jit
def sampled_mean(plane, stride, N, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean (CHANNELS,) of 128 positions at most, in groups of 8 from all over the map; 0 where it is not finite.

    Attention does not change when the same vector is taken from all columns of a source, but for R, which loses it too;
    a mean that stays in the columns costs digits, and any vector near it will do.
    """
    channels = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS, SAMPLES_AT_ONCE], tl.float32)
    for first in tl.static_range(0, SAMPLES, SAMPLES_AT_ONCE):
        sample = first + tl.arange(0, SAMPLES_AT_ONCE)
        group = sample // SAMPLE_GROUP * (N // SAMPLE_GROUP - 1) // (SAMPLES // SAMPLE_GROUP - 1)
        position = tl.where(N <= SAMPLES, sample, group * SAMPLE_GROUP + sample % SAMPLE_GROUP)
        inside = (channels[:, None] < C) & (sample[None, :] < N)
        pointers = plane + channels.to(tl.int64)[:, None] * stride + position[None, :]
        total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / tl.minimum(N, SAMPLES)
    return tl.where(mean - mean == 0, mean, 0.0)


@triton.jit
def shifted(x, shift, first, N, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A tile (CHANNELS, BLOCK) of a source less its shift (CHANNELS,), rounded to its dtype; 0 beyond the map."""
    moved = x.to(tl.float32) - shift[:, None]
    if not WHOLE:
        moved = tl.where((first + tl.arange(0, BLOCK) < N)[None, :], moved, 0.0)
    return rounded(moved, x.dtype)


@triton.jit
def some_of(vector, first, COUNT: tl.constexpr):
    """Elements [first, first + COUNT) of a vector that is in registers."""
    wanted = first + tl.arange(0, COUNT)
    index = tl.arange(0, vector.shape[0])
    return tl.sum(tl.where(wanted[:, None] == index[None, :], vector[None, :], 0.0), 1)


@triton.jit
def keys_of(x, key, plane, stride, shift, first, N, D: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
            CHANNELS: tl.constexpr, BLOCK: tl.constexpr, KEY_CHUNK: tl.constexpr, HAS_KEYS: tl.constexpr,
            WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The keys (DEPTH, BLOCK) of a tile x (CHANNELS, BLOCK) of `shifted` columns: key x, rounded, or x itself.

    A large key map is taken KEY_CHUNK channels at a time, and so is the tile, loaded once more.
    """
    if HAS_KEYS:
        keys = tl.zeros([DEPTH, BLOCK], tl.float32)
        if KEY_CHUNK == CHANNELS:
            keys = product(load_matrix(key, 0, 0, D, C, DEPTH, CHANNELS), x, keys, PRECISION)
        else:
            for channel in tl.range(0, C, KEY_CHUNK, num_stages=1):
                some = load_map(plane, stride, first, N, channel, C, KEY_CHUNK, BLOCK, WHOLE)
                some = shifted(some, some_of(shift, channel, KEY_CHUNK), first, N, BLOCK, WHOLE)
                weights = load_matrix(key, 0, channel, D, C, DEPTH, KEY_CHUNK)
                keys = product(weights, some, keys, PRECISION)
        return rounded(keys, x.dtype)
    else:
        return x


@triton.jit
def queries_of(h, stride, first, N, score, score_bias, D: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
               BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The queries (BLOCK, DEPTH) of a tile of the hidden state: score h_i + score_bias, rounded to the map's dtype."""
    query = tl.zeros([BLOCK, DEPTH], tl.float32)
    for channel in tl.range(0, C, CHUNK, num_stages=1):
        hidden = load_map(h, stride, first, N, channel, C, CHUNK, BLOCK, WHOLE)
        weights = load_matrix(score, 0, channel, D, C, DEPTH, CHUNK)
        query = product(tl.trans(hidden), tl.trans(weights), query, PRECISION)
    depth = tl.arange(0, DEPTH)
    query += tl.load(score_bias + depth, mask=depth < D, other=0.0).to(tl.float32)[None, :]
    return rounded(query, h.dtype.element_ty)


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
def of_source(source, h, m, SOURCES: tl.constexpr):
    """What belongs to a source, by its number: h or m."""
    if SOURCES == 1:
        return h
    else:
        return tl.where(source == 0, h, m)


@triton.jit
def add_values(z, r, value, value_bias, source, first, N, C: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr,
               BLOCK: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add value r, r being (BLOCK, CHANNELS), to a block of an entry of z; before the first source it is value_bias."""
    for channel in tl.range(0, CZ, CHUNK, num_stages=1):
        weights = load_matrix(value, channel, 0, CZ, C, CHUNK, CHANNELS)
        values = tl.trans(product(r, tl.trans(weights), tl.zeros([BLOCK, CHUNK], tl.float32), PRECISION))
        if source == 0:
            channels = channel + tl.arange(0, CHUNK)
            values += tl.load(value_bias + channels, mask=channels < CZ, other=0.0).to(tl.float32)[:, None]
        else:
            values += load_map(z, N, first, N, channel, CZ, CHUNK, BLOCK, WHOLE).to(tl.float32)
        store_map(z, N, values, first, N, channel, CZ, CHUNK, BLOCK, WHOLE)


@triton.jit
def attention_forward(
    h, h_batch, h_channel, m, m_batch, m_channel,
    score_h, score_bias_h, value_h, key_h, score_m, score_bias_m, value_m, key_m, value_bias,
    z, r_h, lse_h, shift_h, r_m, lse_m, shift_m, N,
    C: tl.constexpr, D: tl.constexpr, CZ: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr, KEY_CHUNK: tl.constexpr, SOURCES: tl.constexpr, HAS_KEYS: tl.constexpr, SAVE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """z_i = value_h R_h,i + value_m R_m,i + value_bias for a block of queries i of one entry of the batch.

    R_i = sum_j softmax_j((score h_i + score_bias) . (key x_j)) x_j of each source x, h or m. With SAVE, r (R less the
    shift, before it is rounded), lse and shift are stored: `Context`.
    """
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_QUERIES
    queries, channels = first + tl.arange(0, BLOCK_QUERIES), tl.arange(0, CHANNELS)
    for source in tl.range(0, SOURCES, num_stages=1):
        stride = of_source(source, h_channel, m_channel, SOURCES)
        plane = of_source(source, h, m, SOURCES) + entry * of_source(source, h_batch, m_batch, SOURCES)
        mean = sampled_mean(plane, stride, N, C, CHANNELS)
        score = of_source(source, score_h, score_m, SOURCES)
        score_bias = of_source(source, score_bias_h, score_bias_m, SOURCES)
        query = queries_of(
            h + entry * h_batch, h_channel, first, N, score, score_bias, D, C, DEPTH, BLOCK_QUERIES, CHUNK, WHOLE,
            PRECISION,
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
            store_map(r, N, tl.trans(averaged), first, N, 0, C, CHANNELS, BLOCK_QUERIES, WHOLE)
            shift = of_source(source, shift_h, shift_m, SOURCES) + entry * C
            tl.store(shift + channels, mean, mask=(channels < C) & (first == 0))
        averaged = rounded(averaged + mean[None, :], h.dtype.element_ty)
        value = of_source(source, value_h, value_m, SOURCES)
        tl.debug_barrier()  # other threads may have stored what is read of z
        add_values(
            z + entry * CZ * N, averaged, value, value_bias, source, first, N, C, CZ, CHANNELS, BLOCK_QUERIES, CHUNK,
            WHOLE, PRECISION,
        )  # fmt: skip
