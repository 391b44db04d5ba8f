"""Measures the peak memory of SAM, forward and backward, against N and against the batch."""

from typing import Any

import pytest

from benchmarks import floors, machine, report
from benchmarks.cases import Case
from benchmarks.memory import peak_bytes
from benchmarks.peers import peers
from benchmarks.run import Run

pytestmark = pytest.mark.timeout(0)


def test_memory(memory_case: Case, run: Run, benchmark: Any) -> None:
    """pytest-benchmark sees the time of the measurement, which says nothing; the bytes are in extra_info.

    What is compiled is measured on a GPU only: compiling would grow the resident set more than the call does.
    """
    case = memory_case
    compiled = ("default",) if run.device.type == "cuda" else ()
    found = [
        peer
        for peer in peers(case, run.device, run.dtype)
        if case.models[0] in peer.models and peer.backend is None and peer.compile_mode in (None, *compiled)
    ]
    peaks: dict[str, float] = {}
    left_out: dict[str, str] = {}

    def measure() -> None:
        for peer in found:
            fits = floors.quadratic_bytes(case, run.dtype.itemsize) < 0.9 * machine.available_bytes(run.device)
            if peer.quadratic and not fits:
                left_out[peer.name] = "its N x N matrices do not fit"
                continue
            peaks[peer.name] = peak_bytes(peer, case, run.device, run.dtype)

    benchmark.group = "peak memory"
    benchmark.pedantic(measure, rounds=1)
    record = report.memory_record(case, peaks, left_out)
    benchmark.extra_info.update(record)
    run.records.append(record)
