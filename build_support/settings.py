"""The environment variables that steer the build, and the record of what it did."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class Unavailable(Exception):
    """A part of the build that this machine cannot make; the message is the reason in words."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    jobs: objects compiled at the same time (MAX_JOBS, by default the number of usable processors).
    skip_native: build nothing, the eager back end serves (FASTSAM_SKIP_NATIVE).
    skip_cuda: leave the CUDA part out (FASTSAM_SKIP_CUDA).
    force_cuda: a CUDA part that cannot be built is an error (FASTSAM_FORCE_CUDA).
    """

    jobs: int
    skip_native: bool
    skip_cuda: bool
    force_cuda: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read the settings.

        Raises:
            ValueError: MAX_JOBS is no positive number, or CUDA is both forced and skipped.
        """
        settings = cls(
            jobs=_jobs(environment.get("MAX_JOBS", "")),
            skip_native=_flag(environment, "FASTSAM_SKIP_NATIVE"),
            skip_cuda=_flag(environment, "FASTSAM_SKIP_CUDA"),
            force_cuda=_flag(environment, "FASTSAM_FORCE_CUDA"),
        )
        if settings.force_cuda and (settings.skip_cuda or settings.skip_native):
            skipped = "FASTSAM_SKIP_CUDA" if settings.skip_cuda else "FASTSAM_SKIP_NATIVE"
            raise ValueError(f"FASTSAM_FORCE_CUDA and {skipped} are both set, unset one of them")
        return settings


def _flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"{name} is {value!r}, it must be 1 or 0")


def _jobs(text: str) -> int:
    if not text.strip():
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.strip().isdecimal() or int(text) == 0:
        raise ValueError(f"MAX_JOBS is {text!r}, it must be a positive number")
    return int(text)


@dataclass
class Report:
    """What was built and why not: printed line by line, and kept beside the extension, because pip hides the output."""

    parts: dict[str, dict[str, object]] = field(default_factory=dict)

    def built(self, part: str, text: str, **facts: object) -> None:
        """Record a part that is there."""
        self._add(part, True, text, facts)

    def skipped(self, part: str, reason: str) -> None:
        """Record a part that is not there."""
        self._add(part, False, f"skipped, {reason}", {})

    def _add(self, part: str, built: bool, text: str, facts: dict[str, object]) -> None:
        self.parts[part] = {"built": built, "text": text, **facts}
        print(f"fastsam: {part}: {text}", file=sys.stderr, flush=True)

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.parts, indent=2) + "\n", encoding="utf-8")
