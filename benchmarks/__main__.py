"""`python -m benchmarks`: run the benchmarks, and write their results and the report to a folder."""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import machine, report


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        allow_abbrev=False,
        description="Time fastsam against its peers. Writes <machine>-<date>.json, .md and .png.",
        epilog="Other options go to pytest: -k 'SAM and 32x32', --dtype bfloat16, --tf32, --compile-limit SECONDS.",
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder to write to (benchmarks/results)")
    parser.add_argument("--name", help="of the files, in the place of <machine>-<date>")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="small maps, no torch.compile: two minutes on two cores")
    options, rest = parser.parse_known_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch sees no CUDA device here")
    suffix = report.QUICK if options.quick else ""
    name = options.name or f"{machine.name(torch.device(device))}-{datetime.date.today().isoformat()}{suffix}"
    options.out.mkdir(parents=True, exist_ok=True)
    path = (options.out / f"{name}.json").resolve()
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={path}"]
    root = Path(__file__).resolve().parent.parent
    failed = subprocess.run(
        [*command, f"--device={device}", *(["--quick"] if options.quick else []), *rest], cwd=root
    ).returncode
    if not path.exists():
        return failed or 2
    return report.main([str(path)]) or failed


if __name__ == "__main__":
    sys.exit(main())
