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

STACK = {
    "15x17": 32,
    "tf32 C=128 keys=16 64x64 attention_column_gradients": 160,
    "tf32 C=128 keys=128 64x64 attention_forward": 128,
    "tf32 C=128 keys=128 64x64 attention_query_gradients": 384,
    "tf32 C=128 keys=128 64x64 attention_column_gradients": 16,
    "bfloat16 ieee C=128 keys=128 64x64": 16,
    "tf32 C=256 keys=256 64x64 attention_forward": 32,
    "tf32 C=256 keys=256 64x64 attention_query_gradients": 160,
    "bfloat16 ieee C=256 keys=256 64x64 attention_forward": 672,
    "bfloat16 ieee C=256 keys=256 64x64 attention_query_gradients": 192,
    "bfloat16 ieee C=256 keys=256 64x64 attention_column_gradients": 1088,
    "bfloat16 ieee C=256 keys=None 64x64": 64,
}
"""Bytes that a thread may have outside of registers, by what is in a kernel's name; others none. Attention on maps that
tiles reach beyond: the masks may push a few numbers out. At 128 channels in tf32: rounding the operands takes more
registers than a thread has, whatever the tiles. Key maps of 128 and 256 channels, and 256 channels of bfloat16: the
products with the whole depth of their operands."""

STACK_ON: dict[int, dict[str, int]] = {
    80: {
        "tf32 C=128 keys=16 64x64 attention_column_gradients": 224,
        "tf32 C=128 keys=128 64x64 attention_forward": 144,
        "tf32 C=128 keys=128 64x64 attention_query_gradients": 416,
        "tf32 C=256 keys=256 64x64": 192,
        "bfloat16 ieee C=256 keys=256 64x64 attention_forward": 1024,
        "bfloat16 ieee C=256 keys=256 64x64 attention_query_gradients": 256,
    },
    120: {
        "tf32 C=128 keys=128 64x64 attention_query_gradients": 512,
        "tf32 C=256 keys=256 64x64": 448,
        "bfloat16 ieee C=256 keys=256 64x64 attention_forward": 2432,
        "bfloat16 ieee C=256 keys=256 64x64 attention_query_gradients": 768,
    },
}
"""And on these capabilities, where the compiler leaves more of them there."""

ALL = {capability: "" for capability in SHARED}
SOME = {86: "", 100: "C=(?!128|256)"}
"""What is compiled by default: capabilities, and a regular expression of names."""

COMPILED = ALL if os.environ.get("FASTSAM_TEST_ALL_ARCHITECTURES") == "1" else SOME


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", COMPILED)
def test_machine_code(cache, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead_of_time.py"), str(capability), COMPILED[capability]],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) > 20
    allowed = [*STACK.items(), *STACK_ON.get(capability, {}).items()]
    for kernel in kernels:
        most = max((size for part, size in allowed if part in kernel["name"]), default=0)
        assert kernel["stack"] <= most, kernel
        assert kernel["shared"] <= 1024 * SHARED[capability], kernel
        assert kernel["tensor_cores"] or not kernel["wanted"], kernel
