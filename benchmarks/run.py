"""What the benchmarks of one run share."""

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.timing import Stopwatch


@dataclass
class Run:
    """One run of the benchmarks.

    compile_until: on time.monotonic(), after which no more variants are compiled. budget: seconds of timing a case.
    machine: `benchmarks.machine.facts`, with "rates". records: what is reported.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool
    compile_until: float
    budget: float
    machine: dict[str, Any]
    stopwatch: Stopwatch
    records: list[dict[str, Any]] = field(default_factory=list)
