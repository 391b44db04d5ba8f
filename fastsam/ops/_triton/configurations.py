"""Tile sizes of the Triton kernels: those that were measured on this kind of card, else a safe default.

A kernel names its candidates, few and in code, the first being the default. What `python -m fastsam tune` finds on a
card goes into a file of the user's; tuned.json beside this module holds what the project has measured. Looking one up
never measures anything. Where a card has no room for the tiles, the other candidates are tried, once.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsam import fastest
from fastsam.ops._triton.launch import padded

Configuration = dict[str, int]
"""Sizes of tiles, by the names of the kernel's constants, and num_warps and num_stages. Not to be changed."""

COMMITTED = Path(__file__).with_name("tuned.json")

MOST_PROBLEMS = 4096
"""So many problems are remembered: a program has a few dozen, but one whose maps have ever new sizes must not grow."""

MOST_CHANNELS = 256
"""Of maps and of queries. A program of the attention has all of them of its rows in registers and of its columns in
shared memory, one of the separable gates' backward pass the gates of all. The forward pass of those alone could serve
more, but a model that runs and does not train would be a surprise."""

Result = TypeVar("Result")


class Asked(NamedTuple):
    """What was asked for last for a problem: a kernel, its candidates, and what launches it alone."""

    kernel: str
    candidates: Sequence[Configuration]
    launch: Callable[[Configuration], Any]


class DoesNotFitError(RuntimeError):
    """A card has no room for any of a kernel's candidates, or there are none for so large a problem."""


_forced: dict[str, Configuration] = {}
_recording: dict[str, Asked] | None = None
_fitting: dict[str, Configuration] = {}
"""By problem the candidate that a card has room for, where it is not the one that would be chosen."""


def check_channels(operator: str, channels: int, queries: int | None = None) -> None:
    """Refuse what the kernels have no tiles for.

    Args:
        operator: its name.
        channels, queries: channels of the maps and, where there are any, of the queries.

    Raises:
        DoesNotFitError: there are more than 256.
    """
    if max(channels, queries or 0) <= MOST_CHANNELS:
        return
    of_queries = "" if queries is None else f" and the queries {queries}"
    raise DoesNotFitError(
        f"fastsam.{operator}: the Triton kernels have tiles for up to {MOST_CHANNELS} channels, these maps have "
        f'{channels}{of_queries}; use another back end: `with fastsam.backend("eager"):`'
    )


def user_file() -> Path:
    """Where the results of tuning on this machine are kept: FASTSAM_CACHE, or .cache/fastsam in the home folder."""
    folder = os.environ.get("FASTSAM_CACHE") or "~/.cache/fastsam"
    return Path(os.path.expanduser(folder)) / "triton.json"


def configuration(
    kernel: str, like: Tensor, sizes: tuple[int, ...], candidates: Sequence[Configuration]
) -> Configuration:
    """The tile sizes for a kernel on maps like this one (B, C, H, W).

    Args:
        kernel: its name.
        like: a map whose device, dtype and number of positions matter.
        sizes: further numbers that the speed depends on, such as channels; from 16 on each counts as the next power of
            two.
        candidates: those that fit this problem, the safe one first.
    """
    if kernel in _forced:
        return _forced[kernel]
    key = problem(kernel, like, sizes)
    best = _fitting.get(key) or _tuned().get(key)
    return candidates[0] if best is None or best not in candidates else best


def launched(
    operator: str,
    kernel: str,
    like: Tensor,
    sizes: tuple[int, ...],
    candidates: Sequence[Configuration],
    launch: Callable[[Configuration], Result],
) -> Result:
    """What `launch` returns with the tile sizes for a kernel; see `configuration`.

    Where the card has no room for them the other candidates are tried, the safe one first, and what fits is kept in
    mind for further calls.

    Raises:
        DoesNotFitError: the card has no room for any candidate.
    """
    if _recording is not None:
        _recording[problem(kernel, like, sizes)] = Asked(kernel, candidates, launch)
    choice = configuration(kernel, like, sizes, candidates)
    try:
        return launch(choice)
    except Exception as error:
        if kernel in _forced or not _lacks_room(error):
            raise
        refused = error
    for candidate in candidates:
        if candidate != choice:
            try:
                result = launch(candidate)
            except Exception as error:
                if not _lacks_room(error):
                    raise
                continue
            _fitting[problem(kernel, like, sizes)] = candidate
            return result
    raise DoesNotFitError(_does_not_fit(operator, kernel, like, choice, refused)) from refused


def _lacks_room(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def _does_not_fit(operator: str, kernel: str, like: Tensor, choice: Configuration, error: Any) -> str:
    tiles = ", ".join(f"{name}={size}" for name, size in choice.items())
    return (
        f"fastsam.{operator}: the Triton kernel {kernel} has no tile sizes that fit this card, of capability "
        f"{_capability(like.device)}, on maps {tuple(like.shape)} in {fastest.arithmetic_name(like.dtype)}: with "
        f"{tiles} it needs {error.required} of {error.name}, and there are {error.limit}. Use fewer channels, maps in "
        'bfloat16 or float16, or another back end: `with fastsam.backend("eager"):`'
    )


def problem(kernel: str, like: Tensor, sizes: tuple[int, ...]) -> str:
    """The name of a class of problems: kernel, capability, arithmetic, sizes and positions."""
    return _problem(kernel, like.device, fastest.arithmetic_name(like.dtype), (*sizes, like.shape[2] * like.shape[3]))


@functools.lru_cache(MOST_PROBLEMS)
def _problem(kernel: str, device: torch.device, kind: str, sizes: tuple[int, ...]) -> str:
    numbers = "-".join(str(size if size < 16 else padded(size)) for size in sizes)
    return f"{kernel} {_capability(device)} {kind} {numbers}"


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
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"fastsam: {file} is not JSON in UTF-8 ({error}); delete it") from None
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
def recorded() -> Iterator[dict[str, Asked]]:
    """What is asked for inside of the `with` block, by problem, in this order."""
    global _recording
    asked: dict[str, Asked] = {}
    _recording = asked
    try:
        yield asked
    finally:
        _recording = None


def distinct(candidates: Iterator[Configuration]) -> tuple[Configuration, ...]:
    """The candidates, each once: on small problems some have the same tiles."""
    result: list[Configuration] = []
    for candidate in candidates:
        if candidate not in result:
            result.append(candidate)
    return tuple(result)


def forget() -> None:
    """Read the files of results again at the next look-up, and forget what did not fit."""
    _tuned.cache_clear()
    _fitting.clear()
