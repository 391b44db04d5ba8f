"""The compiled extension, without which half of the suite has nothing to test."""

import os

import pytest

from fastsam import backends


def require_native() -> None:
    """Fail where the compiled extension is missing: a suite that skips it would pass without testing it."""
    if backends.native_module() is not None:
        return
    message = f"the compiled extension is missing: {backends.native_error()}"
    if os.environ.get("FASTSAM_TEST_WITHOUT_NATIVE") == "1":
        pytest.skip(message)
    pytest.fail(f"{message}; build it, or set FASTSAM_TEST_WITHOUT_NATIVE=1 to test without it")
