"""Every fault that the harness promises to find, planted in a kernel that is right without it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from kernel_build import KernelFault, Kernels

SOURCES = Path(__file__).resolve().parent / "kernels"


@dataclass(frozen=True)
class Planted:
    """One kernel: what the report says of the fault, and the source line it points at.

    A race is reported where the later of the two accesses is, and the order of threads decides which one that is.
    """

    kernel: str
    says: str
    line: str
    other_line: str | None = None


MEMORY_FAULTS = [
    Planted("read_bounds", "out-of-bounds read at x[64]: x has 64 elements", "y[i] = x[i + 32 * faulty];"),
    Planted("write_bounds", "out-of-bounds write at y[-1]: y has 64 elements", "y[i - faulty] = x[i];"),
    Planted(
        "static_shared_bounds", "out-of-bounds write at tile[64]: tile has 64 elements", "tile[i + faulty] = x[i];"
    ),
    Planted(
        "dynamic_shared_bounds", "out-of-bounds read at first[64]: first has 64 elements", "y[i] = first[i + faulty];"
    ),
    Planted(
        "shared_size",
        "tile takes bytes 0 to 516 of dynamic shared memory, the launch gave 512",
        'arena.take<float>(128 + faulty, "tile")',
    ),
    Planted(
        "static_shared_size",
        "table: static shared memory of 67108864 bytes, a block has 49152",
        "FASTSAM_SHARED(float, table, 1 << 24);",
    ),
    Planted("null_pointer", "read of a null pointer", "bias != nullptr || faulty"),
    Planted("unwritten_shared", "tile[63] is read, but nobody has written it yet", "y[i] = tile[63 - i];"),
    Planted(
        "static_shared_of_block_before",
        "tile[0] is read, but nobody has written it yet",
        "if (blockIdx.x == 1) y[i] = tile[i];",
    ),
    Planted(
        "dynamic_shared_of_block_before",
        "tile[0] is read, but nobody has written it yet",
        "if (blockIdx.x == 1) y[i] = tile[i];",
    ),
    Planted("unwritten_output", "y[5] is read, but nobody has written it yet", "y[i] += x[i];"),
    Planted(
        "misaligned_load",
        "misaligned 16-byte read at x[2]: its address must be a multiple of 16 bytes",
        "const float4 four = load<float4>",
    ),
    Planted(
        "misaligned_store",
        "misaligned 8-byte write at y[1]: its address must be a multiple of 8 bytes",
        "store(y + 2 * threadIdx.x + faulty",
    ),
    Planted(
        "misaligned_async_copy",
        "misaligned 16-byte cp.async at tile[1]: its address must be a multiple of 16 bytes",
        "cp_async<16>(tile + 4 * i + faulty",
    ),
    Planted(
        "vector_bounds",
        "out-of-bounds 16-byte read at x[64]: x has 64 elements",
        "store(y + 4 * threadIdx.x, load<float4>",
    ),
]

ORDER_FAULTS = [
    Planted("read_after_write", "race on tile[", "y[i] = tile[kThreads - 1 - i];", "tile[i] = x[i];"),
    Planted("write_after_read", "race on tile[", "tile[i] = x[i] + round;", "sum += tile[kThreads - 1 - i];"),
    Planted("write_after_write", "written here, written by thread (", "tile[faulty ? i / 2 : i] = x[i];"),
    Planted("global_race", "race on y[", "if (i > 0 && y[i - 1] > 1e9f)", "y[i] = x[i];"),
    Planted("blocks_race", "and nothing orders blocks of one launch", "y["),
    Planted("warp_race", "race on tile[", "y[i] = tile[i ^ 1];", "tile[i] = x[i];"),
    Planted("across_warps_race", "race on tile[", "y[i] = tile[faulty ? i ^ 32 : i ^ 16];", "tile[i] = x[i];"),
    Planted("shuffle_race", "race on tile[", "y[i] = tile[i ^ 1] + other;", "tile[i] = x[i];"),
    Planted("named_barrier_race", "race on tile[", "y[i] = tile[faulty ? i ^ 64 : i ^ 32];", "tile[i] = x[i];"),
    Planted(
        "write_after_many_reads",
        "race on tile[0]: ",
        "if (i == 0) tile[0] = 1.0f;",
        "y[i] = i < 32 || (faulty && i == 64) ? tile[0] : 0.0f;",
    ),
    Planted("barriers_of_warp_and_block", "race on tile[", "y[i] = tile[kThreads - 1 - i];", "tile[i] = x[i];"),
    Planted("order_by_two_barriers", "read here, written by thread (0, 0, 0) at", "y[i] = i == 40 ? tile[0] : 0.0f;"),
    Planted(
        "returned_before_barrier", "waits at __syncthreads, but thread (77, 0, 0) has returned", "__syncthreads();"
    ),
    Planted("two_barriers", "divergent barrier: is at this __syncthreads, but thread (", "__syncthreads();"),
    Planted(
        "barriers_of_two_kinds", "divergent barriers, all wait for ever: thread (0, 0, 0) at __syncthreads (", "__sync"
    ),
    Planted(
        "two_matrix_loads", "divergent warp: is at this ldmatrix, but lane ", "ldmatrix<1>(matrix, tile + 8 * lane"
    ),
    Planted("two_matrix_products", "divergent warp: is at this mma", "Mma<tf32, 8>::multiply(sum, zeros, more_zeros);"),
    Planted("matrix_load_without_address", "out-of-bounds 16-byte ldmatrix at tile[", "ldmatrix<1>(matrix, tile + ("),
    Planted(
        "named_barrier_size", "named barrier 1 for 127 threads: must be a multiple of 32", "bar_sync(1, 128 - faulty);"
    ),
    Planted("named_barrier_number", "named barrier 16: 1 to 15 are free", "bar_sync(15 + faulty, 128);"),
    Planted("shuffle_without_returned_lane", "__shfl_down_sync names lane 31, which has returned", "__shfl_down_sync("),
    Planted(
        "shuffle_before_lane_returns", "__any_sync names lane 31, which has returned", "__any_sync(0xffffffff, 1);"
    ),
    Planted("shuffle_of_other_lanes", "shuffle reads lane 16, which does not take part", "__shfl_xor_sync(low_half"),
    Planted(
        "shuffle_without_itself",
        "__shfl_xor_sync with mask 0x0000ffff, which lacks the calling lane",
        "0x0001ffff >> faulty",
    ),
    Planted("different_warp_operations", "but lanes of its warp wait for it at __", "_sync(0xffffffff, 1);"),
    Planted("async_read_before_wait", "is read before the cp.async of thread (", "y[i] = tile[i];"),
    Planted(
        "async_wait_for_one_group_less",
        "is read before the cp.async of thread (",
        "y[i] = tile[faulty ? kThreads + i : i];",
    ),
    Planted("async_write_before_wait", "is written before the cp.async of thread (", "tile[i] = 0.0f;"),
    Planted("async_without_barrier", "race on tile[", "y[i] = tile[i ^ 64];", "cp_async<4>(tile + i, x + i);"),
    Planted("async_refill", "tile[", "cp_async<4>(tile + i, x + i);  // refill", "sum += tile[i ^ 64];"),
]


@pytest.fixture(scope="module")
def memory_kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("memory_faults.cu")


@pytest.fixture(scope="module")
def order_kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("order_faults.cu")


def _run(kernels: Kernels, name: str, size: int, faulty: bool) -> None:
    x = numpy.arange(size, dtype=numpy.float32)
    getattr(kernels, name)(x, numpy.full(size, numpy.nan, dtype=numpy.float32), int(faulty))


def _check(kernels: Kernels, planted: Planted, source: str, size: int, seed: int | None) -> None:
    kernels.schedule(seed)
    _run(kernels, planted.kernel, size, faulty=False)
    with pytest.raises(KernelFault) as caught:
        _run(kernels, planted.kernel, size, faulty=True)
    what, thread, place = str(caught.value).splitlines()
    assert what.startswith(f"{planted.kernel}: ") and planted.says in what
    assert thread.startswith("  in block (") and ", thread (" in thread
    file, line = place.removeprefix("  at ").rsplit(":", 1)
    assert Path(file).samefile(SOURCES / source)
    faulty_line = (SOURCES / source).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert planted.line in faulty_line or (planted.other_line is not None and planted.other_line in faulty_line)


@pytest.mark.parametrize("planted", MEMORY_FAULTS, ids=lambda planted: planted.kernel)
def test_misuse_of_memory_is_reported(memory_kernels: Kernels, planted: Planted) -> None:
    _check(memory_kernels, planted, "memory_faults.cu", 64, None)


@pytest.mark.parametrize("planted", ORDER_FAULTS, ids=lambda planted: planted.kernel)
def test_wrong_order_is_reported(order_kernels: Kernels, planted: Planted, seed: int | None) -> None:
    _check(order_kernels, planted, "order_faults.cu", 128, seed)


def test_a_report_names_kernel_object_threads_and_places(order_kernels: Kernels) -> None:
    order_kernels.schedule(None)
    with pytest.raises(KernelFault) as caught:
        _run(order_kernels, "read_after_write", 128, faulty=True)
    source = SOURCES / "order_faults.cu"
    lines = source.read_text(encoding="utf-8").splitlines()
    write = lines.index("  tile[i] = x[i];") + 1
    read = lines.index("  y[i] = tile[kThreads - 1 - i];") + 1
    # Thread 127 comes to the first barrier last and goes on alone: it reads what thread 0 has yet to write.
    assert str(caught.value) == (
        f"read_after_write: race on tile[0]: written here, read by thread (127, 0, 0) at {source}:{read}, "
        f"and no barrier orders the two\n  in block (0, 0, 0), thread (0, 0, 0)\n  at {source}:{write}"
    )


def test_a_fault_leaves_nothing_behind(order_kernels: Kernels) -> None:
    for planted in ORDER_FAULTS[:3]:
        with pytest.raises(KernelFault):
            _run(order_kernels, planted.kernel, 128, faulty=True)
        _run(order_kernels, planted.kernel, 128, faulty=False)


def test_too_much_static_shared_memory_leaves_nothing_behind(memory_kernels: Kernels) -> None:
    with pytest.raises(KernelFault, match="static shared memory"):
        _run(memory_kernels, "static_shared_size", 64, faulty=True)
    _run(memory_kernels, "static_shared_size", 64, faulty=False)


def test_a_seed_decides_the_order_of_threads(order_kernels: Kernels) -> None:
    def report(seed: int | None) -> str:
        order_kernels.schedule(seed)
        with pytest.raises(KernelFault) as caught:
            _run(order_kernels, "read_after_write", 128, faulty=True)
        return str(caught.value)

    assert [report(seed) for seed in (None, 0, 1)] == [report(seed) for seed in (None, 0, 1)]
    assert len({report(seed) for seed in (None, 0, 1, 2)}) == 4
