"""Compiles kernels for the host, where the harness of csrc/simt runs them, and for the device, with nvcc.

What was built is kept in a cache folder under a name made from everything it depends on, so a change of any header
builds it again, and nothing else does.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy
import torch

from build_support.cuda import Nvcc, find_nvcc, inspect_nvcc, last_line
from build_support.settings import Unavailable

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "csrc" / "simt"
INCLUDE_DIRS = (ROOT / "csrc" / "include", ROOT / "csrc")
HOST_FLAGS = ("-std=c++17", "-O2", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
DEVICE_FLAGS = ("-std=c++17", "-O3", "-Werror=all-warnings")
DEVICE_CAPABILITIES = (61, 70, 75, 80, 90, 120)
"""Compute capabilities, times ten, that kernels are compiled for, where nvcc knows them."""

Argument = torch.Tensor | numpy.ndarray | int | float | None


class KernelFault(Exception):
    """What the harness found wrong with a kernel, in its words."""


class Kernels:
    """The extern "C" functions of one translation unit, as methods.

    They take tensors and arrays on the CPU (as addresses), None (a null pointer), int (int64_t) and float (double), and
    raise KernelFault with the text they return, unless that is a null pointer.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def schedule(self, seed: int | None) -> None:
        """The order in which blocks and threads take turns from now on: drawn from a seed, or None for the usual."""
        self.library.simt_schedule(ctypes.c_int64(-1 if seed is None else seed))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p

        def call(*arguments: Argument) -> None:
            report = function(*[_as_c(argument) for argument in arguments])
            if report is not None:
                raise KernelFault(report.decode())

        return call


def _as_c(argument: Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        if argument.device.type != "cpu":
            raise TypeError(f"a tensor on {argument.device}, kernels on the host need it on the CPU")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, numpy.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_double(argument)


def compile_host(source: Path, cache_dir: Path, flags: Sequence[str] = ()) -> Kernels:
    """Compile a translation unit with the host's compiler and load it.

    Args:
        source: a .cu file that includes "simt/launch.h" and kernels.
        cache_dir: where builds are kept.
        flags: more compiler options, such as -DNAME=value.

    Raises:
        Unavailable: there is no C++ compiler.
        RuntimeError: the source does not compile.
    """
    compiler = _host_compiler()
    command = [*compiler, *HOST_FLAGS, *flags, *(f"-I{folder}" for folder in INCLUDE_DIRS)]
    objects = [_build([*command, "-c"], path, ".o", cache_dir) for path in (*sorted(HARNESS.glob("*.cpp")), source)]
    library = _cached(source.stem, [*command, str(source)], "".join(path.name for path in objects), ".so", cache_dir)
    if not library.exists():
        _run([*command, "-shared", *map(str, objects)], library)
    return Kernels(ctypes.CDLL(str(library)))


def compile_device(source: Path, cache_dir: Path, capabilities: Iterable[int] = DEVICE_CAPABILITIES) -> Path:
    """Compile a translation unit for devices with nvcc; the file with the machine code (a fatbin).

    Args:
        source: as for compile_host.
        cache_dir: where builds are kept.
        capabilities: times ten; those that nvcc does not know are left out.

    Raises:
        Unavailable: there is no nvcc, or it knows none of the capabilities.
        RuntimeError: the source does not compile.
    """
    nvcc = device_compiler()
    known = [capability for capability in capabilities if capability in nvcc.capabilities]
    if not known:
        raise Unavailable(f"nvcc {nvcc.version} compiles for none of {list(capabilities)}")
    architectures = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in known]
    includes = [f"-I{folder}" for folder in INCLUDE_DIRS]
    return _build([str(nvcc.path), "--fatbin", *DEVICE_FLAGS, *architectures, *includes], source, ".fatbin", cache_dir)


@cache
def device_compiler() -> Nvcc:
    """The nvcc that the build of the package would use.

    Raises:
        Unavailable: there is none.
    """
    return inspect_nvcc(find_nvcc(os.environ))


def _host_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise Unavailable(f"CXX is {os.environ['CXX']!r}, which is not on PATH")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise Unavailable("no C++ compiler: c++, g++ and clang++ are not on PATH, CXX is not set")


def _build(command: list[str], source: Path, suffix: str, cache_dir: Path) -> Path:
    variant = [*command, str(source), _output([command[0], "--version"])]
    content = _digest(path.read_bytes() for path in [source, *_headers(source)])
    output = _cached(source.stem, variant, content, suffix, cache_dir)
    if not output.exists():
        _run([*command, *(["-x", "c++"] if suffix == ".o" else []), str(source)], output)
    return output


def _cached(stem: str, variant: Iterable[str], content: str, suffix: str, cache_dir: Path) -> Path:
    """Where a build is kept; those of the same source in the same way, of other contents, are forgotten."""
    prefix = f"{stem}-{_digest(text.encode() for text in variant)}"
    path = cache_dir / f"{prefix}-{_digest([content.encode()])}{suffix}"
    for other in cache_dir.glob(f"{prefix}-*{suffix}"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _headers(source: Path) -> list[Path]:
    """Every header that a source could include, those beside it too."""
    folders = (ROOT / "csrc" / "include", HARNESS, source.resolve().parent)
    return sorted({path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh")})


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _run(command: Sequence[str], output: Path) -> None:
    """Make a file. It gets its name when it is complete: other processes may look for it at the same time."""
    unfinished = output.with_name(f"{os.getpid()}-{output.name}")
    _output([*command, "-o", str(unfinished)])
    unfinished.replace(output)


def _output(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        said = result.stderr or result.stdout
        raise RuntimeError(f"{shlex.join(command)} failed ({last_line(said)}):\n{said}")
    return result.stdout
