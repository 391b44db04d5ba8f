"""Sources of digit images: the MNIST IDX files, or the handwritten digits that come with scikit-learn."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pooch
from numpy.typing import NDArray
from skimage.transform import resize
from sklearn.datasets import load_digits

from training.config import DataConfig
from training.errors import InputError

DIGIT_SIZE = 28
IDX_MAGIC = 2051
IDX_HEADER = 16

TRAIN_FILE = "train-images-idx3-ubyte"
TEST_FILE = "t10k-images-idx3-ubyte"
MD5 = {TRAIN_FILE: "f68b3c2dcbeaaa9fbdd348bbdeb94873", TEST_FILE: "9fb629c4189551a2d022fa330f9573f3"}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")

# One digit in twelve of the training part (5,000 of MNIST's 60,000) is held out for validation.
VALIDATION_PART = 12


@dataclass(frozen=True)
class Digits:
    """Digit images (n, 28, 28) uint8 of the three disjoint splits, and a sentence that says where they come from."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    test: NDArray[np.uint8]
    name: str
    description: str


def resolve_source(config: DataConfig) -> Literal["mnist", "digits"]:
    """What data.source=auto stands for."""
    if config.source == "auto":
        return "mnist" if config.root is not None or config.download else "digits"
    return config.source


def load(config: DataConfig) -> Digits:
    """Digit images as the data section asks for them.

    Raises:
        InputError: if a file is missing, damaged, or cannot be fetched.
    """
    if resolve_source(config) == "digits":
        return embedded_digits()
    root = Path(config.root) if config.root is not None else Path(pooch.os_cache("fastsam")) / "mnist"
    if config.download:
        for name in (TRAIN_FILE, TEST_FILE):
            download(name, root)
    train, validation = hold_out(read_idx(find_idx(root, TRAIN_FILE)))
    return Digits(train, validation, read_idx(find_idx(root, TEST_FILE)), "mnist", f"MNIST digits from {root}")


def embedded_digits() -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged to 20x20 and centred in 28x28 as MNIST's are.

    The last fifth is the test part.
    """
    small = load_digits().images / 16.0
    enlarged = resize(small, (len(small), 20, 20), order=3, mode="constant", anti_aliasing=False).clip(0, 1)
    margin = (DIGIT_SIZE - 20) // 2
    images = np.pad((enlarged * 255).round().astype(np.uint8), ((0, 0), (margin, margin), (margin, margin)))
    first_test = len(images) * 4 // 5
    train, validation = hold_out(images[:first_test])
    return Digits(
        train,
        validation,
        images[first_test:],
        "digits",
        "scikit-learn's 8x8 handwritten digits, enlarged (not MNIST: results do not compare with published ones)",
    )


def hold_out(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training digits, and the last one in twelve of them for validation."""
    count = max(1, len(images) // VALIDATION_PART)
    return images[:-count], images[-count:]


def find_idx(root: Path, name: str) -> Path:
    """Path of the IDX file `name`, plain or .gz, in `root`.

    Raises:
        InputError: if there is none.
    """
    if not root.is_dir():
        raise InputError(
            f"MNIST directory {root} does not exist: set data.root to the directory of the IDX files, or "
            "data.download=true to fetch them"
        )
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(
        f"{root} holds neither {name} nor {name}.gz: put the MNIST IDX file there, or set data.download=true"
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Images (n, 28, 28) of an MNIST IDX file, plain or .gz.

    Raises:
        InputError: if the file cannot be read, is not an IDX image file, or is not as long as its header says.
    """
    advice = "replace the file, or remove it and set data.download=true"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): {advice}") from error
    if len(content) < IDX_HEADER:
        raise InputError(f"{path} has {len(content)} bytes, less than the {IDX_HEADER} of an IDX header: {advice}")
    magic, count, rows, columns = np.frombuffer(content, ">u4", 4).tolist()
    if magic != IDX_MAGIC:
        raise InputError(f"{path} is no IDX image file: its magic number is {magic}, not {IDX_MAGIC}: {advice}")
    if (rows, columns) != (DIGIT_SIZE, DIGIT_SIZE):
        raise InputError(f"{path} holds images of {rows}x{columns}, not {DIGIT_SIZE}x{DIGIT_SIZE}: {advice}")
    expected = IDX_HEADER + count * rows * columns
    if len(content) != expected:
        raise InputError(f"{path} has {len(content)} bytes, its header promises {expected} ({count} images): {advice}")
    if count < 2:
        raise InputError(f"{path} holds {count} images, at least 2 are needed: {advice}")
    return np.frombuffer(content, np.uint8, offset=IDX_HEADER).reshape(count, rows, columns)


def download(name: str, root: Path) -> None:
    """Fetch the IDX file `name` into `root` from the first mirror that has it, unless it is there already.

    Raises:
        InputError: if no mirror serves a file of the published checksum.
    """
    if (root / name).is_file() or (root / f"{name}.gz").is_file():
        return
    failures = []
    for mirror in MIRRORS:
        try:
            pooch.retrieve(f"{mirror}{name}.gz", f"md5:{MD5[name]}", fname=f"{name}.gz", path=root)
            return
        except (OSError, ValueError) as error:
            failures.append(f"{mirror}: {error}")
    raise InputError(
        f"{name}.gz could not be fetched ({'; '.join(failures)}): put it into a directory yourself and set data.root, "
        "or use data.source=digits, which needs no files"
    )
