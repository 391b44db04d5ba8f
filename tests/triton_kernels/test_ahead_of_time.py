"""Every Triton kernel compiles for the capabilities it is for, within their means: no spills, tensor cores used.

For 8.6 and 10.0, or for all where FASTSAM_TEST_ALL_ARCHITECTURES=1 is set: a capability takes a minute or two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have, by capability."""

SPILLING = ("keys=128", "keys=256", "C=256")
"""What may leave some numbers outside of registers: large key maps, many channels."""

CAPABILITIES = tuple(SHARED) if os.environ.get("FASTSAM_TEST_ALL_ARCHITECTURES") == "1" else (86, 100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(cache, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead_of_time.py"), str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) > 20
    for kernel in kernels:
        assert kernel["stack"] == 0 or any(part in kernel["name"] for part in SPILLING), kernel
        assert kernel["shared"] <= 1024 * SHARED[capability], kernel
        assert kernel["tensor_cores"] or not kernel["wanted"], kernel
