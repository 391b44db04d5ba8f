"""The one exception that the command line turns into a single line and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class InputError(Exception):
    """A file, option or configuration given by the user cannot be used; the message says which, why, and what to do."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Lightning's complaints about accelerator, devices and precision as errors of the input."""
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        raise InputError(f"training.accelerator, devices or precision: {' '.join(str(error).split())}") from error
