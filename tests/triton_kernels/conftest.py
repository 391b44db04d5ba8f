"""Triton's interpreter without work that changes nothing: tests of interpreted kernels take half the time."""

from collections.abc import Iterator
from typing import Any

import pytest


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
