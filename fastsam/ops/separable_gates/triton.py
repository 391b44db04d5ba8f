"""`separable_gates` on Triton: the kernels are in triton_forward.py and triton_backward.py."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastsam.ops._native import dense, new_map, weights
from fastsam.ops._triton.configurations import Configuration, check_channels, distinct, launched
from fastsam.ops._triton.launch import ceil_div, padded, precision, run, strides
from fastsam.ops.separable_gates.triton_backward import backward_kernel, products_kernel, sum_of_parts_kernel
from fastsam.ops.separable_gates.triton_forward import forward_kernel

_PARTS = 64  # of all positions, where there are enough: with 6 tiles of dpointwise, 384 programs for its products
_LEAST_TILES_A_PART = 4
_SUM = {"PARTS_AT_ONCE": 16, "NUMBERS": 128, "num_warps": 4}

Arguments = tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
Candidates = tuple[Configuration, ...]


def _warps(tile: int) -> int:
    """As many as tensor cores' products of tiles with so many channels keep busy: 16 channels each."""
    return min(tile // 16, 8)


@functools.cache
def forward_candidates(channels: int, kernel_size: int, tensor_cores: bool) -> Candidates:
    """Tiles of the forward pass. Three sums of 64 x 32 are 48 registers of each of 128 threads.

    Loops that filter are not to be pipelined: each tap's loads would get their own shared memory. Without tensor cores
    the operands of products take more registers, so that there are to be more threads.
    """
    tile, stages = min(padded(channels), 64), 1 if kernel_size else 3
    warps = _warps(tile) if tensor_cores else 8
    sizes = [(32, 16), (16, 32), (32, 32), (64, 32)] if tensor_cores else [(32, 16), (16, 32), (16, 16)]
    return distinct(
        {"CHANNEL_TILE": tile, "POSITION_TILE": positions, "CHUNK": chunk, "num_warps": warps, "num_stages": stages}
        for positions, chunk in sizes
    )


@functools.cache
def backward_candidates(channels: int, tensor_cores: bool) -> Candidates:
    """Tiles of the first launch of the backward pass, whose programs have the gates of all channels.

    Tiles of more positions load the weights less often, but need nearly all registers there are.
    """
    tile = padded(channels)
    warps = _warps(tile) if tensor_cores else 8 if tile <= 128 else 16
    sizes = [(16, 32), (16, 16), (32, 16), (32, 32)] if tile <= 128 and tensor_cores else [(16, 16), (16, 32), (32, 16)]
    return distinct(
        {"CHANNELS": tile, "POSITION_TILE": positions, "CHUNK": chunk, "num_warps": warps, "num_stages": 1}
        for positions, chunk in sizes
    )


@functools.cache
def products_candidates(channels: int, inputs: int, kernel_size: int) -> Candidates:
    """Tiles of the second launch. A thread has TAPS sums of its channel and position."""
    common = {"TAPS": min(padded(kernel_size**2, 1), 32), "POSITION_TILE": 32, "num_stages": 2}
    rows, columns = min(padded(3 * channels), 64), min(padded(inputs), 64)
    sizes = ((rows, columns, 4, 4), (min(rows, 32), columns, 4, 4), (rows, columns, 8, 8))
    return distinct(
        {**common, "ROW_TILE": row, "COLUMN_TILE": column, "CHANNEL_TILE": channel, "num_warps": warps}
        for row, column, channel, warps in sizes
    )


def _readable(arguments: Arguments) -> Arguments:
    z, h, m, *rest = arguments
    depthwise, pointwise, bias = (None if value is None else weights(value, value.dtype) for value in rest)
    return None if z is None else dense(z), dense(h), dense(m), depthwise, pointwise, bias  # type: ignore[return-value]


def _constants(z: Tensor | None, h: Tensor, depthwise: Tensor | None) -> dict[str, Any]:
    kernel_size = 0 if depthwise is None else depthwise.shape[-1]
    return {"C": h.shape[1], "CZ": 0 if z is None else z.shape[1], "K": kernel_size, "PRECISION": precision(h)}


def _sizes(constants: dict[str, Any]) -> tuple[int, int, int]:
    return constants["C"], constants["CZ"], constants["K"]


def _on_tensor_cores(like: Tensor, constants: dict[str, Any]) -> bool:
    return like.dtype != torch.float32 or constants["PRECISION"] == "tf32"


def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_hat and m_new of z, h, m, depthwise, pointwise and bias.

    Raises:
        DoesNotFitError: more than 256 channels, or no room for any tiles on this card.
    """
    z, h, m, depthwise, pointwise, bias = _readable(arguments)  # type: ignore[arg-type]
    check_channels("separable_gates", h.shape[1])
    h_hat, m_new = new_map(h, h.shape[1]), new_map(h, h.shape[1])
    if h.numel() == 0:
        return h_hat, m_new
    (batch, channels, height, width), constants = h.shape, _constants(z, h, depthwise)
    values = (z, h, m, depthwise, pointwise, bias, h_hat, m_new, *strides(z, h, m), height, width)

    def launch(choice: Configuration) -> None:
        programs = ceil_div(channels, choice["CHANNEL_TILE"]) * ceil_div(height * width, choice["POSITION_TILE"])
        run(forward_kernel, (batch * programs,), h, *values, **constants, **choice)

    candidates = forward_candidates(channels, constants["K"], _on_tensor_cores(h, constants))
    launched("separable_gates", "separable_gates_forward", h, _sizes(constants), candidates, launch)
    return h_hat, m_new


def backward(dh_hat: Tensor, dm_new: Tensor, *arguments: Tensor | None) -> list[Tensor | None]:
    """The gradients with respect to z, h, m, depthwise, pointwise and bias; None where the argument is None."""
    inputs = _readable(arguments)  # type: ignore[arg-type]
    dh_hat, dm_new = dense(dh_hat), dense(dm_new)
    gradients = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    if inputs[1].numel() == 0:
        return [None if gradient is None else gradient.zero_() for gradient in gradients]
    constants = _constants(inputs[0], inputs[1], inputs[3])
    workspace = _backward_to_inputs(dh_hat, dm_new, inputs, gradients, constants)
    _weight_gradients(inputs, gradients, *workspace, constants)
    return gradients


def _backward_to_inputs(
    dh_hat: Tensor, dm_new: Tensor, inputs: Arguments, gradients: list[Tensor | None], constants: dict[str, Any]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The first launch: dm, and u, dgates and du; without a filter dz and dh instead of u and du."""
    z, h, m, depthwise, _, _ = inputs
    batch, channels, height, width = h.shape
    dgates, wide = new_map(h, 3 * channels), channels + constants["CZ"]
    u, du = (None, None) if depthwise is None else (new_map(h, wide), new_map(h, wide))
    to = gradients[:2] if du is None else [None, du]
    values: tuple[Any, ...] = (*inputs, dh_hat, dm_new, gradients[2], u, dgates, *to)
    values += (*strides(z, h, m, dh_hat, dm_new), height, width)

    def launch(choice: Configuration) -> None:
        grid = (batch * ceil_div(height * width, choice["POSITION_TILE"]),)
        run(backward_kernel, grid, h, *values, **constants, **choice)

    candidates = backward_candidates(channels, _on_tensor_cores(h, constants))
    launched("separable_gates", "separable_gates_backward", h, _sizes(constants), candidates, launch)
    return u, dgates, du


def _weight_gradients(
    inputs: Arguments,
    gradients: list[Tensor | None],
    u: Tensor | None,
    dgates: Tensor,
    du: Tensor | None,
    constants: dict[str, Any],
) -> None:
    """The second and the third launch; with a filter the second also makes dz and dh."""
    z, h, _, depthwise, pointwise, bias = inputs
    batch, channels, height, width = h.shape
    wide, kernel_size = channels + constants["CZ"], constants["K"]
    numbers = [0 if weight is None else weight.numel() for weight in (pointwise, bias, depthwise)]
    all_constants = {**constants, "HAS_BIAS": bias is not None}
    values: tuple[Any, ...] = (z, h, depthwise, u, dgates, du, *gradients[:2])

    def launch(choice: Configuration) -> Tensor:
        tiles = batch * ceil_div(height * width, choice["POSITION_TILE"])
        tiles_a_part = max(ceil_div(tiles, _PARTS), _LEAST_TILES_A_PART)
        count = ceil_div(tiles, tiles_a_part)
        parts = torch.empty((count, sum(numbers)), dtype=torch.float32, device=h.device)
        jobs = ceil_div(3 * channels, choice["ROW_TILE"]) * ceil_div(wide, choice["COLUMN_TILE"])
        jobs += 0 if depthwise is None else ceil_div(wide, choice["CHANNEL_TILE"])
        more = (parts, *strides(z, h), height, width, tiles, tiles_a_part)
        run(products_kernel, (count * jobs,), h, *values, *more, **all_constants, **choice)
        return parts

    candidates = products_candidates(channels, wide, kernel_size)
    parts = launched("separable_gates", "separable_gates_products", h, _sizes(constants), candidates, launch)
    _, _, _, ddepthwise, dpointwise, dbias = gradients
    grid = (ceil_div(sum(numbers), _SUM["NUMBERS"]),)
    names = dict(zip(("POINTWISE", "BIAS", "DEPTHWISE"), numbers, strict=True))
    run(sum_of_parts_kernel, grid, h, parts, dpointwise, dbias, ddepthwise, parts.shape[0], **names, **_SUM)
