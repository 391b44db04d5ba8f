"""The CUDA part of the build: where nvcc is, for which cards it compiles, and the commands.

nvcc is called directly. PyTorch's own helper would need PyTorch in the build environment, and decides by the card
in the machine, which is missing in most containers.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_support.settings import Unavailable

DEFAULT_CAPABILITIES = (61, 70, 75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, built unless TORCH_CUDA_ARCH_LIST says otherwise, where nvcc knows them."""

OLDEST_CAPABILITY = 61

PTX_FAMILIES = ((80, 89), (100, 129))
"""First and last capabilities, times ten, for which nvcc writes the same PTX and its assembler then makes the same
machine code of it: PTX for the oldest of them serves all, and writing PTX is half of the work."""

_WINDOWS = os.name == "nt"


@dataclass(frozen=True)
class Architecture:
    """One card generation to compile for.

    capability: compute capability times ten. suffix: "a" or "f" for the specific features of one generation, or "".
    ptx: also keep the portable form, which later cards can run.
    """

    capability: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.capability // 10}.{self.capability % 10}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def name(self) -> str:
        """As in the names of nvcc, for example "90a" in sm_90a."""
        return f"{self.capability}{self.suffix}"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that runs.

    path: the program. version: such as "13.0". capabilities: times ten, what it can compile for.
    library_dirs: where it looks for libraries.
    """

    path: Path
    version: str
    capabilities: tuple[int, ...]
    library_dirs: tuple[str, ...]


def find_nvcc(environment: Mapping[str, str], default_home: Path = Path("/usr/local/cuda")) -> Path:
    """Find nvcc: in CUDA_HOME or CUDA_PATH if one is set, else on PATH, else in the usual folder.

    Raises:
        Unavailable: there is none.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = environment.get(name)
        if home:
            nvcc = _nvcc_in(Path(home))
            if nvcc is None:
                raise Unavailable(f"no nvcc in {name} ({home})")
            return nvcc
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    nvcc = Path(on_path) if on_path else _nvcc_in(default_home)
    if nvcc is None:
        raise Unavailable(f"no nvcc on PATH, in CUDA_HOME or {default_home}")
    return nvcc


def _nvcc_in(home: Path) -> Path | None:
    found = shutil.which("nvcc", path=str(home / "bin"))
    return Path(found) if found else None


def inspect_nvcc(path: Path) -> Nvcc:
    """Ask nvcc for its version, its architectures and its library folders.

    Raises:
        Unavailable: it does not run, or its answers make no sense.
    """
    release = re.search(r"release (\d+\.\d+)", _ask(path, "--version"))
    capabilities = tuple(sorted(int(code) for code in re.findall(r"sm_(\d+)\b", _ask(path, "--list-gpu-code"))))
    if release is None or not capabilities:
        raise Unavailable(f"{path} does not tell its version and architectures")
    return Nvcc(path, release[1], capabilities, _library_dirs(_ask(path, "--dryrun", "-c", "-x", "cu", os.devnull)))


def _ask(path: Path, *arguments: str) -> str:
    try:
        result = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{path} does not run ({last_line(getattr(error, 'stderr', None) or str(error))})") from error
    return result.stdout + result.stderr


def _library_dirs(dryrun: str) -> tuple[str, ...]:
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dryrun, re.MULTILINE)
    return tuple(re.findall(r'(?:-L|/LIBPATH:)([^"]+)"', libraries[1])) if libraries else ()


def last_line(text: str) -> str:
    """The last line of a program's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def select_architectures(requested: str, nvcc: Nvcc) -> list[Architecture]:
    """The architectures to compile for.

    Args:
        requested: TORCH_CUDA_ARCH_LIST, such as "7.5;8.6+PTX", separated by ";" or spaces; empty for the default.
            Entries older than the oldest card fastsam serves are left out, as container images list them.
        nvcc: the compiler in use.

    Raises:
        ValueError: an entry is no compute capability, or this nvcc cannot compile for it, or nothing is left.
    """
    entries = requested.replace(";", " ").replace(",", " ").split()
    if not entries:
        return _default_architectures(nvcc)
    parsed = [architecture for architecture in map(_parse, entries) if architecture.capability >= OLDEST_CAPABILITY]
    if not parsed:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST is {requested!r}, fastsam serves compute capability 6.1 and newer")
    for architecture in parsed:
        if architecture.capability not in nvcc.capabilities:
            offered = ", ".join(str(Architecture(capability)) for capability in nvcc.capabilities)
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST asks for {architecture}, nvcc {nvcc.version} compiles for {offered}"
            )
    with_ptx = {(architecture.capability, architecture.suffix) for architecture in parsed if architecture.ptx}
    keys = sorted({(architecture.capability, architecture.suffix) for architecture in parsed})
    return [Architecture(*key, ptx=key in with_ptx) for key in keys]


def _default_architectures(nvcc: Nvcc) -> list[Architecture]:
    capabilities = [capability for capability in DEFAULT_CAPABILITIES if capability in nvcc.capabilities]
    if not capabilities:
        raise ValueError(f"nvcc {nvcc.version} compiles for no compute capability that fastsam serves")
    return [Architecture(capability, ptx=capability == capabilities[-1]) for capability in capabilities]


def _parse(entry: str) -> Architecture:
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
    if match is None:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST holds {entry!r}, entries look like 7.5 or 8.6+PTX")
    return Architecture(10 * int(match[1]) + int(match[2]), match[3], match[4] is not None)


def code_options(architectures: Sequence[Architecture]) -> list[str]:
    """The options of nvcc for these architectures.

    What is kept as PTX is that of the oldest architecture of a family, which runs on all the cards that later PTX runs
    on.
    """
    codes: dict[str, list[str]] = {}
    for architecture in architectures:
        source = _oldest_relative(architecture, architectures).name
        codes.setdefault(source, []).append(f"sm_{architecture.name}")
        if architecture.ptx:
            codes[source].append(f"compute_{source}")
    return [f"-gencode=arch=compute_{source},code=[{','.join(dict.fromkeys(codes[source]))}]" for source in codes]


def _oldest_relative(architecture: Architecture, architectures: Sequence[Architecture]) -> Architecture:
    for first, last in PTX_FAMILIES:
        if first <= architecture.capability <= last and not architecture.suffix:
            relatives = [one for one in architectures if first <= one.capability <= last and not one.suffix]
            return min(relatives, key=lambda one: one.capability)
    return architecture


def compile_command(
    nvcc: Nvcc,
    architectures: Sequence[Architecture],
    source: str,
    output: str,
    *,
    include_dirs: Sequence[str],
    host_compiler: str | None,
    threads: int,
) -> list[str]:
    """The nvcc call that turns one source into one object."""
    host_flags = ["/MD"] if _WINDOWS else ["-fPIC", "-fvisibility=hidden"]
    command = [str(nvcc.path), "-c", source, "-o", output, "-O3", "-std=c++17", "--threads", str(threads)]
    if int(nvcc.version.split(".")[0]) >= 13:  # whose drivers all unpack it; a quarter of the size
        command.append("--compress-mode=size")
    command += [f"-I{folder}" for folder in include_dirs]
    command += code_options(architectures)
    command += [part for flag in host_flags for part in ("-Xcompiler", flag)]
    return [*command, "-ccbin", host_compiler] if host_compiler else command


def host_compiler(environment: Mapping[str, str]) -> str | None:
    """The C++ compiler the user chose with CXX, for nvcc to use as well, unless NVCC_CCBIN already tells it."""
    chosen = environment.get("CXX", "").split()
    return chosen[0] if len(chosen) == 1 and not environment.get("NVCC_CCBIN") else None


def runtime_libraries(nvcc: Nvcc) -> list[str]:
    """The libraries that an extension with the CUDA runtime inside links.

    Raises:
        Unavailable: the toolkit has no static runtime.
    """
    name = "cudart_static.lib" if _WINDOWS else "libcudart_static.a"
    if not any((Path(folder) / name).is_file() for folder in nvcc.library_dirs):
        raise Unavailable(f"no {name} beside {nvcc.path}")
    return ["cudart_static"] if _WINDOWS else ["cudart_static", "rt", "dl", "pthread"]
