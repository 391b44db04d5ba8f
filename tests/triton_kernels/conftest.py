"""The back end for tests of its kernels, and an interpreter without work that changes nothing, in half the time."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsam
from fastsam import backends

sys.path[:0] = [str(Path(__file__).resolve().parent)]  # for `import on_device`, whatever import mode pytest runs in

from on_device import DEVICE  # noqa: E402


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Run on Triton, PyTorch's own products in true float32; skips where Triton cannot run on DEVICE."""
    reason = backends.unsupported("lstm_gates", "triton", DEVICE, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with fastsam.backend("triton"):
        yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Leaves out two things that Triton 3.4 to 3.9 do in the interpreter.

    It adds and multiplies integers once more in 64 bits, for an assertion that only its debug mode makes. And before
    each call of a function in a kernel it looks through triton.language for what is to be replaced, which the launch
    has done already for kernels; here it is done once for triton.language's own functions.
    """
    language, interpreter = pytest.importorskip("triton.language"), pytest.importorskip("triton.runtime.interpreter")
    if not isinstance(language.cdiv, interpreter.InterpretedFunction):
        yield
        return

    def call(function: Any, *arguments: Any, **keywords: Any) -> Any:
        return function.rewrite()(*arguments, **keywords)

    options = interpreter.interpreter_builder.options
    interpreter._patch_lang(language.cdiv.fn)  # Triton itself leaves it so
    with pytest.MonkeyPatch.context() as patch:
        if not options.debug:
            patch.setitem(vars(options), "sanitize_overflow", False)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
