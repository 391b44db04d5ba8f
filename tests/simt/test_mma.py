"""Matrix instructions: the host twins against exact products, with fragments laid out as the PTX manual says."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from kernel_build import Kernels

FORMATS = {
    "tf32_8": (torch.float32, 8),
    "half_8": (torch.float16, 8),
    "half_16": (torch.float16, 16),
    "bfloat16_16": (torch.bfloat16, 16),
}

Mode = list[tuple[int, int]]

# CuTe (include/cute/atom/mma_traits_sm75.hpp and _sm80.hpp) describes the same fragments in another way: the numbers of
# lane and element, cut into digits (size, stride), give a place in column-major a (16, K), b (8, K) and c (16, 8).
LANE_A16: Mode = [(4, 32), (8, 1)]
LANE_B16: Mode = [(4, 16), (8, 1)]
CUTE_C: tuple[Mode, Mode] = ([(4, 32), (8, 1)], [(2, 16), (2, 8)])
CUTE_A = {
    "tf32_8": ([(4, 16), (8, 1)], [(2, 8), (2, 64)]),
    "half_8": (LANE_A16, [(2, 16), (2, 8)]),
    "half_16": (LANE_A16, [(2, 16), (2, 8), (2, 128)]),
    "bfloat16_16": (LANE_A16, [(2, 16), (2, 8), (2, 128)]),
}
CUTE_B = {
    "tf32_8": ([(4, 8), (8, 1)], [(2, 32)]),
    "half_8": (LANE_B16, [(2, 8)]),
    "half_16": (LANE_B16, [(2, 8), (2, 64)]),
    "bfloat16_16": (LANE_B16, [(2, 8), (2, 64)]),
}


@pytest.fixture(scope="module")
def kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("mma.cu")


def _arguments(name: str) -> list[int]:
    return [1] if name == "tf32_8" else []


def _integers(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("name", [*FORMATS, "loaded_half", "loaded_bfloat16"])
def test_product_of_integers_is_exact(kernels: Kernels, name: str) -> None:
    depth = FORMATS[name][1] if name in FORMATS else 16
    a, b, c = _integers((16, depth), 1), _integers((depth, 8), 2), _integers((16, 8), 3)
    expected = c.double() + a.double() @ b.double()
    getattr(kernels, f"run_{name}")(a, b, c, *_arguments(name))
    assert torch.equal(c.double(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_product_of_rounded_numbers(kernels: Kernels, name: str) -> None:
    dtype, depth = FORMATS[name]
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(16, depth, generator=generator), torch.randn(depth, 8, generator=generator)
    c = torch.zeros(16, 8)
    getattr(kernels, f"run_{name}")(a, b, c, *_arguments(name))

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if dtype != torch.float32:
            return x.to(dtype).double()
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    exact = rounded(a) @ rounded(b)
    # Products are exact in float32, sums are rounded at most once a term.
    bound = depth * 2.0**-24 * (rounded(a).abs() @ rounded(b).abs())
    assert ((c.double() - exact).abs() <= bound).all()


def test_tensor_cores_ignore_what_tf32_does_not_hold(kernels: Kernels) -> None:
    just_below = torch.tensor(2.0).nextafter(torch.tensor(0.0)).item()
    a, b, c = torch.full((16, 8), just_below), torch.ones(8, 8), torch.zeros(16, 8)
    kernels.run_tf32_8(a, b, c, 0)
    assert torch.equal(c, torch.full((16, 8), 8 * (2.0 - 2.0**-10)))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(kernels: Kernels, count: int, transposed: bool) -> None:
    x = torch.arange(count * 64, dtype=torch.float16).view(count, 8, 8)
    y = torch.zeros(count, 32, dtype=torch.int32)
    getattr(kernels, f"run_load_{count}{'_transposed' if transposed else ''}")(x, y)
    # Each lane has two neighbours of a row; the lanes go through the matrix row by row.
    assert torch.equal(y.view(torch.float16).view(count, 8, 8), x.mT if transposed else x)


def _places(modes: tuple[Mode, Mode], rows: int) -> list[list[int]]:
    """Row and column of each element of each lane, the first digit of a number being its lowest."""

    def offsets(digits: Mode) -> list[int]:
        ranges = [range(0, size * stride, stride) for size, stride in reversed(digits)]
        return [sum(digit) for digit in product(*ranges)]

    return [[(lane + element) % rows, (lane + element) // rows] for lane, element in product(*map(offsets, modes))]


@pytest.mark.parametrize("name", FORMATS)
def test_layout_is_that_of_cute(kernels: Kernels, name: str) -> None:
    depth = FORMATS[name][1]
    a, b, c = (torch.zeros(count // 32 * 32, 2, dtype=torch.int32) for count in (16 * depth, 8 * depth, 128))
    getattr(kernels, f"layout_{name}")(a, b, c)
    assert a.tolist() == _places(CUTE_A[name], 16)
    # CuTe has b as (n, k).
    assert b.flip(1).tolist() == _places(CUTE_B[name], 8)
    assert c.tolist() == _places(CUTE_C, 16)
