"""Tiles that the attention's Triton kernels have in common: of maps and matrices, columns, keys and queries.

Tiles of maps are (channels, positions), as maps lie in memory.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._triton.language import product, rounded

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
def load_matrix(matrix, first_row, first_column, ROWS, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """The tile (HEIGHT, WIDTH) of a (ROWS, COLUMNS) matrix from a row and a column on, 0 beyond it."""
    rows = first_row + tl.arange(0, HEIGHT)
    columns = first_column + tl.arange(0, WIDTH)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    return tl.load(matrix + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(matrix, tile, first_row, first_column, ROWS, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """Store a tile (HEIGHT, WIDTH) where `load_matrix` would load it."""
    rows = first_row + tl.arange(0, HEIGHT)
    columns = first_column + tl.arange(0, WIDTH)
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    tl.store(matrix + rows[:, None] * COLUMNS + columns[None, :], tile, mask=inside)


@triton.jit
def load_vector(vector, first, count, BLOCK: tl.constexpr):
    """Elements [first, first + BLOCK), 0 beyond the count."""
    index = first + tl.arange(0, BLOCK)
    return tl.load(vector + index, mask=index < count, other=0.0)


@triton.jit
def some_of(vector, first, COUNT: tl.constexpr):
    """Elements [first, first + COUNT) of a vector that is in registers."""
    wanted = first + tl.arange(0, COUNT)
    index = tl.arange(0, vector.shape[0])
    return tl.sum(tl.where(wanted[:, None] == index[None, :], vector[None, :], 0.0), 1)


@triton.jit
def of_source(source, h, m, SOURCES: tl.constexpr):
    """What belongs to a source, by its number: h or m."""
    if SOURCES == 1:
        return h
    else:
        return tl.where(source == 0, h, m)


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
