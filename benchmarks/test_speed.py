"""Times the variants of every case together: each is first checked against eager in the same process."""

import gc
import time
from typing import Any

import pytest
import torch

from benchmarks import cases, floors, machine, report
from benchmarks.cases import Case
from benchmarks.peers import EAGER, FASTSAM, peers
from benchmarks.run import Run
from benchmarks.variants import Results, Variant, assert_same, draw_parameters, tolerance

pytestmark = pytest.mark.timeout(0)

MIN_ROUNDS, MAX_ROUNDS = 3, 50


def test_speed(speed_case: Case, run: Run, benchmark: Any) -> None:
    """Rounds of one lap of every variant; the lap that pytest-benchmark sees is that of the last, fastsam.

    The first round warms up. It counts where laps are so long that the check before it was warming enough.
    """
    case = speed_case
    needed, available = floors.quadratic_bytes(case, run.dtype.itemsize), machine.available_bytes(run.device)
    if needed > 0.9 * available:
        pytest.skip(f"eager needs about {needed / 2**30:.1f} GiB for {case}, {available / 2**30:.1f} GiB are available")
    torch.compiler.reset()
    variants, left_out = _checked_variants(case, run)
    laps: list[list[float]] = [[] for _ in variants]

    def lap(index: int) -> None:
        laps[index].append(run.stopwatch(variants[index].lap))

    last = len(variants) - 1

    def others() -> None:
        for index in range(last):
            lap(index)

    others()
    lap(last)
    first_round = sum(times[0] for times in laps)
    if first_round < run.budget:
        for times in laps:
            times.clear()
    rounds = max(MIN_ROUNDS - len(laps[0]), min(MAX_ROUNDS, int(run.budget / first_round)))
    benchmark.group = f"{case.group}, {case.direction}"
    benchmark.pedantic(lap, (last,), setup=others, rounds=rounds)
    record = report.speed_record(
        case,
        variants=[
            report.variant_record(
                variant.peer.name, variant.model, times, floors.work(variant.model, case, run.dtype.itemsize)
            )
            for variant, times in zip(variants, laps, strict=True)
        ],
        left_out=left_out,
    )
    benchmark.extra_info.update(record)
    run.records.append(record)


def _checked_variants(case: Case, run: Run) -> tuple[list[Variant], dict[str, str]]:
    """The variants that give eager's outputs and gradients, fastsam last; those left out, with the reason."""
    inputs = cases.inputs(case, run.device, run.dtype)
    found = peers(case, run.device, run.dtype)
    variants: list[Variant] = []
    left_out: dict[str, str] = {}
    for model in case.models:
        expected: Results = {}
        parameters = draw_parameters(found[0].module(model, case))
        for peer in (peer for peer in found if model in peer.models):
            if peer.compile_mode is not None and time.monotonic() > run.compile_until:
                left_out[peer.name] = "no time left to compile"
                continue
            variant = Variant(peer, model, case, parameters, inputs)
            try:
                results = variant.results()
            except Exception as error:
                if peer.compile_mode is None:
                    raise
                left_out[peer.name] = f"{type(error).__name__} while compiling {model}"
                continue
            expected = expected or results
            assert_same(results, expected, tolerance(run.dtype), f"{peer.name}, {model}, {case}")
            variants.append(variant)
            del results
            gc.collect()
    assert variants[0].peer.name == EAGER and variants[-1].peer.name == FASTSAM
    return variants, left_out
