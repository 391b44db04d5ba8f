"""MovingMNIST (Srivastava et al., 2015): sequences made on the fly, each a pure function of a seed and its index."""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from training.digits import DIGIT_SIZE
from training.errors import InputError

# Distance a digit covers in a frame, as a part of the free space; that of the published generator.
STEP_LENGTH = 0.1

TEST_FILE = "mnist_test_seq.npy"
TEST_SHAPE = (20, 10_000, 64, 64)


# Independent families of random numbers under one seed.
TRAIN, VALIDATION, TEST, SAMPLING = range(4)


def uniforms(seed: int, stream: int, index: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), a pure function of (seed, stream, index).

    The raw output of a counter-based generator: NumPy keeps it the same over its versions, unlike the methods of
    ``numpy.random.Generator``, so a seed names the same test set everywhere.
    """
    raw = np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def bounce(position: float, velocity: float, frames: int) -> list[float]:
    """Coordinates in [0, 1] after 1 to `frames` steps; an edge cuts the step short and turns the motion round."""
    path = []
    for _ in range(frames):
        position += velocity
        if not 0 < position < 1:
            position, velocity = min(max(position, 0.0), 1.0), -velocity
        path.append(position)
    return path


class MovingMNIST(Dataset[Tensor]):
    """`length` sequences of bouncing digits; item i is (frames, 1, size, size) float32 in [0, 1].

    Args:
        digits: digit images (n, 28, 28) uint8.
        length: number of sequences.
        seed: names the set; item i depends on (digits, seed, stream, i) alone, so the order of access does not matter.
        stream: TRAIN, VALIDATION or TEST, which move differently under the same seed.
        frames: frames of a sequence.
        size: side of a frame, pixels, at least 28.
        count: digits in a sequence, overlaid by maximum.
    """

    def __init__(
        self,
        digits: NDArray[np.uint8],
        length: int,
        *,
        seed: int,
        stream: int,
        frames: int = 20,
        size: int = 64,
        count: int = 2,
    ) -> None:
        self.digits, self.length, self.seed, self.stream = digits, length, seed, stream
        self.frames, self.size, self.count = frames, size, count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside the {self.length} sequences")
        return _as_frames(self.render(index))

    def render(self, index: int) -> NDArray[np.uint8]:
        """Sequence `index` as (frames, size, size) uint8."""
        numbers = uniforms(self.seed, self.stream, index, 4 * self.count).reshape(self.count, 4).tolist()
        free = self.size - DIGIT_SIZE
        video = np.zeros((self.frames, self.size, self.size), np.uint8)
        for which, row, column, angle in numbers:
            image = self.digits[int(which * len(self.digits))]
            rows = bounce(row, STEP_LENGTH * math.sin(2 * math.pi * angle), self.frames)
            columns = bounce(column, STEP_LENGTH * math.cos(2 * math.pi * angle), self.frames)
            for frame, y, x in zip(video, rows, columns, strict=True):
                top, left = int(free * y), int(free * x)
                window = frame[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE]
                np.maximum(window, image, out=window)
        return video


class MovingMNISTFile(Dataset[Tensor]):
    """The fixed test set ``mnist_test_seq.npy``, (20, 10000, 64, 64) uint8; item i is (frames, 1, 64, 64) float32.

    Args:
        path: the file.
        length: use the first `length` sequences.
        frames: use the first `frames` frames, at most 20.

    Raises:
        InputError: if the file is damaged or of another shape or type.
    """

    def __init__(self, path: Path, length: int, frames: int) -> None:
        advice = "replace it, or remove it to use a generated test set"
        try:
            videos = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} cannot be read ({error}): {advice}") from error
        if videos.shape != TEST_SHAPE or videos.dtype != np.uint8:
            raise InputError(f"{path} holds {videos.dtype} {videos.shape}, not uint8 {TEST_SHAPE}: {advice}")
        self.videos = videos[:frames, :length]

    def __len__(self) -> int:
        return self.videos.shape[1]

    def __getitem__(self, index: int) -> Tensor:
        return _as_frames(self.videos[:, index])


def _as_frames(video: NDArray[np.uint8]) -> Tensor:
    """(frames, H, W) uint8 as (frames, 1, H, W) float32 in [0, 1]."""
    return torch.from_numpy(video.astype(np.float32)[:, None] / np.float32(255))
