"""Building kernels for tests: what is built again when, and what is said when something is missing."""

from collections.abc import Callable
from pathlib import Path

import kernel_build
import pytest
import torch
from kernel_build import KernelFault

from build_support.settings import Unavailable

SOURCES = sorted(path.name for path in (Path(__file__).resolve().parent / "kernels").glob("*.cu"))

UNIT = """
#include "factor.cuh"
#include "simt/launch.h"
using namespace fastsam;
template <class T>
__global__ void scale(cuda::Global<const T> x, cuda::Global<T> y, int64_t n) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = kFactor * x[i];
}
extern "C" const char* run_scale(const float* x, float* y, int64_t n, int64_t claimed) {
  return simt::run([&] {
    simt::launch("scale", scale<float>, {2, 4}, simt::input(x, n, "x"), simt::output(y, n, "y"), claimed);
  });
}
"""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this file's own: its units would pile up in the one that is kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A translation unit with a header of its own."""
    (tmp_path / "factor.cuh").write_text("constexpr float kFactor = 2.0f;\n")
    (tmp_path / "unit.cu").write_text(UNIT)
    return tmp_path / "unit.cu"


def _doubled(kernels: kernel_build.Kernels) -> list[float]:
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    kernels.run_scale(x, y, 3, 3)
    return y.tolist()


def test_a_changed_header_is_built_again(unit: Path, cache_dir: Path) -> None:
    def build() -> kernel_build.Kernels:
        return kernel_build.compile_host(unit, cache_dir)

    assert _doubled(build()) == [2.0, 4.0, 6.0]
    built = {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()}
    assert built
    assert _doubled(build()) == [2.0, 4.0, 6.0]
    assert {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()} == built
    (unit.parent / "factor.cuh").write_text("constexpr float kFactor = 3.0f;\n")
    assert _doubled(build()) == [3.0, 6.0, 9.0]


def test_a_fault_is_an_exception(unit: Path, cache_dir: Path) -> None:
    kernels = kernel_build.compile_host(unit, cache_dir)
    with pytest.raises(KernelFault, match=r"scale: out-of-bounds read at x\[3\]: x has 3 elements"):
        kernels.run_scale(torch.zeros(3), torch.zeros(3), 3, 5)
    assert _doubled(kernels) == [2.0, 4.0, 6.0]


def test_what_the_compiler_complains_about_is_shown(unit: Path, cache_dir: Path) -> None:
    unit.write_text(UNIT.replace("kFactor *", "kUnknown *"))
    with pytest.raises(RuntimeError, match="kUnknown"):
        kernel_build.compile_host(unit, cache_dir)


def test_without_a_compiler_the_reason_is_given(
    unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_host: Callable[..., kernel_build.Kernels]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler"):
        kernel_build.compile_host(unit, tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"no C\+\+ compiler"):
        compile_host(unit)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(Unavailable, match="CXX is 'no-such-compiler -m64', which is not on PATH"):
        kernel_build.compile_host(unit, tmp_path)


def test_without_nvcc_the_reason_is_given(
    unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_device: Callable[..., Path]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    kernel_build.device_compiler.cache_clear()
    with pytest.raises(Unavailable, match="no nvcc in CUDA_HOME"):
        kernel_build.compile_device(unit, tmp_path)
    with pytest.raises(pytest.skip.Exception, match="no nvcc in CUDA_HOME"):
        compile_device(unit)


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_sources_compile_for_devices(compile_device: Callable[..., Path], source: str) -> None:
    assert compile_device(source).stat().st_size > 0


def test_what_the_host_refuses(unit: Path, cache_dir: Path) -> None:
    """A pointer to constants is not written through, and x[i] is no variable."""
    for wrong in ("x[i] = kFactor;", "auto value = x[i]; y[i] = value;", "y[i] = *x;"):
        unit.write_text(UNIT.replace("y[i] = kFactor * x[i];", "{ " + wrong + " }"))
        with pytest.raises(RuntimeError, match="failed"):
            kernel_build.compile_host(unit, cache_dir)
