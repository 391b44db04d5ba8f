"""Training, validation and test sequences for Lightning; the order of training is a function of the global step."""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training import digits as digit_sources
from training.config import Config, DataConfig
from training.moving_mnist import TEST, TEST_FILE, TEST_SHAPE, TRAIN, VALIDATION, MovingMNIST, MovingMNISTFile


class StepBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers: step s takes samples s*batch_size to (s+1)*batch_size - 1, each rank its own part.

    The batch of a step depends on nothing else, so a resumed run continues with the batch it would have had.

    Args:
        batch_size: samples in a step, over all ranks.
        steps: steps of the whole run.
        start: first step to serve.
        rank, ranks: the part of each batch to serve.
    """

    def __init__(self, batch_size: int, steps: int, start: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.batch_size, self.steps, self.start, self.rank, self.ranks = batch_size, steps, start, rank, ranks

    def __len__(self) -> int:
        # Lightning adds the batches done before a resume to those it fetches, and compares with this.
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.ranks
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * share
            yield list(range(first, first + share))


class SequenceData(pl.LightningDataModule):
    """MovingMNIST as the data section asks for it. Batches are (B, frames, 1, H, W) float32 in [0, 1].

    Args:
        config: the whole configuration.

    Raises:
        InputError: if a data file is missing or damaged.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.digits = digit_sources.load(config.data)
        self.test_set, self.test_description = make_test_set(config.data, self.digits)

    def train_dataloader(self) -> DataLoader[Tensor]:
        training, workers = self.config.training, self.config.data.workers
        sequences = self._generated(self.digits.train, training.iterations * training.batch_size, TRAIN)
        batches = StepBatchSampler(
            training.batch_size,
            training.iterations,
            self.trainer.global_step,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return DataLoader(sequences, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0)

    def val_dataloader(self) -> DataLoader[Tensor]:
        sequences = self._generated(self.digits.validation, self.config.data.validation_sequences, VALIDATION)
        return self._in_order(sequences, self.trainer.global_rank, self.trainer.world_size)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._in_order(self.test_set)

    def _generated(self, images, length: int, stream: int) -> MovingMNIST:
        return generated(self.config.data, images, length, self.config.data.seed, stream)

    def _in_order(self, sequences: Dataset[Tensor], rank: int = 0, ranks: int = 1) -> DataLoader[Tensor]:
        numbers = range(rank, len(sequences), ranks)
        return DataLoader(sequences, batch_size=self.config.results.batch_size, sampler=numbers)


def generated(config: DataConfig, images, length: int, seed: int, stream: int) -> MovingMNIST:
    """Sequences of the configured length, size and number of digits, made from `images`."""
    frames = config.input_frames + config.horizon
    return MovingMNIST(
        images, length, seed=seed, stream=stream, frames=frames, size=config.image_size, count=config.digits
    )


def make_test_set(config: DataConfig, digits: digit_sources.Digits) -> tuple[Dataset[Tensor], dict[str, str | int]]:
    """Test sequences and the facts about them that belong into a report.

    MNIST's are those of mnist_test_seq.npy if the file is there and holds what is asked for; otherwise they are
    generated from the test digits under data.test_seed.
    """
    frames = config.input_frames + config.horizon
    facts: dict[str, str | int] = {"digits": digits.description}
    file = Path(config.root or "") / TEST_FILE
    fits = frames <= TEST_SHAPE[0] and config.image_size == TEST_SHAPE[2] and config.digits == 2
    if digits.name == "mnist" and config.root is not None and file.is_file():
        if fits:
            fixed = MovingMNISTFile(file, config.test_sequences, frames)
            return fixed, facts | {"test set": str(file), "sequences": len(fixed)}
        facts["note"] = f"{file} is not used: it holds 20 frames of 64x64 with two digits"
    made = generated(config, digits.test, config.test_sequences, config.test_seed, TEST)
    facts |= {"test set": "generated from the test digits", "test seed": config.test_seed, "sequences": len(made)}
    return made, facts
