"""Every Triton kernel compiles for the capabilities it is for, within their means: no spills, tensor cores used.

For 8.6, which leaves the least room, and 10.0, there without the kernels of many channels, which take longest;
or for all of everything where FASTSAM_TEST_ALL_ARCHITECTURES=1 is set. A capability takes minutes.
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

STACK = {"15x17": 32, "tf32 C=128 keys=16 64x64 attention_column_gradients": 160}
"""Bytes that others may have there, by what is in their names. Attention on maps that tiles reach beyond: the masks may
push a few numbers out of registers. The kernel named: rounding its operands to tf32 takes more registers than a thread
has, whatever its tiles."""

ALL = {capability: "" for capability in SHARED}
SOME = {86: "", 100: "C=(?!128|256)"}
"""What is compiled by default: capabilities, and a regular expression of names."""

COMPILED = ALL if os.environ.get("FASTSAM_TEST_ALL_ARCHITECTURES") == "1" else SOME


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", COMPILED)
def test_machine_code(cache, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead_of_time.py"), str(capability), COMPILED[capability]],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) > 20
    for kernel in kernels:
        most = max((size for part, size in STACK.items() if part in kernel["name"]), default=0)
        assert kernel["stack"] <= most or any(part in kernel["name"] for part in SPILLING), kernel
        assert kernel["shared"] <= 1024 * SHARED[capability], kernel
        assert kernel["tensor_cores"] or not kernel["wanted"], kernel
