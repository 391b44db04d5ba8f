"""Tile sizes of the Triton kernels: those that were measured on this kind of card, else a safe default.

A kernel names its candidates, few and in code, the first being the default. What `python -m fastsam tune` finds on a
card goes into a file of the user's; tuned.json beside this module holds what the project has measured. Looking one up
never measures anything.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsam.fastest import arithmetic
from fastsam.ops._triton.launch import padded

Configuration = dict[str, int]
"""Sizes of tiles, by the names of the kernel's constants, and num_warps and num_stages."""

COMMITTED = Path(__file__).with_name("tuned.json")

Asked = dict[str, tuple[str, Sequence[Configuration]]]
"""Of each kernel the problem that it was last asked for, and its candidates."""

_forced: dict[str, Configuration] = {}
_asked: Asked = {}


def user_file() -> Path:
    """Where the results of tuning on this machine are kept: FASTSAM_CACHE, or .cache/fastsam in the home folder."""
    folder = os.environ.get("FASTSAM_CACHE") or os.path.expanduser("~/.cache/fastsam")
    return Path(folder) / "triton.json"


def configuration(
    kernel: str, like: Tensor, sizes: Sequence[int], candidates: Sequence[Configuration]
) -> Configuration:
    """The tile sizes for a kernel on maps like this one (B, C, H, W).

    Args:
        kernel: its name.
        like: a map whose device, dtype and number of positions matter.
        sizes: further numbers that the speed depends on, such as channels; from 16 on each counts as the next power of
            two.
        candidates: those that fit this problem, the safe one first.
    """
    key = problem(kernel, like, sizes)
    _asked[kernel] = (key, candidates)
    if kernel in _forced:
        return _forced[kernel]
    return next((candidate for candidate in candidates if candidate == _tuned().get(key)), candidates[0])


def problem(kernel: str, like: Tensor, sizes: Sequence[int]) -> str:
    """The name of a class of problems: kernel, capability, arithmetic, sizes and positions."""
    sizes = (*sizes, like.shape[2] * like.shape[3])
    numbers = "-".join(str(size if size < 16 else padded(size)) for size in sizes)
    return f"{kernel} {_capability(like.device)} {arithmetic(like.dtype)} {numbers}"


@functools.cache
def _capability(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@functools.cache
def _tuned() -> dict[str, Any]:
    """What is known of all problems; the user's own results go before the committed ones."""
    return {**read(COMMITTED), **read(user_file())}


def read(file: Path) -> dict[str, Any]:
    """The results in a file, {} where there is none that can be read.

    Raises:
        ValueError: the file does not hold what tuning writes.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return {}
    try:
        results = json.loads(text)
    except ValueError as error:
        raise ValueError(f"fastsam: {file} is not JSON ({error}); delete it, or run `python -m fastsam tune`") from None
    if not isinstance(results, dict):
        raise ValueError(f"fastsam: {file} must hold an object of tuning results; delete it")
    return results


@contextmanager
def forced(kernel: str, choice: Configuration) -> Iterator[None]:
    """Use these tile sizes for the kernel inside of the `with` block."""
    _forced[kernel] = choice
    try:
        yield
    finally:
        del _forced[kernel]


@contextmanager
def recorded() -> Iterator[Asked]:
    """What is asked for inside of the `with` block."""
    _asked.clear()
    yield _asked


def forget() -> None:
    """Read the files of results again at the next look-up."""
    _tuned.cache_clear()
