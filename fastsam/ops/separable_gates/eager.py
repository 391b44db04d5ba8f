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
    return o * m_new, m_new


def forward(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return separable_gates(z, h, m, depthwise, pointwise, bias)


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
    tensors = [z, h, m, depthwise, pointwise, bias]
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        outputs = separable_gates(*leaves)  # type: ignore[arg-type]
        present = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(outputs, present, (dh_hat, dm_new)))
    return [None if leaf is None else next(gradients) for leaf in leaves]
