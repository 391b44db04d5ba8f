"""Stopwatches: one lap of a function, in seconds."""

import time
from collections.abc import Callable

import torch

Stopwatch = Callable[[Callable[[], object]], float]


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch for work on this device."""
    return _CudaStopwatch(device) if device.type == "cuda" else _wall_clock


def _wall_clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class _CudaStopwatch:
    """Times with events, from a cache that holds nothing of the function's data.

    Overwriting a buffer larger than the L2 clears it, and keeps the device busy while the function's first kernels are
    queued: a short function is not charged for the gap before its first launch.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._sweep = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        self._sweep.zero_()
        self._start.record()
        function()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000
