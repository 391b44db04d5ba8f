"""The sequences: pure functions of seed and index, and moving as MovingMNIST's do."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from training.config import DataConfig
from training.data import StepBatchSampler, make_test_set
from training.digits import Digits, embedded_digits
from training.errors import InputError
from training.moving_mnist import TEST, TRAIN, MovingMNIST, MovingMNISTFile, bounce, uniforms

DIGITS = np.random.default_rng(0).integers(1, 256, (9, 28, 28), dtype=np.uint8)


def sequences(length: int = 50, seed: int = 3, stream: int = TRAIN, **options) -> MovingMNIST:
    return MovingMNIST(DIGITS, length, seed=seed, stream=stream, **options)


def test_item_depends_on_seed_stream_and_index_alone():
    forward, backward = sequences(), sequences(length=1000)
    later = {index: backward[index] for index in reversed(range(5))}
    np.random.seed(1)
    for index in range(5):
        assert torch.equal(forward[index], later[index])
    assert not torch.equal(forward[0], forward[1])
    assert not torch.equal(forward[0], sequences(seed=4)[0])
    assert not torch.equal(forward[0], sequences(stream=TEST)[0])


def test_shape_type_and_range():
    item = sequences(frames=7, size=40, count=3)[0]
    assert item.shape == (7, 1, 40, 40) and item.dtype == torch.float32
    assert item.min() == 0 and 0.9 < item.max() <= 1


def test_random_numbers_stay_what_they_are():
    """A seed names a test set: the numbers must not change with a version of anything."""
    numbers = uniforms(seed=7, stream=2, index=5, count=3)
    assert numbers.tolist() == [0.8563856844682307, 0.8173825625393666, 0.9443493262859304]
    many = uniforms(0, 0, 0, 20_000)
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


def test_digits_move_at_constant_velocity_and_turn_at_the_edges():
    np.testing.assert_allclose(bounce(0.5, 0.1, 3), [0.6, 0.7, 0.8])
    np.testing.assert_allclose(bounce(0.85, 0.1, 4), [0.95, 1.0, 0.9, 0.8])
    np.testing.assert_allclose(bounce(0.05, -0.1, 3), [0.0, 0.1, 0.2])
    video = sequences(count=1)[2]
    rows, columns = ([int(torch.nonzero(frame[0].any(dim=d))[0]) for frame in video] for d in (1, 0))
    steps = np.abs(np.diff([rows, columns], axis=1))
    assert steps.max() <= np.ceil(0.1 * 36)
    assert all((frame > 0).sum() == 28 * 28 for frame in video), "a digit left the frame"


def test_digits_are_overlaid_by_maximum():
    bright = np.stack([np.full((28, 28), 200, np.uint8), np.full((28, 28), 100, np.uint8)])
    videos = MovingMNIST(bright, 30, seed=0, stream=TRAIN, size=30)
    for index in range(30):
        assert set((videos[index] * 255).round().unique().tolist()) <= {0.0, 100.0, 200.0}


def test_index_out_of_range():
    with pytest.raises(IndexError, match="50 sequences"):
        sequences()[50]


def test_a_sequence_takes_well_under_a_millisecond():
    data = sequences(length=200)
    best = min(_seconds(data) for _ in range(5))
    assert best / 40 < 1e-3


def _seconds(data: MovingMNIST) -> float:
    start = time.process_time()
    for index in range(40):
        data[index]
    return time.process_time() - start


def test_batches_are_a_function_of_the_step():
    whole = list(StepBatchSampler(4, steps=5))
    assert whole[2] == [8, 9, 10, 11]
    assert list(StepBatchSampler(4, steps=5, start=3)) == whole[3:]
    parts = [list(StepBatchSampler(4, steps=5, rank=rank, ranks=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


@pytest.fixture
def small_test_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("training.moving_mnist.TEST_SHAPE", (20, 6, 64, 64))
    videos = np.random.default_rng(0).integers(0, 256, (20, 6, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", videos)
    return tmp_path / "mnist_test_seq.npy"


def test_fixed_test_file(small_test_file: Path):
    data = MovingMNISTFile(small_test_file, length=4, frames=15)
    assert len(data) == 4 and data[0].shape == (15, 1, 64, 64)
    np.testing.assert_array_equal(data[3].numpy()[:, 0] * 255, np.load(small_test_file)[:15, 3])


@pytest.mark.parametrize("damage", ["truncated", "shape", "type", "text", "empty"])
def test_damaged_test_file(small_test_file: Path, damage: str):
    content = small_test_file.read_bytes()
    if damage == "shape":
        np.save(small_test_file, np.zeros((20, 3, 64, 64), np.uint8))
    elif damage == "type":
        np.save(small_test_file, np.zeros((20, 6, 64, 64), np.float32))
    else:
        small_test_file.write_bytes({"truncated": content[:-1000], "text": b"hello" * 100, "empty": b""}[damage])
    with pytest.raises(InputError, match=f"{small_test_file.name}.*replace it"):
        MovingMNISTFile(small_test_file, length=4, frames=20)


def test_the_test_file_is_preferred_to_a_generated_set(small_test_file: Path):
    digits = Digits(DIGITS, DIGITS, DIGITS, "mnist", "MNIST digits")
    config = DataConfig(root=str(small_test_file.parent), test_seed=5, test_sequences=3)
    data, facts = make_test_set(config, digits)
    assert isinstance(data, MovingMNISTFile) and facts["test set"] == str(small_test_file)
    config.horizon = 20
    data, facts = make_test_set(config, digits)
    assert isinstance(data, MovingMNIST) and facts["test seed"] == 5 and "not used" in facts["note"]


def test_the_generated_test_set_uses_test_digits_and_its_seed():
    digits = embedded_digits()
    data, facts = make_test_set(DataConfig(test_seed=5, test_sequences=3), digits)
    assert data.digits is digits.test and len(data) == 3
    assert facts["test seed"] == 5 and "not MNIST" in facts["digits"]
