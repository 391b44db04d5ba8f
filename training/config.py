"""Configuration: one dataclass a section, read by jsonargparse from YAML files and dotted command-line options."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

import fastsam
from training.errors import InputError

FinitePositive = restricted_number_type("FinitePositive", float, [(">", 0), ("<", float("inf"))])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
ImageSize = restricted_number_type("ImageSize", int, (">=", 28), docstring="At least one 28x28 digit.")

Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed"]
SSIMVariant = Literal["ssim", "ssim_openstl", "ssim_predrnn"]


@dataclass
class ModelConfig:
    """The forecaster. What is left out is the model's own, its paper's MovingMNIST configuration.

    Args:
        name: a row of the SA-ConvLSTM paper's Table 1 (convlstm, base, memory, sa_convlstm_without_zm, sa_convlstm), a
            row of the CMS-LSTM paper's Table 3 (convlstm_ce_se, predrnn_ce, ...), cms_lstm, predrnn, predrnn_plus_plus,
            mim, mim_star, e3d_lstm or traj_gru; docs/models.md lists all
        hidden_channels: channels of each layer, first layer first; null for the model's own
        kernel_size: odd side of the convolutions; null for the model's own
        attention_channels: channels of query and key, for models with self-attention only; null for the model's own
        layer_norm: normalise after each convolution of the cells, for models that can do without; null for the model's
            own
        patch_size: frames are folded into patches of this side; a 64x64 frame and patch 4 make a 16x16 map
        embed_channels: channels of the 1x1 embedding of the patches; null for none, auto for the model's own
        options: further arguments of the model by name, such as {"links": 5} of traj_gru; a model bound to one size of
            frames gets its frame_size from data.image_size
    """

    name: str = "sa_convlstm"
    hidden_channels: list[PositiveInt] | None = None
    kernel_size: PositiveInt | None = None
    attention_channels: PositiveInt | None = None
    layer_norm: bool | None = None
    patch_size: PositiveInt = 4
    embed_channels: PositiveInt | Literal["auto"] | None = "auto"
    options: dict[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model: what is given here, without what is left to the model.

        Raises:
            InputError: if the options hold what is not theirs to set.
        """
        settings, options = asdict(self), self.options or {}
        for name in ("in_channels", "device", "dtype", *settings):
            if name in options:
                raise InputError(f"model.options must not hold {name!r}: it is set elsewhere")
        optional = ("hidden_channels", "kernel_size", "attention_channels", "layer_norm")
        given = {name: settings[name] for name in optional if settings[name] is not None}
        if self.embed_channels != "auto":
            given["embed_channels"] = self.embed_channels
        return {**given, "patch_size": self.patch_size, **options}

    def for_frames(self, size: int) -> "ModelConfig":
        """The same for frames of size x size, which a model bound to one size has to know; a given one stays."""
        bound = self.name in fastsam.MODELS and fastsam.MODELS[self.name].takes_frame_size
        if not bound or "frame_size" in (self.options or {}):
            return self
        return replace(self, options={**(self.options or {}), "frame_size": [size, size]})


@dataclass
class DataConfig:
    """MovingMNIST: digits that move at constant velocity and bounce off the edges.

    Args:
        source: mnist (IDX files), digits (scikit-learn's 8x8 digits, enlarged; needs no files), or auto: mnist if root
            or download is given, digits otherwise; a model is evaluated on other digits than it was trained on only
            where they are named
        root: directory of the MNIST IDX files, plain or .gz, and of mnist_test_seq.npy if there is one
        download: fetch the MNIST files that are missing, into root or, without root, into the user's cache
        input_frames: frames that the model reads
        horizon: frames that it predicts
        image_size: side of the square frames, pixels
        digits: digits in a sequence
        seed: seed of the training and validation sequences
        test_seed: seed of the generated test set, used where mnist_test_seq.npy is absent
        test_sequences: length of the test set; at most the 10,000 of mnist_test_seq.npy where that is used
        validation_sequences: length of the validation set, whose digits are held out of the training digits
        workers: processes that generate training sequences; 0 generates them in the training process
    """

    source: Literal["auto", "mnist", "digits"] = "auto"
    root: str | None = None
    download: bool = False
    input_frames: PositiveInt = 10
    horizon: PositiveInt = 10
    image_size: ImageSize = 64
    digits: PositiveInt = 2
    seed: Seed = 0
    test_seed: Seed = 0
    test_sequences: PositiveInt = 10_000
    validation_sequences: PositiveInt = 256
    workers: NonNegativeInt = 0


@dataclass
class OptimiserConfig:
    """Adam.

    Args:
        learning_rate: constant learning rate
    """

    learning_rate: FinitePositive = 1e-3


@dataclass
class TrainingConfig:
    """The training run.

    Args:
        run_dir: everything the run writes goes here; a run directory that holds checkpoints is resumed
        resume: auto (the newest usable checkpoint in run_dir, if any) or the path of a checkpoint
        iterations: optimiser steps
        batch_size: sequences in a step, over all devices together
        sampling_start: probability of feeding a true future frame at the first iteration (scheduled sampling)
        sampling_iterations: that probability falls linearly to 0 over so many iterations; 0 never feeds the truth
        checkpoint_every: iterations between checkpoints; the newest three are kept
        validate_every: iterations between validations; the best checkpoint by validation MSE is kept as best.ckpt
        seed: seed of the initial weights and of scheduled sampling
        accelerator: where to train
        devices: number of devices; more than one trains with DistributedDataParallel
        precision: arithmetic, as Lightning names it
        deterministic: the same bits on every run on a GPU too, at some cost in speed; a CPU always gives them
        threads: CPU threads of PyTorch; its own choice by default
        progress_bar: show progress with loss and iterations a second
    """

    run_dir: str = "runs/moving_mnist"
    resume: str = "auto"
    iterations: PositiveInt = 80_000
    batch_size: PositiveInt = 8
    sampling_start: ClosedUnitInterval = 1.0
    sampling_iterations: NonNegativeInt = 50_000
    checkpoint_every: PositiveInt = 1_000
    validate_every: PositiveInt = 5_000
    seed: Seed = 0
    accelerator: Accelerator = "auto"
    devices: PositiveInt = 1
    precision: Precision = "32-true"
    deterministic: bool = False
    threads: PositiveInt | None = None
    progress_bar: bool = True


@dataclass
class ResultsConfig:
    """What evaluate and predict do.

    Args:
        checkpoint: checkpoint to use; by default the best one of run_dir, or else its newest usable one
        output: directory for reports and pictures; by default run_dir
        batch_size: sequences evaluated at a time
        ssim: SSIM definitions to report: ssim (data range 1.0), ssim_openstl, ssim_predrnn
        pictures: test sequences drawn
        query: row and column, in pixels, of the query point of the attention maps; by default the brightest pixel
            of the last frame read
    """

    checkpoint: str | None = None
    output: str | None = None
    batch_size: PositiveInt = 16
    ssim: list[SSIMVariant] = field(default_factory=lambda: ["ssim"])
    pictures: PositiveInt = 4
    query: tuple[NonNegativeInt, NonNegativeInt] | None = None


@dataclass
class Config:
    """All sections.

    Args:
        model: the forecaster
        data: the sequences
        optimiser: the optimiser
        training: the training run
        results: evaluation and pictures
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)

    def __post_init__(self) -> None:
        if self.training.batch_size % self.training.devices:
            raise InputError(
                f"training.batch_size {self.training.batch_size} must be a multiple of training.devices "
                f"{self.training.devices}: it counts the sequences of all devices together"
            )
        self.model = self.model.for_frames(self.data.image_size)

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain numbers, strings and lists, fit for YAML, JSON and checkpoints."""
        return json.loads(json.dumps(asdict(self)))

    def plain(self) -> "Config":
        """The same with Python's own numbers for jsonargparse's restricted ones, which checkpoints must not hold."""
        return Config.from_dict(self.as_dict())

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> "Config":
        """What `as_dict` returned, as a checkpoint keeps it.

        Raises:
            InputError: if it has other keys than this version's.
        """
        sections: dict[str, Any] = {part.name: part.default_factory for part in fields(Config)}
        try:
            return Config(**{name: section(**stored[name]) for name, section in sections.items()})
        except (KeyError, TypeError) as error:
            raise InputError(f"the checkpoint's configuration does not fit this version: {error}") from error


def model_config(stored: dict[str, Any]) -> ModelConfig:
    """The model section of a configuration kept in a checkpoint.

    Raises:
        InputError: if it has other keys than this version's.
    """
    try:
        return ModelConfig(**stored["model"])
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint's model configuration does not fit this version: {error}") from error
