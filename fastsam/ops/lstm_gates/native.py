"""`lstm_gates` on the compiled CPU kernels: csrc/cpu/lstm_gates.cpp."""

import torch
from torch import Tensor

from fastsam.ops._native import address, dense, map_fields, new_map, operators


def _input_fields(gates: Tensor, c: Tensor) -> list[int]:
    batch, channels, height, width = c.shape
    return [batch, channels, height * width, *map_fields(gates), *map_fields(c)]


def forward(gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    """h and c_new."""
    gates, c = dense(gates), dense(c)
    h, c_new = new_map(c, c.shape[1]), new_map(c, c.shape[1])
    fields = (*_input_fields(gates, c), address(h), address(c_new))
    operators(c.dtype).lstm_gates_forward(torch.get_num_threads(), float(forget_bias), fields)
    return h, c_new


def backward(dh: Tensor, dc_new: Tensor, gates: Tensor, c: Tensor, forget_bias: float) -> tuple[Tensor, Tensor]:
    """The gradients with respect to gates and c."""
    gates, c, dh, dc_new = dense(gates), dense(c), dense(dh), dense(dc_new)
    dgates, dc = new_map(gates, gates.shape[1]), new_map(c, c.shape[1])
    fields = (*_input_fields(gates, c), *map_fields(dh), *map_fields(dc_new), address(dgates), address(dc))
    operators(c.dtype).lstm_gates_backward(torch.get_num_threads(), float(forget_bias), fields)
    return dgates, dc
