"""Which implementation serves a call.

`auto` (the default) picks the fastest back end that can serve a call, `eager` is the PyTorch reference that serves
everything, and naming any other back end forces it: a call that it cannot serve is then an error that says why.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

NATIVE_BACKENDS = ("cpu", "cuda")
"""Back ends other than eager: compiled code, for the device of their name."""

AUTO = ("cpu",)
"""Those that `auto` chooses from, fastest first. `cuda` is left to those who name it as long as its kernels have run in
the harness of csrc/simt only, and on no card."""

NAMES = ("auto", "eager", *NATIVE_BACKENDS)


class _Served(NamedTuple):
    """What a compiled back end has kernels for."""

    operators: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_OPERATORS = ("double_attention", "self_attention", "separable_gates", "lstm_gates")

_SERVED = {
    "cpu": _Served(_OPERATORS, (torch.float32, torch.float64, torch.bfloat16)),
    "cuda": _Served(_OPERATORS, (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
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


def unsupported(operator: str, name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the back end `name` cannot serve an operator on tensors of this device type and dtype; None where it can."""
    if name == "eager":
        return None
    if _native is None:
        return f"the compiled extension cannot be loaded ({_native_error}); `python -m fastsam` says what the build did"
    if device_type != name:
        return f"it serves tensors on the {name}, these are on {device_type}"
    if name == "cuda" and not hasattr(_native, "cuda"):
        return "it was not built; `python -m fastsam` says why"
    served = _SERVED[name]
    if operator not in served.operators:
        return f"it has kernels for {' and '.join(served.operators)} only"
    if dtype not in served.dtypes:
        return f"it serves {', '.join(map(str, served.dtypes))}, these tensors are {dtype}"
    return None


def choose(operator: str, device_type: str, dtype: torch.dtype) -> str:
    """The back end that serves a call: a name other than "auto".

    Raises:
        RuntimeError: a back end is forced that cannot serve the call.
    """
    if _selected == "auto":
        return next((name for name in AUTO if unsupported(operator, name, device_type, dtype) is None), "eager")
    reason = unsupported(operator, _selected, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"fastsam.{operator}: the back end {_selected!r} is forced and cannot serve this call: {reason}"
        )
    return _selected


def explain(operator: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """What `auto` chooses for tensors of this device type and dtype, and the reason in words."""
    if device_type not in NATIVE_BACKENDS:
        return "eager", f"there is no compiled back end for {device_type}"
    reason = unsupported(operator, device_type, device_type, dtype)
    if reason is None and device_type in AUTO:
        return device_type, "compiled, and it serves this device and dtype"
    return "eager", f"{device_type}: {reason or 'it serves these, when named'}"
