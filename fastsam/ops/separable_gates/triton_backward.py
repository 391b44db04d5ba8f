"""The Triton kernels of the gradients of `separable_gates`, in three launches.

    1. backward_kernel     the gates again, tile by tile as in the forward pass: dm, and u, dgates, du = pointwise^T
                           dgates for the second launch; without a depthwise filter du is dz and dh
    2. products_kernel     dz and dh, du through the transposed filter; parts of ddepthwise, dpointwise and dbias, which
                           are sums over all positions
    3. sum_of_parts_kernel these parts added up, always in the same order

What goes from launch to launch has the dtype of the maps: PyTorch rounds the same numbers to it. Positions are counted
in 32 bits; a channel's begin, a multiple of the positions N, needs 64: `of_channel` is N in them.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._triton.language import bound, product, rounded, store_range, sum_of_parts
from fastsam.ops.separable_gates.triton_tiles import filtered, gates_of, rows_of


@triton.jit
def backward_kernel(
    z,
    h,
    m,
    depthwise,
    pointwise,
    bias,
    dh_hat,
    dm_new,
    dm,
    u,
    dgates,
    dz,
    dh,
    z_batch,
    z_channel,
    h_batch,
    h_channel,
    m_batch,
    m_channel,
    dh_hat_batch,
    dh_hat_channel,
    dm_new_batch,
    dm_new_channel,
    H,
    W,
    C: tl.constexpr,
    CZ: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of all gates of a tile of positions, (3C), and of what they are made of, du:

        dm_new += dh_hat sigmoid(o)        dm = dm_new (1 - sigmoid(i))        du = pointwise^T dgates
        dgates = [dm_new (g - m) i (1 - i), dm_new i (1 - g^2), dh_hat m_new o (1 - o)], gates after their activations

    CHANNELS is C, padded: du needs the gates of all channels. With a filter, dz is None and dh is for all of du.
    """
    N = H * W
    of_channel = tl.cast(N, tl.int64)
    DTYPE: tl.constexpr = pointwise.dtype.element_ty
    CIN: tl.constexpr = CZ + C
    tiles = tl.cdiv(N, POSITION_TILE)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
    position = (tl.program_id(0) % tiles * POSITION_TILE + tl.arange(0, POSITION_TILE))[None, :]
    maps = (z, h, z_batch, z_channel, h_batch, h_channel)
    i, g, o = gates_of(maps, depthwise, pointwise, bias, u, sample, channel, position, H, W, C, CZ, K, CHUNK, PRECISION)
    there = (channel < C) & (position < N)
    memory = rows_of((None, m, 0, 0, m_batch, m_channel), sample, channel, 0)
    memory = tl.load(memory + position, mask=there, other=0.0).to(tl.float32)
    of_output = rows_of((None, dh_hat, 0, 0, dh_hat_batch, dh_hat_channel), sample, channel, 0)
    of_output = tl.load(of_output + position, mask=there, other=0.0).to(tl.float32)
    of_memory = rows_of((None, dm_new, 0, 0, dm_new_batch, dm_new_channel), sample, channel, 0)
    of_memory = tl.load(of_memory + position, mask=there, other=0.0).to(tl.float32)
    of_memory += of_output * o
    tl.store(dm + (sample * C + channel) * N + position, rounded(of_memory * (1.0 - i), DTYPE), mask=there)
    memory_new = (1.0 - i) * memory + i * g
    di = tl.where(there, of_memory * (g - memory) * i * (1.0 - i), 0.0)
    dg = tl.where(there, of_memory * i * (1.0 - g * g), 0.0)
    do = tl.where(there, of_output * memory_new * o * (1.0 - o), 0.0)
    di, dg, do = rounded(di, DTYPE), rounded(dg, DTYPE), rounded(do, DTYPE)
    to = dgates + (sample * (3 * C) + channel) * N + position
    tl.store(to, di, mask=there)
    tl.store(to + C * of_channel, dg, mask=there)
    tl.store(to + 2 * C * of_channel, do, mask=there)
    DU_CZ: tl.constexpr = CZ if K == 0 else 0
    du_to = (dz, dh, DU_CZ * of_channel, of_channel, (CIN - DU_CZ) * of_channel, of_channel)
    for first in range(0, CIN, CHUNK):
        inputs = (first + tl.arange(0, CHUNK))[:, None].to(tl.int64)
        weights = pointwise + tl.trans(channel) * CIN + inputs
        known = (inputs < CIN) & (tl.trans(channel) < C)
        du = tl.zeros([CHUNK, POSITION_TILE], tl.float32)
        du = product(tl.load(weights, mask=known, other=0.0), di, du, PRECISION)
        du = product(tl.load(weights + C * CIN, mask=known, other=0.0), dg, du, PRECISION)
        du = product(tl.load(weights + 2 * C * CIN, mask=known, other=0.0), do, du, PRECISION)
        inside = (inputs < CIN) & (position < N)
        tl.store(rows_of(du_to, sample, inputs, DU_CZ) + position, rounded(du, DTYPE), mask=inside)


@triton.jit
def _dpointwise_part(
    dgates,
    u_pair,
    of_pointwise,
    of_bias,
    row_tile,
    column_tile,
    begin,
    end,
    N,
    C: tl.constexpr,
    CZ: tl.constexpr,
    U_CZ: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dpointwise = dgates u^T and dbias, the sum of dgates, over tiles of positions from `begin` to before `end`."""
    CIN: tl.constexpr = CZ + C
    row = (row_tile * ROW_TILE + tl.arange(0, ROW_TILE))[:, None].to(tl.int64)
    column = (column_tile * COLUMN_TILE + tl.arange(0, COLUMN_TILE))[:, None].to(tl.int64)
    tiles = tl.cdiv(N, POSITION_TILE)
    total = tl.zeros([ROW_TILE, COLUMN_TILE], tl.float32)
    of_rows = tl.zeros([ROW_TILE, POSITION_TILE], tl.float32)
    for tile in range(bound(begin), bound(end)):
        sample = tl.cast(tile // tiles, tl.int64)
        position = (tile % tiles * POSITION_TILE + tl.arange(0, POSITION_TILE))[None, :]
        of_gates = dgates + (sample * (3 * C) + row) * N + position
        of_gates = tl.load(of_gates, mask=(row < 3 * C) & (position < N), other=0.0)
        u = rows_of(u_pair, sample, column, U_CZ) + position
        u = tl.load(u, mask=(column < CIN) & (position < N), other=0.0)
        total = product(of_gates, tl.trans(u), total, PRECISION)
        of_rows += of_gates.to(tl.float32)
    column = tl.trans(column)
    tl.store(of_pointwise + row * CIN + column, total, mask=(row < 3 * C) & (column < CIN))
    if of_bias is not None:
        tl.store(of_bias + row, tl.sum(of_rows, 1)[:, None], mask=row < tl.where(column_tile == 0, 3 * C, 0))


@triton.jit
def _through_filter(
    maps,
    depthwise,
    du,
    outputs,
    of_depthwise,
    channel_tile,
    begin,
    end,
    H,
    W,
    C: tl.constexpr,
    CZ: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
):
    """dz or dh of some channels, and the part of ddepthwise(tap) = sum_p du(p) x(p + tap), over tiles of positions.

    TAPS taps of each position are summed at a time, each thread keeping the sums of its positions until the end.
    """
    CIN: tl.constexpr = CZ + C
    N = H * W
    tiles = tl.cdiv(N, POSITION_TILE)
    channels = channel_tile * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    channel = tl.minimum(channels, CIN - 1)[:, None].to(tl.int64)
    of_channel = tl.cast(N, tl.int64)
    of_du = (None, du, 0, 0, CIN * of_channel, of_channel)
    for first in range(0, K * K, TAPS):
        tap = first + tl.arange(0, TAPS)[:, None, None]
        of_y, of_x = tap // K - K // 2, tap % K - K // 2
        total = tl.zeros([TAPS, CHANNEL_TILE, POSITION_TILE], tl.float32)
        for tile in range(bound(begin), bound(end)):
            sample = tl.cast(tile // tiles, tl.int64)
            position = (tile % tiles * POSITION_TILE + tl.arange(0, POSITION_TILE))[None, :]
            there = (channels < CIN)[:, None] & (position < N)
            rows = rows_of(of_du, sample, channel, 0)
            if first == 0:
                dx = filtered(rows, depthwise, channel, position, there, H, W, K, -1)
                to = rows_of(outputs, sample, channel, CZ) + position
                tl.store(to, rounded(dx, du.dtype.element_ty), mask=there)
            gradient = tl.load(rows + position, mask=there, other=0.0).to(tl.float32)
            y, x = (position // W)[None, :, :] + of_y, (position % W)[None, :, :] + of_x
            inside = there[None, :, :] & (tap < K * K) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            shifted = rows_of(maps, sample, channel, CZ)[None, :, :] + (position[None, :, :] + (of_y * W + of_x))
            total += gradient[None, :, :] * tl.load(shifted, mask=inside, other=0.0).to(tl.float32)
        taps = first + tl.arange(0, TAPS)[:, None]
        to = of_depthwise + channels[None, :] * (K * K) + taps
        tl.store(to, tl.sum(total, 2), mask=(taps < K * K) & (channels < CIN)[None, :])


@triton.jit(do_not_specialize=["tile_count", "tiles_a_part"])
def products_kernel(
    z,
    h,
    depthwise,
    u,
    dgates,
    du,
    dz,
    dh,
    parts,
    z_batch,
    z_channel,
    h_batch,
    h_channel,
    H,
    W,
    tile_count,
    tiles_a_part,
    C: tl.constexpr,
    CZ: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of the positions of all samples: first the programs for tiles of dpointwise, then those for channels.

    The part is a row of `parts`: dpointwise (3C, CZ + C), dbias (3C) where there is one, ddepthwise (CZ + C, K, K).
    """
    CIN: tl.constexpr = CZ + C
    U_CZ: tl.constexpr = CZ if K == 0 else 0
    BIAS: tl.constexpr = 3 * C if HAS_BIAS else 0
    N = H * W
    of_channel = tl.cast(N, tl.int64)
    columns, products = tl.cdiv(CIN, COLUMN_TILE), tl.cdiv(CIN, COLUMN_TILE) * tl.cdiv(3 * C, ROW_TILE)
    jobs = products + (0 if K == 0 else tl.cdiv(CIN, CHANNEL_TILE))
    part, job = tl.program_id(0) // jobs, tl.program_id(0) % jobs
    begin = part * tiles_a_part
    end = tl.minimum(begin + tiles_a_part, tile_count)
    of_pointwise = parts + part.to(tl.int64) * (3 * C * CIN + BIAS + CIN * K * K)
    of_bias = of_pointwise + 3 * C * CIN
    maps = (z, h, z_batch, z_channel, h_batch, h_channel)
    if job < products:
        u_pair = maps if K == 0 else (None, u, 0, 0, CIN * of_channel, of_channel)
        _dpointwise_part(
            dgates, u_pair, of_pointwise, of_bias if HAS_BIAS else None, job // columns, job % columns, begin, end, N,
            C, CZ, U_CZ, ROW_TILE, COLUMN_TILE, POSITION_TILE, PRECISION,
        )  # fmt: skip
    else:
        if K > 0:
            outputs = (dz, dh, CZ * of_channel, of_channel, C * of_channel, of_channel)
            _through_filter(
                maps, depthwise, du, outputs, of_bias + BIAS, job - products, begin, end, H, W,
                C, CZ, K, TAPS, CHANNEL_TILE, POSITION_TILE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def sum_of_parts_kernel(
    parts,
    dpointwise,
    dbias,
    ddepthwise,
    count,
    POINTWISE: tl.constexpr,
    BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """The rows of `parts` (count, POINTWISE + BIAS + DEPTHWISE) added up; a program has NUMBERS of their columns."""
    ALL: tl.constexpr = POINTWISE + BIAS + DEPTHWISE
    first = tl.program_id(0) * NUMBERS
    total = sum_of_parts(parts, count, first, ALL, NUMBERS, PARTS_AT_ONCE)
    store_range(dpointwise, total, first, 0, POINTWISE, NUMBERS)
    if BIAS > 0:
        store_range(dbias, total, first, POINTWISE, BIAS, NUMBERS)
    if DEPTHWISE > 0:
        store_range(ddepthwise, total, first, POINTWISE + BIAS, DEPTHWISE, NUMBERS)
