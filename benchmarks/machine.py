"""The machine a report is about: its parts, its software, and the rates it reaches."""

import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastsam
from benchmarks.timing import stopwatch


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a reader has to know about a report; JSON-able. The load is that of the moment of the call."""
    cuda = device.type == "cuda"
    return {
        "name": name(device),
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": _nvidia("driver_version") if cuda else None,
        "clocks": _nvidia("clocks.sm,clocks.max.sm,clocks.mem,power.limit") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastsam": fastsam.__version__,
        "instruction_set": fastsam.info().instruction_set,
        "commit": _commit(),
    }


def name(device: torch.device) -> str:
    """A name for files: the GPU, or the processor and the number of usable cores."""
    text = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_model()} {_usable_cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches in good library code, a yardstick for the floors: operations and bytes a second.

    On a CPU the operations are those of a 5x5 convolution 128 -> 256, on a GPU those of a matrix product.
    """
    timer = stopwatch(device)
    if device.type == "cuda":
        size = 8192
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        flops, product = 2.0 * size**3, lambda: a @ b
    else:
        x, weight = torch.randn(8, 128, 32, 32, dtype=dtype), torch.randn(256, 128, 5, 5, dtype=dtype)
        flops, product = 2.0 * 25 * 128 * 256 * 8 * 32 * 32, lambda: F.conv2d(x, weight, padding=2)
    source = torch.ones(2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median_of(function: Any) -> float:
        function()
        return statistics.median(timer(function) for _ in range(7))

    return {
        "flops": flops / median_of(product),
        "bytes": 2.0 * source.numel() / median_of(lambda: target.copy_(source)),
    }


def available_bytes(device: torch.device) -> float:
    """Memory that a process could still take."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    (kilobytes,) = re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return 1024.0 * int(kilobytes)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _nvidia(query: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it fails, prints nothing, or does not exist."""
    root = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else None
