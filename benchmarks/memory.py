"""Peak memory of a call beyond its inputs and parameters.

On a GPU the allocator counts it. On a CPU it is what the resident set of a fresh process grows by during the call; this
file is that process: `python -m benchmarks.memory '{"peer": ..., ...}'` prints the bytes.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import Peer, peers
from benchmarks.variants import Variant, draw_parameters

ROOT = Path(__file__).resolve().parent.parent


def peak_bytes(peer: Peer, case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """Measure a peer's peak memory in a case.

    Raises:
        RuntimeError: the fresh process failed; the message ends with what it printed.
    """
    if device.type == "cuda":
        return _on_gpu(peer, case, device, dtype)
    request = {"peer": peer.name, "dtype": str(dtype).removeprefix("torch."), "case": dataclasses.asdict(case)}
    # Freed blocks go back to the system at once: the resident set is what is held, not what was.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of {peer.name} in {case} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout)


def _on_gpu(peer: Peer, case: Case, device: torch.device, dtype: torch.dtype) -> float:
    variant = _variant(peer, case, device, dtype)
    variant.lap()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.lap()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated(device) - before)


def _on_cpu(peer: Peer, case: Case, dtype: torch.dtype) -> float:
    """A lap on a small map comes first: libraries and threads are loaded before the measurement."""
    device = torch.device("cpu")
    _variant(peer, dataclasses.replace(case, size=8, batch=1), device, dtype).lap()
    variant = _variant(peer, case, device, dtype)
    forget_peak()
    before = peak_resident()
    variant.lap()
    return float(peak_resident() - before)


def _variant(peer: Peer, case: Case, device: torch.device, dtype: torch.dtype) -> Variant:
    (model,) = case.models
    parameters = draw_parameters(peer.module(model, case))
    return Variant(peer, model, case, parameters, cases.inputs(case, device, dtype))


def forget_peak() -> None:
    """Set Linux's record of the peak back to what is resident now, where it lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The peak of this process's resident set so far, in bytes.

    getrusage serves other systems than Linux, where it would also count the process that started this one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(request: dict[str, Any]) -> None:
    case, dtype = Case(**request["case"]), getattr(torch, request["dtype"])
    (peer,) = (peer for peer in peers(case, torch.device("cpu"), dtype) if peer.name == request["peer"])
    print(_on_cpu(peer, case, dtype))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
