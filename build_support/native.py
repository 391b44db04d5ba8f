"""The setuptools commands that compile `fastsam._native`."""

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

from build_support import cuda
from build_support.settings import Report, Settings, Unavailable
from build_support.toolchain import Toolchain

BINDINGS = "csrc/bindings.cpp"
INCLUDE_DIRS = ["csrc/include", "csrc"]
REPORT_NAME = "_build.json"

Item = TypeVar("Item")
Macros = list[tuple[str, str]]


def extension() -> Extension:
    """The one extension module, for setup()."""
    return Extension("fastsam._native", [BINDINGS, *sources("csrc/cpu", "*.cpp")], language="c++")


def sources(folder: str, pattern: str) -> list[str]:
    """Source files of a folder in a fixed order."""
    return sorted(path.as_posix() for path in Path(folder).glob(pattern))


class CleanBuildPy(build_py):
    """Starts from an empty package, so that a module deleted since the last build is not packed again."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "fastsam"), ignore_errors=True)
        super().run()


@dataclass(frozen=True)
class _Unit:
    """One source compiled in one way, its object in a folder of its own."""

    source: str
    folder: str
    macros: Macros = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _CudaPart:
    objects: list[str] = field(default_factory=list)
    macros: Macros = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    library_dirs: list[str] = field(default_factory=list)


class BuildNative(build_ext):
    """Compiles every object anew: it takes seconds, and nothing stale can be linked."""

    def run(self) -> None:
        try:
            self.settings = Settings.from_environment(os.environ)
        except ValueError as error:
            raise SetupError(str(error)) from error
        self.report = Report()
        inplace = bool(self.inplace)
        if inplace:
            self._remove_earlier(self._source_package())
        super().run()
        built = self._source_package() if inplace else Path(self.build_lib, "fastsam")
        self.report.write(built / REPORT_NAME)
        if not inplace:
            self._leave_a_copy(built)

    def _leave_a_copy(self, built: Path) -> None:
        """Python started in a checkout imports the package that lies there, installed or not: it must find the same."""
        source = self._source_package()
        extension_name = Path(self.get_ext_filename("_native")).name
        (source / extension_name).unlink(missing_ok=True)
        for name in (extension_name, REPORT_NAME):
            if (built / name).exists():
                shutil.copy2(built / name, source / name)

    def build_extensions(self) -> None:
        toolchain = Toolchain(self.compiler)
        try:
            if self.settings.skip_native:
                raise Unavailable("FASTSAM_SKIP_NATIVE is set")
            toolchain.check()
        except Unavailable as reason:
            self._skip_everything(str(reason))
        else:
            self._build_everything(toolchain)

    def _build_everything(self, toolchain: Toolchain) -> None:
        cuda_part = self._build_cuda()
        macros, compile_flags, link_flags = self._find_openmp(toolchain)
        instruction_sets = toolchain.instruction_sets()
        # Imported here, because commands that compile nothing, such as sdist, load this module without pybind11.
        import pybind11

        def compile_one(unit: _Unit) -> str:
            (output,) = self.compiler.compile(
                [unit.source],
                output_dir=str(self._object_folder(unit.folder)),
                macros=macros + unit.macros,
                include_dirs=[*INCLUDE_DIRS, pybind11.get_include()],
                extra_postargs=toolchain.flags + compile_flags + unit.flags,
            )
            return str(output)

        units = self._units(instruction_sets, cuda_part.macros)
        objects = self._parallel(compile_one, units, self.settings.jobs)
        self._link(objects, cuda_part, link_flags)
        names = list(instruction_sets)
        self.report.built("CPU", f"built for {', '.join(names)} by {toolchain.description}", instruction_sets=names)

    def _skip_everything(self, reason: str) -> None:
        if self.settings.force_cuda:
            raise SetupError(f"FASTSAM_FORCE_CUDA is set: {reason}")
        self.report.skipped("CPU", f"{reason}; the eager back end serves")
        for part in ("OpenMP", "CUDA"):
            self.report.skipped(part, "no extension is built")
        self.extensions: list[Extension] = []

    def _find_openmp(self, toolchain: Toolchain) -> tuple[Macros, list[str], list[str]]:
        try:
            compile_flags, link_flags = toolchain.openmp()
        except Unavailable as reason:
            self.report.skipped("OpenMP", str(reason))
            return [], [], []
        self.report.built("OpenMP", f"used ({' '.join(compile_flags)})")
        return [("FASTSAM_OPENMP", "1")], compile_flags, link_flags

    def _units(self, instruction_sets: dict[str, list[str]], cuda_macros: Macros) -> list[_Unit]:
        """The C++ sources to compile; the portable objects come before the others on the link line.

        Templates of the standard library that several objects hold are taken from the first, and must not need a
        newer processor.
        """
        bindings_macros = cuda_macros + ([("FASTSAM_ISAS_X86", "1")] if len(instruction_sets) > 1 else [])
        return [_Unit(BINDINGS, "bindings", bindings_macros)] + [
            _Unit(source, name, [("FASTSAM_ISA", name)], flags)
            for name, flags in instruction_sets.items()
            for source in sources("csrc/cpu", "*.cpp")
        ]

    def _link(self, objects: list[str], cuda_part: _CudaPart, flags: list[str]) -> None:
        (ext,) = self.extensions
        ext.libraries = cuda_part.libraries
        hide = ["-Wl,--exclude-libs,libcudart_static.a"] if cuda_part.libraries and os.name == "posix" else []
        self.compiler.link_shared_object(
            objects + cuda_part.objects,
            self.get_ext_fullpath(ext.name),
            libraries=self.get_libraries(ext),
            library_dirs=cuda_part.library_dirs,
            extra_postargs=flags + hide,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _build_cuda(self) -> _CudaPart:
        try:
            return self._compile_cuda()
        except ValueError as error:
            raise SetupError(str(error)) from error
        except Unavailable as reason:
            if self.settings.force_cuda:
                raise SetupError(f"FASTSAM_FORCE_CUDA is set: {reason}") from reason
            self.report.skipped("CUDA", str(reason))
            return _CudaPart()

    def _compile_cuda(self) -> _CudaPart:
        if self.settings.skip_cuda:
            raise Unavailable("FASTSAM_SKIP_CUDA is set")
        nvcc = cuda.inspect_nvcc(cuda.find_nvcc(os.environ))
        architectures = cuda.select_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc)
        libraries = cuda.runtime_libraries(nvcc)
        files = sources("csrc/cuda", "*.cu")
        names = [str(architecture) for architecture in architectures]
        # Two files, of the attention, take more than half of the time: the jobs work on one each, and each of them for
        # one architecture, or family of architectures.
        files_at_a_time = min(2, self.settings.jobs)

        def compile_one(source: str) -> str:
            self.announce(f"nvcc compiles {source} for {' '.join(names)}", level=logging.INFO)
            started = time.monotonic()
            output = self._object_folder("cuda") / (Path(source).stem + (".obj" if os.name == "nt" else ".o"))
            command = cuda.compile_command(
                nvcc,
                architectures,
                source,
                str(output),
                include_dirs=INCLUDE_DIRS,
                host_compiler=cuda.host_compiler(os.environ),
                threads=max(1, self.settings.jobs // files_at_a_time),
            )
            self._run_nvcc(command, source)
            self.announce(f"nvcc compiled {source} in {time.monotonic() - started:.0f} s", level=logging.INFO)
            return str(output)

        objects = self._parallel(compile_one, files, files_at_a_time)
        self.report.built(
            "CUDA", f"built for {' '.join(names)} by nvcc {nvcc.version} ({nvcc.path})", architectures=names
        )
        macros = [("FASTSAM_CUDA", "1"), ("FASTSAM_CUDA_ARCHITECTURES", f'"{",".join(names)}"')]
        return _CudaPart(objects, macros, libraries, list(nvcc.library_dirs))

    def _run_nvcc(self, command: list[str], source: str) -> None:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode == 0:
            return
        if self.settings.force_cuda:
            print(result.stdout)
        raise Unavailable(f"nvcc cannot compile {source} ({cuda.last_line(result.stdout)})")

    def _parallel(self, work: Callable[[Item], str], items: Sequence[Item], at_a_time: int) -> list[str]:
        with ThreadPoolExecutor(at_a_time) as pool:
            return list(pool.map(work, items))

    def _object_folder(self, name: str) -> Path:
        folder = Path(self.build_temp, name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _source_package(self) -> Path:
        build_py_command: Any = self.get_finalized_command("build_py")
        return Path(build_py_command.get_package_dir("fastsam"))

    @staticmethod
    def _remove_earlier(package: Path) -> None:
        for pattern in ("_native*.so", "_native*.pyd", REPORT_NAME):
            for path in package.glob(pattern):
                path.unlink()
