"""The memory update and the output of SAM in plain PyTorch, to be read beside equations 8 and 9 of the paper."""

import torch
from torch import Tensor
from torch.nn import functional as F


def separable_gates(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `fastsam.ops.separable_gates`."""
    u = h if z is None else torch.cat([z, h], dim=1)
    if depthwise is not None:
        u = F.conv2d(u, depthwise, padding=depthwise.shape[-1] // 2, groups=u.shape[1])
    i, g, o = F.conv2d(u, pointwise, bias).chunk(3, dim=1)
    i, g, o = i.sigmoid(), g.tanh(), o.sigmoid()
    m_new = (1 - i) * m + i * g
    return (o * m_new).contiguous(), m_new.contiguous()


forward = separable_gates


def backward(
    dh_hat: Tensor,
    dm_new: Tensor,
    z: Tensor | None,
    h: Tensor,
    m: Tensor,
    depthwise: Tensor | None,
    pointwise: Tensor,
    bias: Tensor | None,
) -> list[Tensor | None]:
    """The gradients with respect to z, h, m, depthwise, pointwise and bias, everything computed again."""
    u = h if z is None else torch.cat([z, h], dim=1)
    width = u.shape[1]
    v = u if depthwise is None else F.conv2d(u, depthwise, padding=depthwise.shape[-1] // 2, groups=width)
    i, g, o = F.conv2d(v, pointwise, bias).chunk(3, dim=1)
    i, g, o = i.sigmoid(), g.tanh(), o.sigmoid()
    m_new = (1 - i) * m + i * g
    dm_new = dm_new + dh_hat * o
    di, dg, do = dm_new * (g - m), dm_new * i, dh_hat * m_new
    dgates = torch.cat([di * i * (1 - i), dg * (1 - g * g), do * o * (1 - o)], dim=1)
    dv, dpointwise, dbias = _convolution_backward(dgates, v, pointwise, groups=1, bias=bias is not None)
    du, ddepthwise = dv, None
    if depthwise is not None:
        du, ddepthwise, _ = _convolution_backward(dv, u, depthwise, groups=width, bias=False)
    dz, dh = du[:, : width - h.shape[1]], du[:, width - h.shape[1] :]
    gradients = [None if z is None else dz, dh, dm_new * (1 - i), ddepthwise, dpointwise, dbias]
    return [None if gradient is None else gradient.contiguous() for gradient in gradients]


def _convolution_backward(
    doutput: Tensor, x: Tensor, weight: Tensor, groups: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a "same" convolution with respect to its input, its weight and, where it has one, its bias.

    Written out because autograd does not run inside of a registered operator.
    """
    padding = [weight.shape[-1] // 2] * 2
    gradients = torch.ops.aten.convolution_backward(
        doutput, x, weight, [weight.shape[0]], [1, 1], padding, [1, 1], False, [0, 0], groups, [True, True, bias]
    )
    return gradients
