"""The Triton kernel of `separable_gates`: one launch."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._triton.language import rounded
from fastsam.ops.separable_gates.triton_tiles import gates_of, rows_of


@triton.jit
def forward_kernel(
    z,
    h,
    m,
    depthwise,
    pointwise,
    bias,
    h_hat,
    m_new,
    z_batch,
    z_channel,
    h_batch,
    h_channel,
    m_batch,
    m_channel,
    H,
    W,
    C: tl.constexpr,
    CZ: tl.constexpr,
    K: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gates of a tile of channels and positions, and the memory and the output that follow:

        u = depthwise * [z; h]        [i; g; o] = pointwise u + bias
        m_new = (1 - sigmoid(i)) m + sigmoid(i) tanh(g)        h_hat = sigmoid(o) m_new

    A program has all three gates of its channels. Programs for other channels make u again: at 64 channels there are
    none, and beyond, K^2 operations stand beside 3 CHANNEL_TILE of the products.
    """
    N = H * W
    blocks, tiles = tl.cdiv(C, CHANNEL_TILE), tl.cdiv(N, POSITION_TILE)
    program = tl.program_id(0)
    sample = (program // blocks // tiles).to(tl.int64)
    channel = (program % blocks * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE))[:, None].to(tl.int64)
    position = (program // blocks % tiles * POSITION_TILE + tl.arange(0, POSITION_TILE))[None, :]
    maps = (z, h, z_batch, z_channel, h_batch, h_channel)
    i, g, o = gates_of(
        maps, depthwise, pointwise, bias, None, sample, channel, position, H, W, C, CZ, K, CHUNK, PRECISION
    )
    there = (channel < C) & (position < N)
    memory = rows_of((None, m, 0, 0, m_batch, m_channel), sample, channel, 0)
    memory = tl.load(memory + position, mask=there, other=0.0).to(tl.float32)
    memory = (1.0 - i) * memory + i * g
    at = (sample * C + channel) * N + position
    tl.store(m_new + at, rounded(memory, m_new.dtype.element_ty), mask=there)
    tl.store(h_hat + at, rounded(o * memory, h_hat.dtype.element_ty), mask=there)
