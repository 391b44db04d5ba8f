"""What kernels may use, each against numpy or PyTorch: indices, warp operations, memory, number formats."""

from collections.abc import Callable

import numpy
import pytest
import torch
from kernel_build import KernelFault, Kernels

Array = numpy.ndarray

LANES = numpy.arange(32, dtype=numpy.int32)


@pytest.fixture(scope="module", params=[(), ("-DFASTSAM_SIMT_UCONTEXT",)], ids=["switch", "ucontext"])
def built(request: pytest.FixtureRequest, compile_host: Callable[..., Kernels]) -> Kernels:
    """Both ways to change from thread to thread."""
    return compile_host("vocabulary.cu", request.param)


@pytest.fixture
def kernels(built: Kernels, seed: int | None) -> Kernels:
    built.schedule(seed)
    return built


def test_indices(kernels: Kernels) -> None:
    y = numpy.full(720, -1, dtype=numpy.int32)
    kernels.run_indices(y)
    expected = [
        1000 * (100 * bz + 10 * by + bx) + 100 * tz + 10 * ty + tx
        for bz in range(2)
        for by in range(3)
        for bx in range(2)
        for tz in range(5)
        for ty in range(3)
        for tx in range(4)
    ]
    assert y.tolist() == expected


def test_shuffles(kernels: Kernels) -> None:
    x = LANES * 3 + 1
    y = numpy.zeros((6, 32), dtype=numpy.int32)
    kernels.run_shuffles(x, y)
    assert (y[0] == x[(LANES + 5) % 32]).all()
    assert (y[1] == x[LANES ^ 3]).all()
    assert (y[2] == x[numpy.where(LANES + 7 < 32, LANES + 7, LANES)]).all()
    assert (y[3] == x[numpy.where(LANES - 7 >= 0, LANES - 7, LANES)]).all()
    assert (y[4] == x[LANES ^ 16]).all()
    assert (y[5] == numpy.where(LANES < 8, x[6], 0)).all()


def test_votes(kernels: Kernels) -> None:
    y = numpy.zeros((6, 32), dtype=numpy.int32)
    kernels.run_votes(LANES, y)
    multiples_of_three = sum(1 << lane for lane in range(0, 32, 3))
    assert (y[0].view(numpy.uint32) == multiples_of_three).all()
    assert (y[1] == 1).all() and (y[2] == 0).all() and (y[3] == 1).all() and (y[4] == 0).all()
    assert (y[5] == (LANES < 4)).all()


@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [("float2", "float32", 2), ("float4", "float32", 4), ("half8", "float16", 8), ("double2", "float64", 2)],
)
def test_vectors(kernels: Kernels, name: str, dtype: str, width: int) -> None:
    # PyTorch aligns what it allocates for vectors; numpy does not.
    x = torch.arange(32 * width, dtype=getattr(torch, dtype)).reshape(32, width)
    y = torch.full_like(x, float("nan"))
    getattr(kernels, f"run_vectors_{name}")(x, y)
    expected = x.flip(0).clone()
    expected[:, [0, -1]] = expected[:, [-1, 0]]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("count", [0, 1, 3, 37, 64, 127, 128])
@pytest.mark.parametrize(("name", "dtype"), [("float4", "float32"), ("half4", "float16"), ("half2", "float16")])
def test_async_copy_fills_what_the_source_lacks_with_zeros(kernels: Kernels, name: str, dtype: str, count: int) -> None:
    size = {"float4": 128, "half4": 128, "half2": 64}[name]
    count = min(count, size)
    x = torch.arange(1, count + 1, dtype=getattr(torch, dtype))
    y = torch.full((size,), float("nan"), dtype=x.dtype)
    getattr(kernels, f"run_async_copy_{name}")(x if count else torch.zeros(1, dtype=x.dtype), y, count)
    assert torch.equal(y[:count], x) and (y[count:] == 0).all()


def test_bytes_of_shared_memory_serve_twice(kernels: Kernels) -> None:
    x, y = torch.arange(32.0), torch.full((32,), float("nan"))
    kernels.run_reused_memory(x, y)
    assert torch.equal(y, x.flip(0) + 2 * x)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_16_bit_number_widens_exactly(built: Kernels, name: str, dtype: torch.dtype) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    y = torch.zeros(65536)
    getattr(built, f"run_widen_{name}")(x, y)
    assert torch.equal(y.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(y[numbers].view(torch.int32), x.float()[numbers].view(torch.int32))


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_rounding_to_16_bits_is_to_nearest_even(built: Kernels, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middles = (every[:-1].double() + every[1:].double()) / 2
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([every, middles.float(), bits.to(torch.int32).view(torch.float32)])
    around = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))])
    y = torch.zeros(around.shape, dtype=dtype)
    getattr(built, f"run_narrow_{name}")(around, y, len(around))
    expected = around.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(y[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_rounding_to_tf32(built: Kernels) -> None:
    one = 1.0
    step = 2.0**-10
    x = [one + step / 2, one + step / 2 - 2**-23, -one - step / 2, one + 1.5 * step, 3.0, 1e-45, 3.4028e38, -torch.inf]
    expected = [one + step, one, -one - step, one + 2 * step, 3.0, 0.0, torch.inf, -torch.inf]
    y = torch.zeros(len(x) + 1)
    built.run_to_tf32(torch.tensor([*x, torch.nan]), y, len(x) + 1)
    # 3.4028e38 lies between the largest tf32 number and the next power of two, and nearer to the latter.
    assert y[:-1].tolist() == expected and y[-1].isnan()


def test_elements_in_expressions(kernels: Kernels) -> None:
    x, y = torch.arange(3.0, 35.0, dtype=torch.float64), torch.full((32,), torch.nan, dtype=torch.float64)
    kernels.run_expressions(x, y)
    ahead = torch.cat([x[1:], torch.zeros(1)])
    even = torch.arange(32) % 2 == 0
    expected = 2 * (x + x * ahead - 2 * x) - torch.where(even, -x, x.flip(0))
    neighbour = x.view(16, 2).flip(1).reshape(32)
    expected = torch.where((x > 10) & (x <= neighbour), x * x[0] + 0.5, expected)
    assert torch.equal(y, expected)


def test_mathematics(kernels: Kernels) -> None:
    x = torch.cat([torch.linspace(0.1, 8.0, 28), torch.tensor([1e-40, -1e-40, -130.0, 200.0])])
    y = torch.zeros(3, 32)
    kernels.run_mathematics(x, y)
    exp2 = torch.exp2(x.double()).float()
    exp2[-2] = 0.0  # 2^-130 is subnormal
    torch.testing.assert_close(y[0], exp2, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(y[1], (x.double() ** 2 + 1).float(), rtol=1e-7, atol=0.0)
    assert torch.equal(y[2], x.clamp(min=2.0) + x.clamp(max=3.0))


def test_a_kernel_reads_what_the_one_before_wrote(kernels: Kernels) -> None:
    x = torch.arange(160.0)
    partial, y = torch.full((5,), torch.nan), torch.full((1,), torch.nan)
    kernels.run_sum(x, partial, y, 5)
    assert torch.equal(partial, x.view(5, 32).sum(1)) and y.item() == x.sum().item()


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "says"),
    [
        (1, 0, 0, "indices: a block of 0 threads, must have 1 to 1024"),
        (1, 1025, 0, "indices: a block of 1025 threads, must have 1 to 1024"),
        (0, 32, 0, "indices: a grid of 0 blocks of 32 threads, must have at least one block"),
        (1, 32, 300000, "indices: a launch with 300000 bytes of dynamic shared memory, at most 232448 are possible"),
    ],
)
def test_impossible_launches(built: Kernels, blocks: int, threads: int, shared: int, says: str) -> None:
    with pytest.raises(KernelFault) as caught:
        built.run_shape(blocks, threads, shared)
    assert says in str(caught.value)
