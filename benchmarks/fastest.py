"""`python -m benchmarks.fastest RESULTS.json ...`: the lines of fastsam/fastest.txt, by which `auto` goes on a card."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases import ATTENTION, GATES, LSTM_GATES
from benchmarks.peers import FASTSAM
from benchmarks.report import ReportError, load

OPERATORS = {
    ATTENTION: ("double_attention", "self_attention"),
    GATES: ("separable_gates",),
    LSTM_GATES: ("lstm_gates", "memory_gates", "norm_gate"),
}
"""The operators that a group times alone, forward and backward. One source is taken to be as two, and the other gates
as those of the LSTM, whose kernels they share."""

PREFIX = f"{FASTSAM} "


def lines(path: Path) -> Iterator[str]:
    """One line for each operator and size in a file of results.

    Raises:
        ReportError: the results cannot be used, or are not of a card.
    """
    results = load(path)
    capability = results.machine.get("capability")
    if capability is None:
        raise ReportError(f"{path} holds measurements on {results.machine['name']}, which is not a CUDA device")
    kind = results.machine["dtype"]
    if kind == "float32" and results.machine["matmul_precision"] != "highest":
        kind = "tf32"
    for record in results.records:
        if record["kind"] != "speed" or not record["backward"]:
            continue
        for operator in OPERATORS.get(record["group"], ()):
            medians = {
                variant["peer"].removeprefix(PREFIX): variant["median_ms"]
                for variant in record["variants"]
                if variant["peer"].startswith(PREFIX)
            }
            order = ",".join(sorted(medians, key=medians.__getitem__))
            yield f"{capability} {operator} {kind} {record['size'] ** 2} {order} {path.name}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fastest", description="Print the lines of fastsam/fastest.txt."
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON of full runs on cards")
    options = parser.parse_args(arguments)
    try:
        for path in options.results:
            print(*dict.fromkeys(lines(path)), sep="\n")
    except ReportError as error:
        print(f"benchmarks.fastest: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
