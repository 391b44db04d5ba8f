"""Fixtures of the training tests: small MNIST files, a tiny configuration, the command line."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TINY, idx_bytes

from training.cli import main


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A directory with small IDX files, the training part compressed."""
    root = tmp_path / "mnist"
    root.mkdir()
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(24)))
    (root / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(10))
    return root


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Runs a subcommand on the tiny configuration in `tmp_path`; later options override earlier ones."""

    def call(command: str, *options: str) -> int:
        return main([command, *TINY, f"--training.run_dir={tmp_path / 'run'}", *options])

    return call
