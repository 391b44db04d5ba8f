"""A configuration that trains in a second, and small IDX files, good and bad."""

import struct

import numpy as np

TINY = [
    "--model.hidden_channels=[4]",
    "--model.kernel_size=3",
    "--model.attention_channels=2",
    "--model.embed_channels=null",
    "--optimiser.learning_rate=2e-3",
    "--data.image_size=32",
    "--data.input_frames=3",
    "--data.horizon=3",
    "--data.validation_sequences=4",
    "--data.test_sequences=5",
    "--training.batch_size=2",
    "--training.sampling_iterations=10",
    "--training.checkpoint_every=4",
    "--training.accelerator=cpu",
    "--training.validate_every=4",
    "--training.threads=1",
    "--training.progress_bar=false",
    "--results.pictures=1",
]


def idx_bytes(count: int, magic: int = 2051, size: int = 28, promised: int | None = None) -> bytes:
    """An IDX file of `count` random images whose header may lie."""
    images = np.random.default_rng(count).integers(0, 256, (count, size, size), dtype=np.uint8)
    return struct.pack(">4I", magic, count if promised is None else promised, size, size) + images.tobytes()
