"""What the C++ compiler of this machine can do, found by compiling a few lines with it."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from setuptools.errors import BaseError, CCompilerError

from build_support.cuda import last_line
from build_support.settings import Unavailable

X86_INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}
"""Beyond "generic", which every processor of the platform runs; the one in use is picked at run time."""

_CXX17 = """
#include <cstddef>
#include <tuple>
template <class T> constexpr std::size_t size() { if constexpr (sizeof(T) > 4) return 8; else return 4; }
int main() { auto [a, b] = std::make_tuple(size<double>(), size<float>()); return a == b; }
"""
_PYTHON = "#include <Python.h>\nint main() { return 0; }\n"
_X86 = """
#ifndef __x86_64__
#error not an x86-64 processor
#endif
#include <immintrin.h>
int main() { return 0; }
"""
_OPENMP = """
#include <omp.h>
int main() {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += 1;
  return threads == omp_get_max_threads() ? 0 : 1;
}
"""


class Toolchain:
    """A setuptools compiler object and the options that fit it."""

    def __init__(self, compiler: Any) -> None:
        self._compiler = compiler
        self.is_msvc = compiler.compiler_type == "msvc"

    @property
    def flags(self) -> list[str]:
        """Options for every source. No -ffast-math: NaN, infinities and the order of sums are part of the results."""
        if self.is_msvc:
            return ["/O2", "/std:c++17", "/EHsc"]
        return ["-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]

    @property
    def description(self) -> str:
        """The compiler's own name and version."""
        if self.is_msvc:
            return "MSVC"
        command = [self._compiler.compiler_cxx[0], "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()

    def check(self) -> None:
        """Make sure that C++17 and the Python headers are there.

        Raises:
            Unavailable: one of them is not.
        """
        failure = self._try(_CXX17, [])
        if failure is not None:
            raise Unavailable(f"no working C++17 compiler ({failure})")
        if self._try(_PYTHON, []) is not None:
            raise Unavailable("the Python headers are missing (Python.h: install python3-dev or python3-devel)")

    def instruction_sets(self) -> dict[str, list[str]]:
        """Names of the instruction sets to compile for, with their options, the portable one first."""
        generic: dict[str, list[str]] = {"generic": []}
        if self.is_msvc or any(self._try(_X86, flags) is not None for flags in X86_INSTRUCTION_SETS.values()):
            return generic
        return generic | X86_INSTRUCTION_SETS

    def openmp(self) -> tuple[list[str], list[str]]:
        """The options for compiling and for linking with OpenMP.

        Raises:
            Unavailable: a small program does not build with them.
        """
        flags = ["/openmp"] if self.is_msvc else ["-fopenmp"]
        failure = self._try(_OPENMP, flags)
        if failure is not None:
            raise Unavailable(f"this compiler has no OpenMP ({failure}), kernels run on one thread")
        return flags, [] if self.is_msvc else flags

    def _try(self, source: str, flags: Sequence[str]) -> str | None:
        """Build a program; what the compiler complained about, or None."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(source, encoding="utf-8")
            messages = Path(folder, "messages.txt")
            try:
                with _output_into(messages):
                    self._build_program(path, flags)
            except (BaseError, CCompilerError, OSError, subprocess.SubprocessError) as error:
                return _first_error(messages.read_text(errors="replace")) or last_line(str(error))
        return None

    def _build_program(self, source: Path, flags: Sequence[str]) -> None:
        folder = str(source.parent)
        objects = self._compiler.compile([str(source)], output_dir=folder, extra_postargs=[*self.flags, *flags])
        link_flags = [] if self.is_msvc else list(flags)
        self._compiler.link_executable(
            objects, source.stem, output_dir=folder, extra_postargs=link_flags, target_lang="c++"
        )


@contextlib.contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Send what this process and its children print into a file.

    setuptools has no option to catch what a compiler says, and how it starts one changes between its versions.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    try:
        with path.open("wb") as file:
            for descriptor, _ in saved:
                os.dup2(file.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in saved:
            os.dup2(copy, descriptor)
            os.close(copy)


def _first_error(output: str) -> str | None:
    return next((line.split("error:", 1)[1].strip() for line in output.splitlines() if "error:" in line), None)
