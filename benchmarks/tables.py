"""The tables of a report, from its records."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import GROUPS, SAM, TRAINING
from benchmarks.peers import EAGER, FASTSAM

Record = dict[str, Any]
_NOTHING = "–"


def conditions(machine: dict[str, Any]) -> str:
    """The machine and the software, in words."""
    where = machine["gpu"] or machine["cpu"]
    facts = [f"{where}, {machine['threads']} threads on {machine['cores']} cores"]
    if machine["instruction_set"] and not machine["gpu"]:
        facts.append(f"kernels for {machine['instruction_set']}")
    if machine["gpu"]:
        facts.append(f"driver {machine['driver']}, CUDA {machine['cuda']}, clocks and power limit {machine['clocks']}")
    facts.append(f"{machine['dtype']}, matrix products in precision {machine['matmul_precision']!r}")
    facts.append(f"PyTorch {machine['torch']}, fastsam {machine['fastsam']} ({machine['commit'] or 'no commit'})")
    if machine["load_average"]:
        facts.append(f"load average at the start {machine['load_average'][0]}")
    rates = machine.get("rates")
    if rates:
        facts.append(f"library code reaches {rates['flops'] / 1e9:.0f} GFLOP/s and {rates['bytes'] / 1e9:.0f} GB/s")
    return "; ".join(facts) + "."


def all_tables(machine: dict[str, Any], records: Sequence[Record]) -> list[str]:
    """Every table that there are records for, each under its heading."""
    tables = []
    for group in GROUPS:
        for direction in ("forward + backward", "forward"):
            found = [record for record in _speed(records, group) if record["direction"] == direction]
            if not found:
                continue
            make = _training_table if group == TRAINING else _speed_table
            tables.append(f"## {_heading(found[0])}\n\n{make(machine, found)}")
    memory = [record for record in records if record["kind"] == "memory"]
    if memory:
        tables.append(
            f"## Peak memory of {SAM}, forward + backward, beyond inputs and parameters (MiB)\n\n"
            f"{_memory_table(memory)}"
        )
    return tables


def highlights(records: Sequence[Record]) -> list[str]:
    """The short tables of the README: SAM, its memory, and a training iteration, all forward + backward."""
    tables = []
    speed = [record for record in _speed(records, SAM) if record["backward"]]
    largest = {record["size"]: max(r["batch"] for r in speed if r["size"] == record["size"]) for record in speed}
    speed = [record for record in speed if record["batch"] == largest[record["size"]]]
    if speed:
        tables.append(_short_table(f"{SAM}, forward + backward (ms)", speed))
    memory = [record for record in records if record["kind"] == "memory" and record["batch"] == 1]
    if memory:
        tables.append(_memory_table(memory, "Peak memory (MiB)"))
    training = [record for record in _speed(records, TRAINING) if record["backward"]]
    if training:
        tables.append(_training_table(None, training))
    return [*tables, "Medians; ratios to fastsam for SAM, to eager ConvLSTM for the training iteration."]


def peer_names(records: Iterable[Record]) -> list[str]:
    """The peers of all these cases, although not every one has them all: eager first, fastsam last."""
    names = dict.fromkeys(variant["peer"] for record in records for variant in record["variants"])
    return sorted(names, key=lambda name: (name == FASTSAM, name.startswith(FASTSAM), name != EAGER))


def notes(records: Sequence[Record]) -> str:
    """How to read the tables, how steady the laps were, and what is missing."""
    return " ".join(
        [
            "Medians of interleaved laps, and their ratio to fastsam's where no other is named.",
            *_spread(records),
            *_left_out(records),
        ]
    )


def _spread(records: Sequence[Record]) -> list[str]:
    spreads = [
        (quartiles[2] - quartiles[0]) / quartiles[1]
        for record in records
        if record["kind"] == "speed"
        for variant in record["variants"]
        if len(variant["laps_ms"]) >= 3
        for quartiles in [statistics.quantiles(variant["laps_ms"], n=4, method="inclusive")]
    ]
    if not spreads:
        return []
    usual, worst = 100 * statistics.median(spreads), 100 * max(spreads)
    return [f"The middle half of a variant's laps spans {usual:.0f} % of the median as a rule, {worst:.0f} % at worst."]


def _left_out(records: Sequence[Record]) -> list[str]:
    found = []
    for kind in ("speed", "memory"):
        cases = [record for record in records if record["kind"] == kind]
        counts = Counter(entry for record in cases for entry in record["left_out"].items())
        for (peer, reason), count in sorted(counts.items()):
            found.append(f"Left out of {count} of {len(cases)} measurements of {kind}: {peer} ({reason}).")
    return found


def _speed(records: Iterable[Record], group: str) -> list[Record]:
    return [record for record in records if record["kind"] == "speed" and record["group"] == group]


def _heading(record: Record) -> str:
    frames = f" ({record['frames']} + {record['frames']} frames)" if record["frames"] else ""
    ratios = "; ratios to eager ConvLSTM" if record["group"] == TRAINING else ""
    return f"{record['group']}{frames}, {record['direction']}{ratios}"


def _speed_table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """A row a shape: the median of every peer and its ratio to fastsam, what fastsam achieves, and the floor."""
    peers = peer_names(records)
    head = ["map", "batch", *(f"{peer} (ms)" for peer in peers), "achieved", "floor (ms)", "of floor"]
    rows = []
    for record in records:
        medians = {variant["peer"]: variant["median_ms"] for variant in record["variants"]}
        fast = next(variant for variant in record["variants"] if variant["peer"] == FASTSAM)
        cells = [_ratio(medians.get(peer), medians[FASTSAM], peer == FASTSAM) for peer in peers]
        rows.append([_size(record), str(record["batch"]), *cells, *_achieved(machine, fast)])
    return _table(head, rows)


def _achieved(machine: dict[str, Any], variant: Record) -> list[str]:
    """What a variant reaches, the least time at the machine's rates, and that time over the measured one."""
    seconds = variant["median_ms"] / 1000
    work = f"{variant['flops'] / seconds / 1e9:.0f} GFLOP/s"
    if not variant["flops"]:
        work = f"{variant['bytes'] / seconds / 1e9:.1f} GB/s"
    rates = machine["rates"]
    floor = max(variant["flops"] / rates["flops"], variant["bytes"] / rates["bytes"])
    return [work, _number(1000 * floor), f"{100 * floor / seconds:.0f} %"]


def _training_table(machine: dict[str, Any] | None, records: Sequence[Record]) -> str:
    """A row a model and map: the median of every peer and its ratio to eager ConvLSTM; with a machine, the floor."""
    peers = peer_names(records)
    title = "prediction" if records[0]["direction"] == "forward" else "training iteration"
    head = [title, "map", "batch", *(f"{peer} (ms)" for peer in peers)]
    rows = []
    for record in records:
        medians = {(variant["model"], variant["peer"]): variant["median_ms"] for variant in record["variants"]}
        for model in dict.fromkeys(variant["model"] for variant in record["variants"]):
            cells = [_ratio(medians.get((model, peer)), medians["ConvLSTM", EAGER]) for peer in peers]
            row = [model, _size(record), str(record["batch"]), *cells]
            if machine is not None:
                fast = (v for v in record["variants"] if (v["model"], v["peer"]) == (model, FASTSAM))
                row += _achieved(machine, next(fast))
            rows.append(row)
    return _table(head + (["achieved", "floor (ms)", "of floor"] if machine is not None else []), rows)


def _short_table(title: str, records: Sequence[Record]) -> str:
    peers = [peer for peer in peer_names(records) if not peer.startswith(f"{FASTSAM} ")]
    rows = []
    for record in records:
        medians = {variant["peer"]: variant["median_ms"] for variant in record["variants"]}
        cells = [_ratio(medians.get(peer), medians[FASTSAM], peer == FASTSAM) for peer in peers]
        rows.append([f"{_size(record)}, batch {record['batch']}", *cells])
    return _table([title, *peers], rows)


def _memory_table(records: Sequence[Record], title: str = "map") -> str:
    """A row a shape: the peak of every peer, and what fastsam's comes to at a position, constant where it is O(N)."""
    peers = list(dict.fromkeys(peer for record in records for peer in record["peaks"]))
    peers.sort(key=lambda peer: peer == FASTSAM)
    rows = []
    for record in records:
        peaks, positions = record["peaks"], record["batch"] * record["size"] ** 2
        cells = [f"{peaks[peer] / 2**20:.1f}" if peer in peaks else _NOTHING for peer in peers]
        rows.append([_size(record), str(record["batch"]), *cells, f"{peaks[FASTSAM] / positions / 1024:.2f}"])
    return _table([title, "batch", *peers, "fastsam, KiB a position"], rows)


def _size(record: Record) -> str:
    return f"{record['size']}x{record['size']}"


def _ratio(milliseconds: float | None, reference: float, is_reference: bool = False) -> str:
    if milliseconds is None:
        return _NOTHING
    return _number(milliseconds) + ("" if is_reference else f", {milliseconds / reference:.2f}x")


def _number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "0"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns are aligned in plain text too: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    ruler = ["-" * width if not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(head), line(ruler), *map(line, rows)])
