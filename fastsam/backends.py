"""Which implementation serves a call.

`auto` (the default) picks the fastest back end that can serve a call, `eager` is the PyTorch reference that serves
everything, and naming any other back end forces it: a call that it cannot serve is then an error that says why.
"""

import contextlib
import functools
import importlib
import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam import fastest

COMPILED_BACKENDS = ("cpu", "cuda", "triton")
"""Back ends other than eager."""

NAMES = ("auto", "eager", *COMPILED_BACKENDS)

OLDEST_TRITON = (3, 4)
TRITON_CAPABILITY = (8, 0)
"""The first compute capability on which Triton's products use tensor cores."""


class _Served(NamedTuple):
    """What a compiled back end has kernels for."""

    operators: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


OPERATORS = ("double_attention", "self_attention", "separable_gates", "lstm_gates", "memory_gates", "norm_gate")

_SERVED = {
    "cpu": _Served(OPERATORS, (torch.float32, torch.float64, torch.bfloat16)),
    "cuda": _Served(OPERATORS, (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    "triton": _Served(OPERATORS, (torch.float32, torch.bfloat16, torch.float16)),
}


def _checked(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin} is {name!r}, it must be one of {', '.join(map(repr, NAMES))}")
    return name


def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastsam._native"), None
    except ImportError as error:
        if "FASTSAM_CPU_ISA" in str(error):
            raise ValueError(str(error)) from None
        return None, str(error)


_selected = _checked(os.environ.get("FASTSAM_BACKEND") or "auto", "the environment variable FASTSAM_BACKEND")
_native, _native_error = _load_native()


def native_module() -> ModuleType | None:
    """The compiled extension, or None where it was not built."""
    return _native


def native_error() -> str | None:
    """Why the compiled extension could not be imported, or None."""
    return _native_error


def selected() -> str:
    """The name given to `backend`, or by FASTSAM_BACKEND, or "auto"."""
    return _selected


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a back end, or "auto", for the calls made inside the `with` block.

    The choice holds for the whole process, threads included. In eager mode a backward pass runs on the back end of its
    forward pass. Compiled code (`torch.compile`) chooses whenever it runs; it is compiled again for the eager back end,
    whose operations it traces through.

    Raises:
        ValueError: no such back end.
    """
    global _selected
    previous, _selected = _selected, _checked(name, "the back end")
    try:
        yield
    finally:
        _selected = previous


def unsupported(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the back end `name` cannot serve an operator on tensors of this device and dtype; None where it can."""
    if name == "eager":
        return None
    if device.type == "cuda" and torch.cuda.is_initialized():
        return _unsupported_on_card(operator, name, _index(device), dtype)
    return _unsupported(operator, name, device, dtype)


@functools.cache
def _unsupported_on_card(operator: str, name: str, index: int, dtype: torch.dtype) -> str | None:
    """`unsupported` where CUDA runs: from then on the answers do not change, and asking the driver takes its time."""
    return _unsupported(operator, name, torch.device("cuda", index), dtype)


def _unsupported(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _triton_unsupported(device) if name == "triton" else _native_unsupported(name, device)
    if reason is not None:
        return reason
    served = _SERVED[name]
    if operator not in served.operators:
        return f"it has kernels for {' and '.join(served.operators)} only"
    if dtype not in served.dtypes:
        return f"it serves {', '.join(map(str, served.dtypes))}, these tensors are {dtype}"
    return None


def _native_unsupported(name: str, device: torch.device) -> str | None:
    if _native is None:
        return f"the compiled extension cannot be loaded ({_native_error}); `python -m fastsam` says what the build did"
    if device.type != name:
        return f"it serves tensors on the {name}, these are on {device.type}"
    if name == "cuda":
        if not hasattr(_native, "cuda"):
            return "it was not built; `python -m fastsam` says why"
        return _no_card() or cuda_code(_index(device))[1]
    return None


@functools.cache
def cuda_code(index: int) -> tuple[int, str | None]:
    """Compute capability, times ten, of the compiled code that runs on a card; 0, and why, where there is none."""
    native: Any = _native
    with torch.cuda.device(index):
        capability: int = native.cuda.code_capability()
    if capability != 0:
        return capability, None
    card = "{}.{}".format(*torch.cuda.get_device_capability(index))
    return 0, (
        f"it was compiled for compute capability {native.cuda.architectures}, which does not run on "
        f'device {index} of capability {card} with this driver; install again with TORCH_CUDA_ARCH_LIST="{card}"'
    )


def _triton_unsupported(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"it serves tensors on cuda, these are on {device.type}"
    reason, interpreted = triton_state()
    if reason is not None:
        return reason
    if device.type == "cpu":
        needs = "it serves tensors on cuda, these are on cpu, where TRITON_INTERPRET=1 runs its kernels, slowly"
        return None if interpreted else needs
    return _no_card() or _below_triton(_index(device)) or _triton_cannot_build()


@functools.cache
def triton_state() -> tuple[str | None, bool]:
    """Why Triton cannot be used at all, or None; and whether its kernels are interpreted."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); PyTorch with CUDA brings it on Linux", False
    if not hasattr(triton, "__version__"):
        return f"the module triton is not Triton, it is {triton!r}", False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, this is {triton.__version__}", False
    return None, bool(triton.knobs.runtime.interpret)


@functools.cache
def _below_triton(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= TRITON_CAPABILITY:
        return None
    return "it needs compute capability {}.{}, this card has {}.{}".format(*TRITON_CAPABILITY, *capability)


@functools.cache
def _triton_cannot_build() -> str | None:
    """Why Triton cannot build what launches its kernels, a little C for every signature; None where it can."""
    reason = _no_compiler() or _no_headers()
    if reason is None or os.name != "posix":  # for Windows Triton comes with a compiler of its own
        return None
    replaced = importlib.import_module("triton").knobs.build.impl is not None
    return None if replaced else f"Triton builds what launches its kernels, and {reason}"


def _no_compiler() -> str | None:
    named = os.environ.get("CC")
    names = ("gcc", "clang") if named is None else (named,)
    if any(map(shutil.which, names)):
        return None
    return f"there is no C compiler {' or '.join(map(repr, names))} here: install one, or name it in CC"


def _no_headers() -> str | None:
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton itself does, for Debian
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    others = os.pathsep.join(os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")).split(os.pathsep)
    if header.is_file() or any(Path(folder, "Python.h").is_file() for folder in others if folder):
        return None
    return f"there is no {header}: install Python's headers (python3-dev on Debian)"


def _no_card() -> str | None:
    if torch.version.hip is not None:
        return "it serves NVIDIA's cards, this PyTorch is for AMD's"
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _most_channels(name: str, operator: str, dtype: torch.dtype) -> float:
    """Channels for which every card has the shared memory that a back end's kernels need, or for which it has tiles."""
    if operator in ("double_attention", "self_attention"):
        return 64 if dtype == torch.float64 else 128
    return 256 if operator == "separable_gates" and name == "triton" else math.inf


def choose(operator: str, like: Tensor, channels: int | None = None) -> str:
    """The back end that serves a call on maps (B, C, H, W) like this one: a name other than "auto".

    channels: the most of any of its maps, where that may be other than C.

    Raises:
        RuntimeError: a back end is forced that cannot serve the call.
    """
    if _selected == "auto":
        return explain(operator, like.device, like.dtype, like.shape[2] * like.shape[3], channels or like.shape[1])[0]
    reason = unsupported(operator, _selected, like.device, like.dtype)
    if reason is not None:
        raise RuntimeError(
            f"fastsam.{operator}: the back end {_selected!r} is forced and cannot serve this call: {reason}"
        )
    return _selected


def explain(
    operator: str, device: torch.device, dtype: torch.dtype, positions: int = 1024, channels: int = 64
) -> tuple[str, str]:
    """What `auto` chooses for maps of so many positions and channels on a device, and the reason in words."""
    if device.type == "cpu":
        reason = unsupported(operator, "cpu", device, dtype)
        if reason is not None:
            return "eager", f"cpu: {reason}"
        return "cpu", "compiled, and it serves this device and dtype"
    if device.type != "cuda":
        return "eager", f"there is no compiled back end for {device.type}"
    reasons = {name: unsupported(operator, name, device, dtype) for name in ("cuda", "triton")}
    serving = [name for name, reason in reasons.items() if reason is None]
    if not serving:
        return "eager", "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    most = {name: _most_channels(name, operator, dtype) for name in serving}
    if channels > max(most.values()):
        if operator == "separable_gates":
            return "eager", f"triton has tiles for up to {max(most.values())} channels"
        reason = f"beyond {max(most.values())} channels not every card has room"
        return "eager", f"{reason}; {' and '.join(serving)} can be named"
    serving = [name for name in serving if channels <= most[name]]
    order, source = fastest.order(_index(device), operator, dtype, positions)
    if not order:
        return "eager", f"{' and '.join(serving)} can be named; {source}"
    return next((name for name in order if name in serving or name == "eager"), "eager"), source
