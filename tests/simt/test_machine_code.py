"""The machine code of csrc/cuda against the table csrc/cuda/budget.txt: registers, spills, shared memory, tensor cores.

nvcc compiles each source for capability 7.5 and 8.6, or for all that are built by default where
FASTSAM_TEST_ALL_ARCHITECTURES=1 is set. Tensor-core instructions are looked for with nvdisasm, from the CUDA toolkit
or from the package nvidia-cuda-nvdisasm.
"""

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import kernel_build
import pytest
from kernel_build import DEVICE_FLAGS, INCLUDE_DIRS, ROOT

from build_support.cuda import DEFAULT_CAPABILITIES, PTX_FAMILIES
from build_support.settings import Unavailable

CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(path.name for path in CUDA.glob("*.cu") if path.stem != "device")  # which has no kernels
ALL = os.environ.get("FASTSAM_TEST_ALL_ARCHITECTURES") == "1"
CAPABILITIES = DEFAULT_CAPABILITIES if ALL else (75, 86)


@dataclass(frozen=True)
class Row:
    """What the kernels of a pattern may use. capabilities: times ten, from the first to the last."""

    pattern: str
    capabilities: range
    registers: int
    shared_bytes: int
    local_bytes: int
    tensor_cores: bool

    def covers(self, kernel: str, capability: int) -> bool:
        return capability in self.capabilities and fnmatchcase(kernel, self.pattern)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def read_budget(text: str) -> list[Row]:
    """The rows of the table: columns between bars, `#` starts a comment."""
    rows = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern, capabilities, *numbers, tensor_cores = (cell.strip() for cell in line.split("|"))
        assert tensor_cores in ("yes", "no"), line
        first, last = capabilities.split("-")
        between = range(int(first), int(last) + 1)
        registers, shared_bytes, local_bytes = map(int, numbers)
        rows.append(Row(pattern, between, registers, shared_bytes, local_bytes, tensor_cores == "yes"))
    return rows


BUDGET = read_budget((CUDA / "budget.txt").read_text())


def demangle(symbol: str) -> str:
    """The name of a kernel with its template arguments, without namespaces."""
    demangler = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangler.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = demangler(symbol.encode(), None, None, ctypes.byref(status))
    assert status.value == 0, symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    for space in ("fastsam::cuda::", "fastsam::", "(anonymous namespace)::"):
        name = name.replace(space, "")
    name = name.removeprefix("void ")
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:position]
    return name


_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*Used (\d+) registers(.*)"
)


def read_ptxas(report: str) -> dict[str, Usage]:
    """What `ptxas -v` says, by the symbols of the kernels."""
    usage = {}
    for symbol, stack, stored, loaded, registers, rest in _ENTRY.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        shared_bytes = 0 if shared is None else int(shared[1])
        usage[symbol] = Usage(int(registers), shared_bytes, int(stack), int(stored) + int(loaded))
    assert len(usage) == report.count("Compiling entry function"), "ptxas has said it in other words"
    return usage


def compile_verbosely(source: Path, capability: int, cache_dir: Path) -> tuple[Path, dict[str, Usage]]:
    """Machine code of a source and what ptxas says of it, from the cache if nothing has changed."""
    nvcc = kernel_build.device_compiler()
    if capability not in nvcc.capabilities:
        raise Unavailable(f"nvcc {nvcc.version} does not compile for capability {capability}")
    command = [str(nvcc.path), "-cubin", *DEVICE_FLAGS, "-Xptxas", "-v", f"-arch=sm_{capability}"]
    command += [f"-I{folder}" for folder in INCLUDE_DIRS]
    headers = sorted((ROOT / "csrc" / "include").rglob("*"))
    contents = [path.read_bytes() for path in [source, *headers] if path.is_file()]
    digest = hashlib.sha256(b"\0".join([nvcc.version.encode(), *map(str.encode, command), *contents])).hexdigest()[:16]
    code = cache_dir / f"{source.stem}-sm{capability}-{digest}.cubin"
    report = code.with_suffix(".ptxas")
    if not report.exists():
        for old in cache_dir.glob(f"{source.stem}-sm{capability}-*"):
            old.unlink()
        result = subprocess.run([*command, str(source), "-o", str(code)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        report.write_text(result.stdout + result.stderr)
    return code, read_ptxas(report.read_text())


def find_nvdisasm() -> str:
    """The disassembler of the CUDA toolkit or of the Python package.

    Raises:
        Unavailable: there is none.
    """
    toolkit = kernel_build.device_compiler().path.resolve().parent
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(toolkit))
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        found = found or next(map(str, Path(folder).glob("*/bin/nvdisasm")), None)
    if found is None:
        raise Unavailable("no nvdisasm on PATH, in the CUDA toolkit or in the package nvidia-cuda-nvdisasm")
    return found


def kernels_on_tensor_cores(code: Path) -> set[str]:
    """The symbols of the kernels that hold matrix instructions."""
    listing = subprocess.run([find_nvdisasm(), "-c", str(code)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)[1:]
    return {
        symbol
        for symbol, body in zip(sections[::2], sections[1::2], strict=True)
        if re.search(r"\b[HDIQ]G?MMA\.", body)
    }


def rows_for(kernel: str, capability: int) -> Iterator[Row]:
    return (row for row in BUDGET if row.covers(kernel, capability))


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Path:
    return CUDA / request.param


@pytest.fixture(params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest, source: Path, build_cache: Path) -> tuple[Path, dict[str, Usage], int]:
    try:
        return *compile_verbosely(source, request.param, build_cache), request.param
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(1200)
def test_kernels_stay_within_their_budget(compiled: tuple[Path, dict[str, Usage], int]) -> None:
    _, usage, capability = compiled
    assert usage, "no kernels"
    over = []
    for symbol, used in usage.items():
        kernel = demangle(symbol)
        row = next(rows_for(kernel, capability), None)
        if row is None:
            over.append(f"{kernel}: no row in budget.txt")
        elif (
            used.registers > row.registers
            or used.shared_bytes > row.shared_bytes
            or max(used.stack_bytes, used.spill_bytes) > row.local_bytes
        ):
            over.append(f"{kernel}: {used}, allowed {row}")
    assert not over, f"capability {capability}:\n" + "\n".join(over)


@pytest.mark.timeout(1200)
def test_products_are_on_tensor_cores(compiled: tuple[Path, dict[str, Usage], int]) -> None:
    code, usage, capability = compiled
    try:
        with_products = kernels_on_tensor_cores(code)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for symbol in usage:
        row = next(rows_for(demangle(symbol), capability), None)
        assert row is not None and row.tensor_cores == (symbol in with_products), demangle(symbol)


@pytest.mark.timeout(1200)
def test_no_row_is_left_over(build_cache: Path) -> None:
    """A row that covers no kernel guards nothing: it is misspelt, or its kernel is gone."""
    try:
        named = [
            (demangle(symbol), capability)
            for capability in CAPABILITIES
            for name in SOURCES
            for symbol in compile_verbosely(CUDA / name, capability, build_cache)[1]
        ]
    except Unavailable as reason:
        pytest.skip(str(reason))
    of_these = [row for row in BUDGET if any(capability in row.capabilities for capability in CAPABILITIES)]
    first_rows = {next(rows_for(*kernel), None) for kernel in named}
    assert [row.pattern for row in of_these if row not in first_rows] == []


ONE_KERNEL = """
#include "fastsam/attention.cuh"
template __global__ void fastsam::cuda::attention_forward_kernel<{instance}>(
    fastsam::cuda::AttentionForwardArguments<{maps}>, fastsam::cuda::ForwardStages);
"""


@pytest.mark.parametrize("family", PTX_FAMILIES, ids=str)
@pytest.mark.parametrize(
    ("maps", "way"), [("float", "WarpTf32"), ("__nv_bfloat16", "WarpHalf<__nv_bfloat16, 16>")], ids=["tf32", "bfloat16"]
)
def test_ptx_of_a_family_is_the_same(family: tuple[int, int], maps: str, way: str, tmp_path: Path) -> None:
    """It names its target, and nothing else differs: so one translation serves all of the family."""
    try:
        nvcc = kernel_build.device_compiler()
    except Unavailable as reason:
        pytest.skip(str(reason))
    source = tmp_path / "one_kernel.cu"
    source.write_text(ONE_KERNEL.format(maps=maps, instance=f"{maps}, fastsam::cuda::{way}, 4, 64"))
    written = {}
    for capability in DEFAULT_CAPABILITIES:
        if family[0] <= capability <= family[1] and capability in nvcc.capabilities:
            out = tmp_path / f"{capability}.ptx"
            command = [
                str(nvcc.path),
                "-ptx",
                *DEVICE_FLAGS,
                f"-arch=compute_{capability}",
                str(source),
                "-o",
                str(out),
            ]
            result = subprocess.run([*command, *(f"-I{folder}" for folder in INCLUDE_DIRS)], capture_output=True)
            assert result.returncode == 0, result.stderr
            written[capability] = re.sub(r"^\.target sm_\d+$", "", out.read_text(), flags=re.MULTILINE)
    if len(written) < 2:
        pytest.skip(f"nvcc {nvcc.version} compiles for no two capabilities of {family}")
    assert "mma.sync" in next(iter(written.values()))
    assert len(set(written.values())) == 1
