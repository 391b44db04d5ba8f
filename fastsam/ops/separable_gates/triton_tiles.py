"""What the Triton kernels of `separable_gates` share: the channels of [z; h], the depthwise filter, the gates.

Tiles are (channels, positions), positions being a run of the flattened map. A pair of maps is a tuple (z, h, batch
stride of z, channel stride of z, batch stride of h, channel stride of h), its channels those of z, then those of h.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.ops._triton.language import product, rounded, sigmoid, tanh


@triton.jit
def rows_of(pair, sample, channel, CZ: tl.constexpr):
    """Pointers to the first position of some channels (int64) of a pair of maps, of which z has CZ."""
    rows = pair[1] + sample * pair[4] + (channel - CZ) * pair[5]
    if CZ > 0:
        rows = tl.where(channel < CZ, pair[0] + sample * pair[2] + channel * pair[3], rows)
    return rows


@triton.jit
def filtered(rows, depthwise, channel, position, there, H, W, K: tl.constexpr, SIGN: tl.constexpr):
    """Maps through the depthwise filter (channels, K, K), with zeros around them; K = 0: the maps themselves.

    SIGN = 1 is the filter of the forward pass, x(p + tap) for each tap, -1 its transpose, x(p - tap).
    """
    if K == 0:
        result = tl.load(rows + position, mask=there, other=0.0).to(tl.float32)
    else:
        result = tl.zeros(there.shape, tl.float32)
        y, x = position // W, position % W
        for row in range(K):
            of_y = SIGN * (row - K // 2)
            inside_y = there & (y + of_y >= 0) & (y + of_y < H)
            for column in tl.static_range(K):
                of_x = SIGN * (column - K // 2)
                inside = inside_y & (x + of_x >= 0) & (x + of_x < W)
                value = tl.load(rows + (position + (of_y * W + of_x)), mask=inside, other=0.0).to(tl.float32)
                tap = tl.load(depthwise + channel * (K * K) + (row * K + column)).to(tl.float32)
                result += tap * value
    return result


@triton.jit
def gates_of(
    maps,
    depthwise,
    pointwise,
    bias,
    u_all,
    sample,
    channel,
    position,
    H,
    W,
    C: tl.constexpr,
    CZ: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sigmoid(i), tanh(g) and sigmoid(o) of some channels (n, 1), [i; g; o] = pointwise u + bias.

    A chunk of channels of u = depthwise * [z; h] is made and multiplied at once. It is stored where u_all is not None,
    (B, CZ + C, N).
    """
    CIN: tl.constexpr = CZ + C
    i = tl.zeros([channel.shape[0], position.shape[1]], tl.float32)
    g = tl.zeros([channel.shape[0], position.shape[1]], tl.float32)
    o = tl.zeros([channel.shape[0], position.shape[1]], tl.float32)
    for first in range(0, CIN, CHUNK):
        inputs = first + tl.arange(0, CHUNK)
        # The last channel stands for those beyond it, so that its address is good; they are masked.
        near = tl.minimum(inputs, CIN - 1)[:, None].to(tl.int64)
        there = (inputs < CIN)[:, None] & (position < H * W)
        u = filtered(rows_of(maps, sample, near, CZ), depthwise, near, position, there, H, W, K, 1)
        # A filter that is not finite makes no 0 of the zeros around its map, which must not get into the product.
        u = rounded(tl.where(there, u, 0.0), pointwise.dtype.element_ty)
        if u_all is not None:
            tl.store(u_all + (sample * CIN + near) * (H * W) + position, u, mask=there)
        weights = pointwise + channel * CIN + inputs[None, :]
        there = (channel < C) & (inputs < CIN)[None, :]
        i = product(tl.load(weights, mask=there, other=0.0), u, i, PRECISION)
        g = product(tl.load(weights + C * CIN, mask=there, other=0.0), u, g, PRECISION)
        o = product(tl.load(weights + 2 * C * CIN, mask=there, other=0.0), u, o, PRECISION)
    if bias is not None:
        i += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
        g += tl.load(bias + C + channel, mask=channel < C, other=0.0).to(tl.float32)
        o += tl.load(bias + 2 * C + channel, mask=channel < C, other=0.0).to(tl.float32)
    return sigmoid(i), tanh(g), sigmoid(o)
