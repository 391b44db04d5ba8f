"""The build: what goes into a wheel, and what happens where a compiler, nvcc or a setting is missing or wrong.

Each build test compiles a copy of the package whose C++ is a few lines, with the real build code.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from build_support import cuda
from build_support.settings import Settings, Unavailable
from fastsam._version import __version__

ROOT = Path(__file__).resolve().parent.parent
FIRST_CUDA_SOURCE = min(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
BUILD_VARIABLES = re.compile(r"FASTSAM_\w+|CUDA_\w+|TORCH_CUDA_ARCH_LIST|MAX_JOBS|CC|CXX|NVCC_\w+")

BINDINGS = """
#include <Python.h>
#include "toy.h"
#ifdef FASTSAM_CUDA
#include "fastsam/device.h"
#endif
namespace fastsam::generic { int lanes(); }
#ifdef FASTSAM_ISAS_X86
namespace fastsam::avx2 { int lanes(); }
namespace fastsam::avx512 { int lanes(); }
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native"};
PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", TOY_ANSWER);
  PyModule_AddIntConstant(module, "generic", fastsam::generic::lanes());
#ifdef FASTSAM_ISAS_X86
  PyModule_AddIntConstant(module, "avx2", fastsam::avx2::lanes());
  PyModule_AddIntConstant(module, "avx512", fastsam::avx512::lanes());
#endif
#ifdef FASTSAM_OPENMP
  PyModule_AddIntConstant(module, "openmp", 1);
#endif
#ifdef FASTSAM_CUDA
  int major = -1, minor = -1;
  fastsam::cuda::compute_capability(99, &major, &minor);
  PyModule_AddIntConstant(module, "capability_of_no_device", 10 * major + minor);
  PyModule_AddIntConstant(module, "cuda_runtime", fastsam::cuda::runtime_version());
  PyModule_AddIntConstant(module, "cuda_driver", fastsam::cuda::driver_version());
  PyModule_AddIntConstant(module, "cuda_devices", fastsam::cuda::device_count());
  PyModule_AddStringConstant(module, "cuda_architectures", FASTSAM_CUDA_ARCHITECTURES);
#endif
  return module;
}
"""
KERNEL = """
namespace fastsam::FASTSAM_ISA {
int lanes() {
#if defined(__AVX512F__)
  return 16;
#elif defined(__AVX2__)
  return 8;
#else
  return 4;
#endif
}
}
"""
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.6, V12.6.85" ;;
  *--list-gpu-code*) printf 'sm_50\\nsm_61\\nsm_70\\nsm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_90a\\n' ;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"' >&2 ;;
  *) echo "cc1plus: fatal: unsupported GNU version" >&2; exit 1 ;;
esac
"""
PICKY_COMPILER = """#!/bin/sh
case "$*" in *{refused}*) echo "error: unknown option {refused}" >&2; exit 1 ;; esac
exec c++ "$@"
"""
CAPABILITIES = {"12.6": (50, 60, 61, 70, 75, 80, 86, 89, 90), "13.0": (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)}


class Tree:
    """A copy of the package with toy C++ that can be built in several environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tree"
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_build.json")
        for name in ("fastsam", "build_support"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignore)
        for name in ("csrc/cuda", "csrc/include"):
            shutil.copytree(ROOT / name, self.folder / name)
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "csrc/cpu").mkdir()
        (self.folder / "csrc/cpu/toy.cpp").write_text(KERNEL)
        (self.folder / "csrc/bindings.cpp").write_text(BINDINGS)
        self.set_answer(42)

    def set_answer(self, answer: int) -> None:
        (self.folder / "csrc/include/toy.h").write_text(f"#define TOY_ANSWER {answer}\n")

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not BUILD_VARIABLES.fullmatch(name)}
        return subprocess.run(
            [sys.executable, *command], cwd=cwd or self.folder, env=kept | environment, capture_output=True, text=True
        )

    def wheel(self, **environment: str) -> Path:
        """Build a wheel as pip does, but with the packages of this environment; its unpacked folder."""
        hook = "from setuptools import build_meta; build_meta.build_wheel('dist')"
        result = self.run("-c", hook, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        self.lines = [line for line in result.stderr.splitlines() if line.startswith("fastsam: ")]
        (path,) = (self.folder / "dist").glob("*.whl")
        # A folder of its own each time: the loader of extensions remembers paths.
        unpacked = Path(tempfile.mkdtemp(dir=self.folder.parent))
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked)
        return unpacked

    def failure(self, **environment: str) -> str:
        """The last line of a build that must fail."""
        result = self.run("setup.py", "build_ext", **environment)
        assert result.returncode != 0
        return cuda.last_line(result.stderr)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def fake_cuda(tmp_path: Path) -> Path:
    """A toolkit whose nvcc answers questions and fails to compile."""
    home = tmp_path / "cuda"
    _program(home / "bin/nvcc", FAKE_NVCC.replace("{folder}", str(home)))
    (home / "lib").mkdir()
    (home / "lib/libcudart_static.a").touch()
    return home


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def _load(package: Path) -> ModuleType:
    """Import the toy extension of a built package under a name of its own, without importing fastsam."""
    (path,) = package.glob("_native*")
    spec = importlib.util.spec_from_file_location("fastsam_toy._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _report(package: Path) -> dict[str, dict[str, object]]:
    report = json.loads((package / "_build.json").read_text())
    assert isinstance(report, dict)
    return report


def _python_files(package: Path) -> Iterator[str]:
    return (path.relative_to(package.parent).as_posix() for path in package.rglob("*.py"))


def test_wheel_holds_the_package_alone(tree: Tree) -> None:
    folder = tree.wheel(FASTSAM_SKIP_CUDA="1")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extension = {name for name in names if name.startswith("fastsam/_native")}
    metadata = {name for name in names if name.startswith(f"fastsam-{__version__}.dist-info/")}
    data = {"fastsam/py.typed", "fastsam/_build.json", "fastsam/fastest.txt", "fastsam/ops/_triton/tuned.json"}
    expected = {*_python_files(ROOT / "fastsam"), *data}
    assert len(extension) == 1
    assert names - extension - metadata == expected
    text = (folder / f"fastsam-{__version__}.dist-info/METADATA").read_text()
    assert re.search(r"^Requires-Dist: torch>=2.9$", text, re.MULTILINE)
    assert "Requires-Python: >=3.10" in text


def test_a_checkout_gets_what_was_installed_from_it(tree: Tree) -> None:
    """Python started there imports fastsam from there: not without its extension, nor with an old one."""
    tree.wheel(FASTSAM_SKIP_CUDA="1")
    assert _load(tree.folder / "fastsam").answer == 42
    assert _report(tree.folder / "fastsam")["CPU"]["built"]
    tree.wheel(FASTSAM_SKIP_NATIVE="1")
    assert not list((tree.folder / "fastsam").glob("_native*"))
    assert not _report(tree.folder / "fastsam")["CPU"]["built"]


def test_wheel_forgets_a_deleted_module(tree: Tree) -> None:
    (tree.folder / "fastsam/gone.py").touch()
    assert (tree.wheel(FASTSAM_SKIP_NATIVE="1") / "fastsam/gone.py").exists()
    (tree.folder / "fastsam/gone.py").unlink()
    assert not (tree.wheel(FASTSAM_SKIP_NATIVE="1") / "fastsam/gone.py").exists()


def test_sdist_holds_the_sources(tree: Tree) -> None:
    (tree.folder / "fastsam/_build.json").write_text("{}")
    result = tree.run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    assert result.returncode == 0, result.stderr
    with tarfile.open(tree.folder / f"dist/fastsam-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/bindings.cpp", "csrc/cuda/device.cu", "csrc/include/toy.h", "build_support/native.py"} <= names
    assert "fastsam/_build.json" not in names


def test_every_instruction_set_is_compiled_once(tree: Tree) -> None:
    package = tree.wheel(FASTSAM_SKIP_CUDA="1") / "fastsam"
    native, report = _load(package), _report(package)
    compiled = report["CPU"]["instruction_sets"]
    assert native.generic == 4 or sys.platform == "darwin"
    if compiled != ["generic"]:
        assert (native.avx2, native.avx512) == (8, 16)
    assert report["OpenMP"]["built"] == hasattr(native, "openmp")
    assert report["CUDA"] == {"built": False, "text": "skipped, FASTSAM_SKIP_CUDA is set"}
    assert [line.split(":")[1].strip() for line in tree.lines] == ["CUDA", "OpenMP", "CPU"]


def test_edited_header_is_compiled_again(tree: Tree) -> None:
    assert _load(tree.wheel(FASTSAM_SKIP_CUDA="1") / "fastsam").answer == 42
    tree.set_answer(43)
    assert _load(tree.wheel(FASTSAM_SKIP_CUDA="1") / "fastsam").answer == 43


def test_without_a_compiler_the_eager_back_end_serves(tree: Tree) -> None:
    folder = tree.wheel(CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert not list((folder / "fastsam").glob("_native*"))
    assert "no working C++17 compiler" in str(_report(folder / "fastsam")["CPU"]["text"])
    assert len(tree.lines) == 3
    result = tree.run("-m", "fastsam", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "no working C++17 compiler" in result.stdout and "Traceback" not in result.stderr


def test_inplace_build_without_a_compiler_removes_the_old_extension(tree: Tree) -> None:
    package = tree.folder / "fastsam"
    assert tree.run("setup.py", "build_ext", "--inplace", FASTSAM_SKIP_CUDA="1").returncode == 0
    assert _load(package).answer == 42 and _report(package)["CPU"]["built"]
    assert tree.run("setup.py", "build_ext", "--inplace", CXX="/nonexistent/c++").returncode == 0
    assert not list(package.glob("_native*")) and not _report(package)["CPU"]["built"]


@pytest.mark.parametrize("refused, part", [("-fopenmp", "OpenMP"), ("-mavx512f", "CPU")])
def test_compiler_without_a_feature(tree: Tree, tmp_path: Path, refused: str, part: str) -> None:
    compiler = _program(tmp_path / "bin/c++", PICKY_COMPILER.replace("{refused}", refused))
    package = tree.wheel(FASTSAM_SKIP_CUDA="1", CXX=str(compiler)) / "fastsam"
    assert _load(package).answer == 42
    if part == "OpenMP":
        assert "unknown option -fopenmp" in str(_report(package)["OpenMP"]["text"])
    else:
        assert _report(package)["CPU"]["instruction_sets"] == ["generic"]


def test_cuda_is_skipped_without_nvcc(tree: Tree, tmp_path: Path) -> None:
    tree.wheel(CUDA_HOME=str(tmp_path))
    assert f"fastsam: CUDA: skipped, no nvcc in CUDA_HOME ({tmp_path})" in tree.lines


def test_forced_cuda_without_nvcc_is_an_error(tree: Tree, tmp_path: Path) -> None:
    message = tree.failure(CUDA_HOME=str(tmp_path), FASTSAM_FORCE_CUDA="1")
    assert message == f"error: FASTSAM_FORCE_CUDA is set: no nvcc in CUDA_HOME ({tmp_path})"


def test_forced_cuda_without_a_compiler_is_an_error(tree: Tree) -> None:
    message = tree.failure(CXX="/nonexistent/c++", FASTSAM_FORCE_CUDA="1")
    assert message.startswith("error: FASTSAM_FORCE_CUDA is set: no working C++17 compiler")


def test_failing_nvcc_leaves_the_cpu_part(tree: Tree, fake_cuda: Path) -> None:
    package = tree.wheel(CUDA_HOME=str(fake_cuda)) / "fastsam"
    reason = f"skipped, nvcc cannot compile {FIRST_CUDA_SOURCE} (cc1plus: fatal: unsupported GNU version)"
    assert _report(package)["CUDA"]["text"] == reason
    assert _load(package).answer == 42


def test_forced_cuda_with_a_failing_nvcc_is_an_error(tree: Tree, fake_cuda: Path) -> None:
    message = tree.failure(CUDA_HOME=str(fake_cuda), FASTSAM_FORCE_CUDA="1")
    assert message.startswith(f"error: FASTSAM_FORCE_CUDA is set: nvcc cannot compile {FIRST_CUDA_SOURCE}")


def test_unknown_architecture_is_an_error(tree: Tree, fake_cuda: Path) -> None:
    message = tree.failure(CUDA_HOME=str(fake_cuda), TORCH_CUDA_ARCH_LIST="7.5;Turing")
    assert message == "error: TORCH_CUDA_ARCH_LIST holds 'Turing', entries look like 7.5 or 8.6+PTX"


def test_contradicting_settings_are_an_error(tree: Tree) -> None:
    message = tree.failure(FASTSAM_SKIP_CUDA="1", FASTSAM_FORCE_CUDA="1")
    assert message == "error: FASTSAM_FORCE_CUDA and FASTSAM_SKIP_CUDA are both set, unset one of them"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cuda_part_builds_and_works_without_a_driver(tree: Tree) -> None:
    try:
        nvcc = cuda.inspect_nvcc(cuda.find_nvcc(os.environ))
        cuda.runtime_libraries(nvcc)
    except Unavailable as reason:
        pytest.skip(str(reason))
    environment = {name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ}
    # One architecture: each costs minutes of compilation.
    package = tree.wheel(FASTSAM_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0+PTX", **environment) / "fastsam"
    native = _load(package)
    assert _report(package)["CUDA"]["architectures"] == ["8.0+PTX"]
    assert native.cuda_architectures == "8.0+PTX"
    assert f"{native.cuda_runtime // 1000}.{native.cuda_runtime // 10 % 100}" == nvcc.version
    assert native.cuda_driver >= 0 and native.cuda_devices >= 0 and native.capability_of_no_device == 0


def _nvcc(version: str) -> cuda.Nvcc:
    return cuda.Nvcc(Path("nvcc"), version, CAPABILITIES[version], ())


@pytest.mark.parametrize(
    "version, requested, expected",
    [
        ("13.0", "", "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("12.6", "", "6.1 7.0 7.5 8.0 8.6 8.9 9.0+PTX"),
        ("13.0", "7.5;8.6+PTX", "7.5 8.6+PTX"),
        ("13.0", " 8.6  7.5 8.6+PTX", "7.5 8.6+PTX"),
        ("13.0", "9.0a 12.1", "9.0a 12.1"),
        ("12.6", "5.2 6.0 6.1 7.0+PTX", "6.1 7.0+PTX"),
    ],
)
def test_architecture_selection(version: str, requested: str, expected: str) -> None:
    assert " ".join(map(str, cuda.select_architectures(requested, _nvcc(version)))) == expected


@pytest.mark.parametrize(
    "requested, message",
    [
        ("sm_75", "holds 'sm_75'"),
        ("7.5+ptx", "holds '7.5\\+ptx'"),
        ("6.1", "asks for 6.1, nvcc 13.0 compiles for 7.5, 8.0"),
        ("15.0", "asks for 15.0"),
        ("5.2", "compute capability 6.1 and newer"),
    ],
)
def test_architectures_that_cannot_be_built(requested: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda.select_architectures(requested, _nvcc("13.0"))


@pytest.mark.parametrize(
    ("requested", "options"),
    [
        ("7.5", ["75,code=[sm_75]"]),
        ("8.6 8.9", ["86,code=[sm_86,sm_89]"]),
        ("8.0+PTX 8.6+PTX 9.0", ["80,code=[sm_80,compute_80,sm_86]", "90,code=[sm_90]"]),
        (
            "9.0a+PTX 10.0a 10.0 12.0",
            ["90a,code=[sm_90a,compute_90a]", "100,code=[sm_100,sm_120]", "100a,code=[sm_100a]"],
        ),
        ("12.0+PTX", ["120,code=[sm_120,compute_120]"]),
    ],
)
def test_ptx_is_written_once_for_a_family(requested: str, options: list[str]) -> None:
    architectures = cuda.select_architectures(requested, _nvcc("13.0"))
    assert cuda.code_options(architectures) == [f"-gencode=arch=compute_{option}" for option in options]


@pytest.mark.parametrize(("version", "smaller"), [("12.6", False), ("13.0", True)])
def test_machine_code_is_compressed_where_every_driver_unpacks_it(version: str, smaller: bool) -> None:
    command = cuda.compile_command(
        _nvcc(version), [cuda.Architecture(86)], "a.cu", "a.o", include_dirs=["i"], host_compiler=None, threads=1
    )
    assert command[:5] == ["nvcc", "-c", "a.cu", "-o", "a.o"]
    assert ("--compress-mode=size" in command) == smaller


def test_nvcc_is_found_where_the_user_says(fake_cuda: Path, tmp_path: Path) -> None:
    nvcc = fake_cuda / "bin/nvcc"
    assert cuda.find_nvcc({"CUDA_HOME": str(fake_cuda), "PATH": ""}) == nvcc
    assert cuda.find_nvcc({"CUDA_PATH": str(fake_cuda), "PATH": ""}) == nvcc
    assert cuda.find_nvcc({"PATH": str(fake_cuda / "bin")}, tmp_path) == nvcc
    assert cuda.find_nvcc({"PATH": ""}, fake_cuda) == nvcc
    with pytest.raises(Unavailable, match=f"no nvcc on PATH, in CUDA_HOME or {tmp_path}"):
        cuda.find_nvcc({"PATH": ""}, tmp_path)


def test_nvcc_is_asked_what_it_can_do(fake_cuda: Path) -> None:
    nvcc = cuda.inspect_nvcc(fake_cuda / "bin/nvcc")
    assert (nvcc.version, nvcc.capabilities) == ("12.6", (50, 61, 70, 75, 80, 86, 90))
    assert cuda.runtime_libraries(nvcc)[0] == "cudart_static"
    (fake_cuda / "lib/libcudart_static.a").unlink()
    with pytest.raises(Unavailable, match=r"no libcudart_static\.a beside"):
        cuda.runtime_libraries(nvcc)


def test_nvcc_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not run"):
        cuda.inspect_nvcc(_program(tmp_path / "nvcc", "#!/bin/sh\nexit 1\n"))


def test_host_compiler_of_nvcc() -> None:
    assert cuda.host_compiler({"CXX": "g++-12"}) == "g++-12"
    assert cuda.host_compiler({"CXX": "ccache g++"}) is None
    assert cuda.host_compiler({"CXX": "g++-12", "NVCC_CCBIN": "g++-11"}) is None


def test_settings() -> None:
    assert Settings.from_environment({"MAX_JOBS": "3", "FASTSAM_SKIP_CUDA": "0"}) == Settings(3, False, False, False)
    assert Settings.from_environment({}).jobs >= 1
    for jobs in ("0", "-1", "many"):
        with pytest.raises(ValueError, match="MAX_JOBS is"):
            Settings.from_environment({"MAX_JOBS": jobs})
    with pytest.raises(ValueError, match="FASTSAM_SKIP_CUDA is 'maybe', it must be 1 or 0"):
        Settings.from_environment({"FASTSAM_SKIP_CUDA": "maybe"})


def test_compiled_code_knows_nothing_of_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    torch_header = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/")
    assert sources and not [path for path in sources if torch_header.search(path.read_text())]


def test_build_knows_nothing_of_torch() -> None:
    files = [ROOT / "setup.py", *(ROOT / "build_support").glob("*.py")]
    assert not [path for path in files if re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE)]
    build_system = (ROOT / "pyproject.toml").read_text().partition("[project]")[0]
    assert "torch" not in build_system
