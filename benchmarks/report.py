"""Turns the measurements of a run into tables and plots.

    python -m benchmarks.report [RESULTS.json] [--out FOLDER]    the tables as markdown, and the plots
    python -m benchmarks.report [RESULTS.json] --readme [FILE]   the table and plot of the README, between its markers

Without a file the newest full run in benchmarks/results is taken.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cases import Case
from benchmarks.floors import Work

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"
QUICK = "-quick"
"""The end of the names of quick runs."""

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


class ReportError(Exception):
    """A report cannot be written; the message says what is wrong with which file."""


@dataclass(frozen=True)
class Results:
    """A finished run. machine: `benchmarks.machine.facts` with "rates". records: as made below. date: ISO, UTC."""

    machine: dict[str, Any]
    records: list[Record]
    date: str


def variant_record(peer: str, model: str, laps: list[float], work: Work) -> Record:
    """One timed variant: its laps in seconds, kept in ms, and the least work they needed."""
    milliseconds = [round(1000 * lap, 5) for lap in laps]
    return {
        "peer": peer,
        "model": model,
        "median_ms": statistics.median(milliseconds),
        "laps_ms": milliseconds,
        "flops": work.flops,
        "bytes": work.bytes,
    }


def speed_record(case: Case, variants: list[Record], left_out: dict[str, str]) -> Record:
    """One timed case. left_out: the peers that were not timed, and why."""
    return {"kind": "speed", **asdict(case), "direction": case.direction, "variants": variants, "left_out": left_out}


def memory_record(case: Case, peaks: dict[str, float], left_out: dict[str, str]) -> Record:
    """The peak bytes of each peer in a case."""
    return {"kind": "memory", **asdict(case), "direction": case.direction, "peaks": peaks, "left_out": left_out}


def load(path: Path) -> Results:
    """Read the JSON that a run wrote.

    Raises:
        ReportError: there is no such file, or it is not from these benchmarks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine_info"]["fastsam"]
        records = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        date = content["datetime"]
    except OSError as error:
        raise ReportError(f"cannot read the results {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} holds no results of these benchmarks ({error!r})") from error
    if not records:
        raise ReportError(f"{path} holds no measurements: every benchmark of that run failed or was left out")
    return Results(machine, records, date)


def newest(folder: Path) -> Path:
    """The results of the latest run in a folder, quick runs aside.

    Raises:
        ReportError: there are none.
    """
    paths = [path for path in folder.glob("*.json") if not path.stem.endswith(QUICK)]
    if not paths:
        raise ReportError(f"there are no results of a full run in {folder}: run `make bench` first, or name a file")
    return max(paths, key=lambda path: load(path).date)


def text(machine: dict[str, Any], records: list[Record]) -> str:
    """The report of a run as markdown that is also readable as it is."""
    return "\n\n".join([tables.conditions(machine), *tables.all_tables(machine, records), tables.notes(records)])


def write(path: Path, folder: Path) -> list[Path]:
    """Write the report and the plots of the results in `path` to a folder, under the name of that file.

    Raises:
        ReportError: the results cannot be used.
    """
    from benchmarks import plots

    results = load(path)
    folder.mkdir(parents=True, exist_ok=True)
    markdown, image = folder / f"{path.stem}.md", folder / f"{path.stem}.png"
    plots.draw(results.records, image)
    title = f"# Benchmarks, {results.date[:10]}"
    markdown.write_text(
        f"{title}\n\n{text(results.machine, results.records)}\n\n![plots]({image.name})\n", encoding="utf-8"
    )
    return [markdown, image]


def update_readme(path: Path, readme: Path) -> None:
    """Replace what stands between the two markers of a README by the tables and the plot of the results in `path`.

    Raises:
        ReportError: the results cannot be used, or the README has no markers.
    """
    results = load(path)
    try:
        old = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot read {readme}: {error.strerror}") from error
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"{readme} needs the lines {BEGIN} and {END}, in this order, around the place of the table")
    _, image = write(path, path.parent)
    link = Path(os.path.relpath(image, readme.resolve().parent)).as_posix()
    parts = [tables.conditions(results.machine), *tables.highlights(results.records), f"![Benchmarks]({link})"]
    readme.write_text(before + begin + "\n" + "\n\n".join(parts) + "\n" + end + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Report benchmark results.")
    parser.add_argument(
        "results", nargs="?", type=Path, help="JSON of a run; the newest full run in benchmarks/results if none"
    )
    parser.add_argument("--out", type=Path, help="folder to write to; by default that of the results")
    parser.add_argument("--readme", nargs="?", type=Path, const=README, help="update this file, by default README.md")
    options = parser.parse_args(arguments)
    try:
        path = options.results or newest(RESULTS)
        if options.readme is not None:
            update_readme(path, options.readme)
            written = [options.readme]
        else:
            written = write(path, options.out or path.parent)
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    for name in written:
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
