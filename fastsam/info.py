"""What is installed, what was compiled, and which back end serves which tensors."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastsam import backends
from fastsam._version import __version__
from fastsam.backends import OPERATORS

_REPORT = Path(__file__).with_name("_build.json")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """What `auto` chooses for an operator on one kind of tensor."""

    operator: str
    device_type: str
    dtype: str
    backend: str
    reason: str


@dataclass(frozen=True)
class CudaInfo:
    """The CUDA part of the extension.

    build: what the build did, in words. architectures: compute capabilities it holds code for, with +PTX where later
    ones can run it, too. runtime, driver: CUDA versions, or None where there is none. devices: compute capability of
    each visible card.
    """

    build: str
    architectures: tuple[str, ...] = ()
    runtime: str | None = None
    driver: str | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Info:
    """Facts about this installation; `print(fastsam.info())` shows them as text.

    native: what the build of the compiled extension did, in words. native_error: why it cannot be imported, or None.
    instruction_sets: those compiled. instruction_set: the one this processor runs, or None. openmp, triton: in words.
    selected: the back end in force. choices: what "auto" chooses.
    """

    version: str
    torch_version: str
    threads: int
    native: str
    native_error: str | None
    instruction_sets: tuple[str, ...]
    instruction_set: str | None
    openmp: str
    cuda: CudaInfo
    triton: str
    selected: str
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        rows = [
            ("PyTorch", f"{self.torch_version}, {self.threads} threads"),
            ("extension", self.native),
            *([("not loaded", self.native_error)] if self.native_error else []),
            ("instructions", self._instructions()),
            ("OpenMP", self.openmp),
            ("CUDA", self.cuda.build),
            *_cuda_rows(self.cuda),
            ("Triton", self.triton),
            ("back end", self.selected),
        ]
        lines = [f"fastsam {self.version}", *(f"  {name:<13} {text}" for name, text in rows)]
        lines.append(f'  "auto" chooses on 64 maps of 32x32 for {", ".join(OPERATORS)}:')
        return "\n".join([*lines, *self._choice_lines()])

    def _choice_lines(self) -> list[str]:
        operators: dict[tuple[str, str, str, str], list[str]] = {}
        for choice in self.choices:
            operators.setdefault((choice.device_type, choice.backend, choice.reason, choice.dtype), []).append(
                choice.operator
            )
        dtypes: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
        for (device_type, backend, reason, dtype), names in operators.items():
            dtypes.setdefault((device_type, backend, reason, tuple(names)), []).append(dtype)
        return [
            f"    {backend:<6} for {'all' if names == OPERATORS else ', '.join(names)} in {', '.join(of)} "
            f"on {device_type} ({reason})"
            for (device_type, backend, reason, names), of in dtypes.items()
        ]

    def _instructions(self) -> str:
        if self.instruction_set is None:
            return "none"
        return f"{self.instruction_set} in use, {', '.join(self.instruction_sets)} compiled"


def info() -> Info:
    """Report versions, what was compiled or why not, and the back end that `auto` chooses for each kind of tensor."""
    report = _build_report()
    native = backends.native_module()
    return Info(
        version=__version__,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        native=_text(report, "CPU"),
        native_error=backends.native_error(),
        instruction_sets=tuple(native.cpu_isas()) if native else (),
        instruction_set=native.cpu_isa() if native else None,
        openmp=_text(report, "OpenMP"),
        cuda=_cuda_info(report, native),
        triton=_triton(),
        selected=backends.selected(),
        choices=tuple(
            Choice(
                operator,
                device_type,
                str(dtype).removeprefix("torch."),
                *backends.explain(operator, torch.device(device_type), dtype),
            )
            for device_type in ("cpu", "cuda")
            for dtype in _DTYPES
            for operator in OPERATORS
        ),
    )


def _triton() -> str:
    reason, interpreted = backends.triton_state()
    if reason is not None:
        return reason
    version: str = importlib.import_module("triton").__version__
    return f"{version}, interpreted on the CPU (TRITON_INTERPRET)" if interpreted else version


def _build_report() -> dict[str, Any]:
    try:
        report = json.loads(_REPORT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _text(report: dict[str, Any], part: str) -> str:
    facts = report.get(part)
    text = facts.get("text") if isinstance(facts, dict) else None
    return text if isinstance(text, str) else "not built here: install the package with `pip install .`"


def _cuda_info(report: dict[str, Any], native: ModuleType | None) -> CudaInfo:
    build = _text(report, "CUDA")
    cuda = getattr(native, "cuda", None)
    if cuda is None:
        return CudaInfo(build)
    capabilities = (cuda.compute_capability(device) for device in range(cuda.device_count()))
    return CudaInfo(
        build,
        architectures=tuple(cuda.architectures.split(",")),
        runtime=_cuda_version(cuda.runtime_version()),
        driver=_cuda_version(cuda.driver_version()),
        devices=tuple(f"{major}.{minor}" for major, minor in capabilities),
    )


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number // 10 % 100}" if number else None


def _cuda_rows(cuda: CudaInfo) -> list[tuple[str, str]]:
    if cuda.runtime is None:
        return []
    devices = ", ".join(f"{index}: {capability}" for index, capability in enumerate(cuda.devices))
    return [
        ("CUDA runtime", f"{cuda.runtime}, driver {cuda.driver or 'not found'}"),
        ("CUDA devices", f"compute capability {devices}" if devices else "none visible"),
    ]
