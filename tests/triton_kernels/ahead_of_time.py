"""Compiles the Triton kernels for a capability without a card, and prints what the machine code uses, as JSON lines.

    python tests/triton_kernels/ahead_of_time.py 86 [REGULAR EXPRESSION of names]

A program of its own because Triton decides when kernels are decorated whether they are interpreted, as in the tests.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent))

from aot_attention import aot_cases as attention_cases
from aot_gates import aot_cases as gates_cases

TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


def compiled(case: Any, capability: int) -> dict[str, Any]:
    """The machine code of a case in numbers: registers, bytes of stack and shared memory, tensor cores."""
    source = ASTSource(case.kernel, case.signature, case.constants, case.attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "name": case.name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "tensor_cores": TENSOR_CORES.search(kernel.asm["ptx"]) is not None,
        "wanted": case.tensor_cores,
    }


def main(capability: int, pattern: str = "") -> None:
    for case in [*attention_cases(), *gates_cases()]:
        if re.search(pattern, case.name):
            print(json.dumps(compiled(case, capability)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
