"""torch.func and forward-mode derivatives: the eager form serves them; native code never answers them wrongly."""

from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor

import fastsam

VARIANTS = list(cases.PUBLIC_VARIANTS)
REFUSAL = r"eager"


def _function_of_first(variant: str, function) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The first output as a function of the first tensor, and that tensor."""
    operator, options = cases.PUBLIC_VARIANTS[variant]
    arguments = cases.make(operator, **options)
    first = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    return lambda value: cases.outputs_of(function(operator)(**{**arguments, first: value}))[0], arguments[first]


@pytest.fixture(params=["eager", "auto"])
def transforming_backend(request):
    with fastsam.backend(request.param):
        yield request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_func_grad(transforming_backend, variant):
    call, x = _function_of_first(variant, cases.public)
    naive, _ = _function_of_first(variant, cases.naive)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(naive(leaf).square().sum(), leaf)
    actual = torch.func.grad(lambda value: call(value).square().sum())(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_jvp(transforming_backend, variant):
    call, x = _function_of_first(variant, cases.public)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    _, actual = torch.func.jvp(call, (x,), (direction,))
    step = 1e-6
    expected = (call(x + step * direction) - call(x - step * direction)) / (2 * step)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap(transforming_backend, variant):
    call, x = _function_of_first(variant, cases.public)
    stacked = torch.stack([x, 2 * x, -x])
    actual = torch.func.vmap(call)(stacked)
    torch.testing.assert_close(actual, torch.stack([call(one) for one in stacked]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dual_numbers(transforming_backend, variant):
    call, x = _function_of_first(variant, cases.public)
    direction = torch.ones_like(x)
    _, expected = torch.func.jvp(_function_of_first(variant, cases.naive)[0], (x,), (direction,))
    with torch.autograd.forward_ad.dual_level():
        output = call(torch.autograd.forward_ad.make_dual(x, direction))
        actual = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forced_native_code_refuses_transforms(native_backend, variant):
    call, x = _function_of_first(variant, cases.public)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.grad(lambda value: call(value).sum())(x)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.vmap(call)(x[None])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSAL):
        call(torch.autograd.forward_ad.make_dual(x, x))
