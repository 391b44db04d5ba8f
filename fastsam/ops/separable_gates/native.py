"""`separable_gates` on the compiled kernels: separable_gates*.cpp in csrc/cpu, separable_gates.cu in csrc/cuda."""

import torch
from torch import Tensor

from fastsam.ops._dispatch import arithmetic
from fastsam.ops._native import address, dense, map_fields, new_map, run, weights


def _readable(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    dtype = arithmetic(h.dtype) if h.device.type == "cpu" else h.dtype  # kernels on a GPU widen what they load
    of_gates = (weights(tensor, dtype) for tensor in (depthwise, pointwise, bias))
    return None if z is None else dense(z), dense(h), dense(m), *of_gates  # type: ignore[return-value]


def _input_fields(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> list[int]:
    batch, channels, height, width = h.shape
    z_channels = 0 if z is None else z.shape[1]
    kernel_size = 0 if depthwise is None else depthwise.shape[-1]
    fields = [batch, channels, z_channels, height, width, kernel_size]
    fields += [*map_fields(z), *map_fields(h), *map_fields(m)]
    return [*fields, address(depthwise), address(pointwise), address(bias)]


def forward(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_hat and m_new."""
    inputs = _readable(z, h, m, depthwise, pointwise, bias)
    h_hat, m_new = new_map(h, h.shape[1]), new_map(h, h.shape[1])
    if h.numel() > 0:
        fields = [*_input_fields(*inputs), address(h_hat), address(m_new)]
        run("separable_gates_forward", h, fields)
    return h_hat, m_new


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
    """The gradients with respect to z, h, m, depthwise, pointwise and bias; None where the argument is None."""
    inputs = _readable(z, h, m, depthwise, pointwise, bias)
    dh_hat, dm_new = dense(dh_hat), dense(dm_new)
    gradients = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    if h.numel() == 0:
        return [None if gradient is None else gradient.zero_().to(h.dtype) for gradient in gradients]
    fields = [*_input_fields(*inputs), *map_fields(dh_hat), *map_fields(dm_new), *map(address, gradients)]
    run("separable_gates_backward", h, fields)
    return [None if gradient is None else gradient.to(h.dtype) for gradient in gradients]
