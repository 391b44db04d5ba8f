"""Products of a warp by every way to multiply, on integers whose products are exact, against those of PyTorch."""

from collections.abc import Callable

import pytest
import torch
from kernel_build import Kernels
from torch import Tensor

ROWS = 32
"""Of two warps."""

OPERANDS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,
    "half_8": torch.float16,
    "half_16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The ways to multiply, with the type of what they multiply."""

WAYS = pytest.mark.parametrize("way", OPERANDS)


@pytest.fixture(scope="module")
def built(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("warp_product.cu")


@pytest.fixture
def kernels(built: Kernels, seed: int | None) -> Kernels:
    """In three orders of threads."""
    built.schedule(seed)
    return built


def _integers(way: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-99, 100, shape, generator=generator).to(_sums(way))


def _sums(way: str) -> torch.dtype:
    return torch.float64 if way == "float64" else torch.float32


def _tiles(way: str) -> list[int]:
    """Numbers of tiles there are kernels for: pairs where operands have 16 bits."""
    return [2, 8] if OPERANDS[way].itemsize == 2 else [1, 2, 8]


@WAYS
@pytest.mark.parametrize("depth", [16, 48])
def test_transposed_by_plain(kernels: Kernels, way: str, depth: int) -> None:
    for tiles in _tiles(way):
        a, b, c = (_integers(way, *shape) for shape in ((depth, ROWS), (depth, 8 * tiles), (ROWS, 8 * tiles)))
        out = torch.full_like(c, torch.nan)
        getattr(kernels, f"tn_{way}")(a, b, c, out, depth, tiles)
        assert torch.equal(out, c + a.T @ b)


@WAYS
@pytest.mark.parametrize("depth", [16, 48])
def test_plain_by_transposed(kernels: Kernels, way: str, depth: int) -> None:
    for tiles in _tiles(way):
        for used in {tiles, max(1, tiles - 2)} if tiles != 2 else {2}:
            a, b, c = (_integers(way, *shape) for shape in ((ROWS, depth), (8 * used, depth), (ROWS, 8 * tiles)))
            out = torch.full_like(c, torch.nan)
            getattr(kernels, f"nt_{way}")(a, b, c, out, depth, tiles, used)
            c[:, : 8 * used] += a @ b.T
            assert torch.equal(out, c)


@WAYS
def test_sums_by_transposed(kernels: Kernels, way: str) -> None:
    for deep in _tiles(way):
        for tiles in _tiles(way):
            for used in {tiles, max(1, tiles - 2)} if tiles != 2 else {2}:
                shapes = ((ROWS, 8 * deep), (8 * used, 8 * deep), (ROWS, 8 * tiles))
                p, b, c = (_integers(way, *shape) for shape in shapes)
                out = torch.full_like(c, torch.nan)
                getattr(kernels, f"left_{way}")(p, b, c, out, deep, tiles, used)
                c[:, : 8 * used] += p @ b.T
                assert torch.equal(out, c)


@WAYS
def test_sums_are_rounded_to_operands(built: Kernels, way: str) -> None:
    """Times the identity: each sum comes out as the operand that it was made."""
    built.schedule(None)
    p = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(_sums(way))
    zero, one = torch.zeros(ROWS, 16, dtype=p.dtype), torch.eye(16, dtype=p.dtype)
    out = torch.full_like(p, torch.nan)
    getattr(built, f"left_{way}")(p, one, zero, out, 2, 2, 2)
    expected = p.to(OPERANDS[way]).to(p.dtype)
    if way == "tf32":
        expected = ((p.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    assert torch.equal(out, expected)


@WAYS
def test_largest_and_sum_of_a_row(kernels: Kernels, way: str) -> None:
    for tiles in _tiles(way):
        c = _integers(way, ROWS, 8 * tiles)
        largest, total = (torch.full((ROWS,), torch.nan, dtype=c.dtype) for _ in range(2))
        getattr(kernels, f"rows_{way}")(c, largest, total, tiles)
        assert torch.equal(largest, c.amax(1))
        assert torch.equal(total, c.sum(1))
