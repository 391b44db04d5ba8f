"""Fixtures of the whole suite: the back ends, uninitialised memory, and optional real data."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# PyTorch may ask for this, with which cuBLAS sums in a fixed order, in the deterministic mode that `poison` turns on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Where there is no card, Triton's kernels run in its interpreter; Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastsam

# What inductor keeps on disk is found by the names of operators, which stay when their outputs change.
torch.compiler.config.force_disable_caches = True

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [
    str(TESTS),
    str(TESTS / "ops"),
]  # for `import oracle`, `import cases`, whatever import mode pytest runs in

from extension import require_native  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests are many and small: more threads only wait for each other, for seconds where the machine is busy.

    The tests that are about threads set their own number.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Run the test with three threads."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["eager", "cpu"])
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every back end, which is forced for its duration."""
    if request.param != "eager":
        require_native()
    with fastsam.backend(request.param):
        yield request.param


@pytest.fixture
def native_backend() -> Iterator[str]:
    """Run the test on the compiled CPU back end only."""
    require_native()
    with fastsam.backend("cpu"):
        yield "cpu"


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill whatever torch.empty and its kin hand out with NaN, so that an element nobody wrote is seen.

    PyTorch does it itself in deterministic mode, for allocations from Python and from C++ alike.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets (mnist, kth, taxinyc); skips where there is none."""
    folder = Path(os.environ.get("FASTSAM_TEST_DATA") or TESTS.parent.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder; FASTSAM_TEST_DATA names another")
    return folder
