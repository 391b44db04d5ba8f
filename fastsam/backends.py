"""Which implementation serves a call.

`auto` (the default) picks the fastest back end that can serve a call, `eager` is the PyTorch reference that serves
everything, and naming any other back end forces it: a call that it cannot serve is then an error that says why.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

NATIVE_BACKENDS = ("cpu",)
"""Back ends other than eager, fastest first."""

NAMES = ("auto", "eager", *NATIVE_BACKENDS)


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
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


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


def unsupported(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the back end `name` cannot serve tensors of this device type and dtype; None where it can."""
    if name == "eager":
        return None
    if _native is None:
        return f"the compiled extension cannot be loaded ({_native_error}); `python -m fastsam` says what the build did"
    if device_type != "cpu":
        return f"it serves tensors on the cpu, these are on {device_type}"
    if dtype not in _CPU_DTYPES:
        return f"it serves {' and '.join(map(str, _CPU_DTYPES))}, these tensors are {dtype}"
    return None


def choose(operator: str, device_type: str, dtype: torch.dtype) -> str:
    """The back end that serves a call: a name other than "auto".

    Raises:
        RuntimeError: a back end is forced that cannot serve the call.
    """
    if _selected == "auto":
        return next((name for name in NATIVE_BACKENDS if unsupported(name, device_type, dtype) is None), "eager")
    reason = unsupported(_selected, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"fastsam.{operator}: the back end {_selected!r} is forced and cannot serve this call: {reason}"
        )
    return _selected


def explain(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """What `auto` chooses for tensors of this device type and dtype, and the reason in words."""
    reasons = {name: unsupported(name, device_type, dtype) for name in NATIVE_BACKENDS}
    for name, reason in reasons.items():
        if reason is None:
            return name, "compiled, and it serves this device and dtype"
    return "eager", "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
