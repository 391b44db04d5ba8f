"""bfloat16 maps on the compiled CPU kernels: stored in 16 bits, computed with in float32."""

import cases
import pytest
import torch
from checks import assert_accurate, evaluate, same_bits

import fastsam

pytestmark = pytest.mark.usefixtures("native_backend")

SIZES = [(1, 1), (3, 5), (7, 7), (6, 9), (16, 16)]
CHANNELS = [1, 13, 64]


@pytest.fixture(params=cases.PUBLIC_VARIANTS)
def variant(request):
    """An operator, and the options that make its arguments."""
    return cases.PUBLIC_VARIANTS[request.param]


@pytest.mark.parametrize(("channels", "size"), [(CHANNELS[n % 3], size) for n, size in enumerate(SIZES)])
def test_accuracy(poison, variant, channels, size):
    operator, options = variant
    options = {**options, "channels": channels, "size": size, "dtype": torch.bfloat16}
    assert_accurate(operator, [cases.make(operator, **options, seed=seed) for seed in range(max(6, 128 // channels))])


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_computes_in_float32(name):
    """The result is that of float32 arithmetic on the same numbers, rounded once at the end.

    Where the new state has a norm, it is rounded before it.
    """
    operator, options = cases.VARIANTS[name]
    arguments = cases.make(operator, **options, channels=16, size=(9, 10), dtype=torch.bfloat16)
    narrow = cases.outputs_of(cases.public(operator)(**arguments))
    wide = cases.outputs_of(cases.public(operator)(**cases.map_tensors(torch.Tensor.float, arguments)))
    for mine, right in zip(narrow, wide, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, right.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "embedded", "strided"])
def test_layouts_give_the_same_bits(variant, layout):
    operator, options = variant
    arguments = cases.make(operator, **options, channels=4, size=(5, 7), dtype=torch.bfloat16)
    expected = evaluate(operator, cases.public(operator), arguments)
    elsewhere = cases.map_tensors(cases.LAYOUTS[layout], arguments)
    assert same_bits(evaluate(operator, cases.public(operator), elsewhere), expected)


def test_rounds_to_nearest_even_and_keeps_nan_and_infinity():
    """A mean of one position is the position itself: z = value x + bias, in float32, rounded by the kernel."""
    exact = 1 + torch.tensor([0.0, 2**-8, 3 * 2**-8, 2**-8 + 2**-12, -(2**-9), -3 * 2**-9, 2**-9])
    exact = torch.cat([exact, torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3895e38])])
    whole = exact.bfloat16()
    rest = torch.where(exact.isfinite(), exact - whole.float(), 0.0).bfloat16()
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    zeros = torch.zeros(1, 1, dtype=torch.bfloat16)
    z = fastsam.ops.self_attention(x, zeros, zeros[0], rest[:, None], whole)
    torch.testing.assert_close(z.flatten(), (whole.float() + rest.float()).bfloat16(), rtol=0, atol=0, equal_nan=True)
