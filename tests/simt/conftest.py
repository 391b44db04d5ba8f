"""Fixtures that build kernels for the host and for the device, and run them in several orders."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from build_support.settings import Unavailable

HERE = Path(__file__).resolve().parent
KERNELS = HERE / "kernels"
sys.path[:0] = [str(HERE)]  # for `import kernel_build` and its neighbours, whatever import mode pytest runs in

import kernel_build  # noqa: E402
from kernel_build import Kernels  # noqa: E402


@pytest.fixture(scope="session")
def build_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where builds are kept: from run to run in pytest's cache, else for this run."""
    kept = getattr(request.config, "cache", None)
    return kept.mkdir("simt") if kept is not None else tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="session")
def compile_host(build_cache: Path) -> Callable[..., Kernels]:
    """compile_host(source, flags=()) for a .cu file, by path or by its name in tests/simt/kernels."""

    def compile_one(source: str | Path, flags: tuple[str, ...] = ()) -> Kernels:
        try:
            return kernel_build.compile_host(KERNELS / source, build_cache, flags)
        except Unavailable as reason:
            pytest.skip(str(reason))

    return compile_one


@pytest.fixture(scope="session")
def compile_device(build_cache: Path) -> Callable[..., Path]:
    """compile_device(source) for a .cu file, by path or by its name in tests/simt/kernels: the machine code."""

    def compile_one(source: str | Path) -> Path:
        try:
            return kernel_build.compile_device(KERNELS / source, build_cache)
        except Unavailable as reason:
            pytest.skip(str(reason))

    return compile_one


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, compile_host: Callable[..., Kernels]) -> Kernels:
    """The kernels that a test module names as UNIT, a .cu file in tests/simt/kernels; in no certain order."""
    return compile_host(request.module.UNIT)


@pytest.fixture
def usual(built: Kernels) -> Kernels:
    """The same in the usual order of threads and blocks."""
    built.schedule(None)
    return built


@pytest.fixture
def kernels(built: Kernels, seed: int | None) -> Kernels:
    """The same in three orders of threads and blocks."""
    built.schedule(seed)
    return built


@pytest.fixture(params=[None, 0, 1], ids=["usual", "shuffled0", "shuffled1"])
def seed(request: pytest.FixtureRequest) -> int | None:
    """Run the test in the usual order of threads and blocks, and in two that are drawn by chance."""
    return request.param
