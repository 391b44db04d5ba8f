"""The activations of the Triton kernels against PyTorch's, over the whole range of float32."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastsam.ops._triton import language  # noqa: E402

BLOCK = 1 << 16
SMALLEST_NORMAL_AT = -87.33654
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

sigmoid, tanh = language.sigmoid, language.tanh


@triton.jit
def _activations_kernel(x, sigmoids, tanhs, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < count, other=0.0)
    tl.store(sigmoids + index, sigmoid(value), mask=index < count)
    tl.store(tanhs + index, tanh(value), mask=index < count)


def _activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and tanh(x) from Triton."""
    x = x.to(DEVICE)
    outputs = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    _activations_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, *outputs, x.numel(), BLOCK)
    return outputs[0].cpu(), outputs[1].cpu()


def _errors_in_ulp(actual: Tensor, exact: Tensor) -> Tensor:
    """Errors in units of the last place of the exact value, those of the smallest normal number below it."""
    smallest = torch.finfo(torch.float32).tiny
    exponent = exact.abs().clamp_min(smallest).log2().floor()
    return (actual.double() - exact).abs() / torch.exp2(exponent - 23)


def _numbers() -> Tensor:
    dense = torch.linspace(-4, 4, 300_007)
    wide = torch.linspace(-120, 120, 200_003)
    near_zero = torch.logspace(-44, 0, 20_003)
    return torch.cat([dense, wide, near_zero, -near_zero])


def test_errors():
    """3 ulp: PyTorch's own sigmoid has 2.5 on a CPU, and the interpreter rounds between product and sum."""
    x = _numbers()
    sigmoids, tanhs = _activations(x)
    normal = x > SMALLEST_NORMAL_AT
    assert _errors_in_ulp(sigmoids, x.double().sigmoid())[normal].max() <= 3
    assert (sigmoids[~normal] <= torch.finfo(torch.float32).tiny).all() and (sigmoids >= 0).all()
    assert _errors_in_ulp(tanhs, x.double().tanh()).max() <= 3


def test_they_stay_in_their_ranges():
    sigmoids, tanhs = _activations(_numbers())
    assert sigmoids.max() == 1 and tanhs.max() == 1 and tanhs.min() == -1


def test_tanh_is_odd():
    x = _numbers()
    assert torch.equal(_activations(x)[1], -_activations(-x)[1])


def test_special_values():
    infinity = float("inf")
    x = torch.tensor([float("nan"), infinity, -infinity, 0.0, 1e38, -1e38, 3e-45])
    sigmoids, tanhs = _activations(x)
    torch.testing.assert_close(sigmoids, torch.sigmoid(x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tanhs[:-1], torch.tanh(x)[:-1], rtol=0, atol=0, equal_nan=True)
    assert tanhs[-1] in (x[-1], 0.0)  # what is below the smallest normal number may be cut
