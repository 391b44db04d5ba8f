"""Finding and reading checkpoints; damaged ones are named, and skipped where an older one can serve."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from training.config import Config, ModelConfig, model_config
from training.errors import InputError
from training.module import build_model

STEP_NAME = re.compile(r"step=\d+\.ckpt")

# Settings that a resumed run may change without becoming another run.
FREE = {
    "data": {"root", "download", "workers", "test_seed", "test_sequences", "validation_sequences"},
    "training": {
        "run_dir",
        "resume",
        "iterations",
        "checkpoint_every",
        "validate_every",
        "accelerator",
        "devices",
        "deterministic",
        "threads",
        "progress_bar",
    },
}


def read(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint, on the CPU.

    Raises:
        InputError: if the file is missing, truncated, damaged, or no checkpoint of this package.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {path} is truncated or damaged ({reason}): use another one") from error
    needed = {"state_dict", "hyper_parameters", "global_step"}
    if (
        not isinstance(checkpoint, dict)
        or not needed <= checkpoint.keys()
        or "config" not in checkpoint["hyper_parameters"]
    ):
        raise InputError(f"{path} is not a checkpoint written by python -m training")
    return checkpoint


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, by falling step."""
    found = (path for path in folder.glob("step=*.ckpt") if STEP_NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint that `newest_first` found."""
    return int(path.stem.removeprefix("step="))


def newest_usable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with its contents; None if the folder has no checkpoints.

    Raises:
        InputError: if it has some and none can be read.
    """
    candidates = newest_first(folder)
    for path in candidates:
        try:
            return path, read(path)
        except InputError as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    if candidates:
        raise InputError(
            f"none of the {len(candidates)} checkpoints in {folder} can be read: remove them to start anew, or choose "
            "another training.run_dir"
        )
    return None


def to_evaluate(config: Config) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that evaluation and pictures use: the given one, or the run's best, or its newest usable one.

    Raises:
        InputError: if there is none.
    """
    if config.results.checkpoint is not None:
        path = Path(config.results.checkpoint)
        return path, read(path)
    folder = Path(config.training.run_dir) / "checkpoints"
    best = folder / "best.ckpt"
    if best.is_file():
        return best, read(best)
    found = newest_usable(folder)
    if found is None:
        raise InputError(f"no checkpoint in {folder}: train first, or set results.checkpoint or training.run_dir")
    return found


def load_model(path: Path, checkpoint: dict[str, Any]) -> torch.nn.Module:
    """The forecaster of a checkpoint, with its weights, in evaluation mode.

    Raises:
        InputError: if its weights do not fit its model.
    """
    model = build_model(model_config(checkpoint["hyper_parameters"]["config"]))
    weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"the weights in {path} do not fit its model: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model.eval()


def check_same_run(path: Path, checkpoint: dict[str, Any], config: Config) -> None:
    """Refuse to resume a run under other settings than it was started with.

    Raises:
        InputError: naming the settings that differ.
    """
    stored, now = checkpoint["hyper_parameters"]["config"], config.as_dict()
    differences = [
        f"{section}.{key} was {stored.get(section, {}).get(key)}, now {value}"
        for section in ("model", "data", "optimiser", "training")
        for key, value in now[section].items()
        if key not in FREE.get(section, set()) and stored.get(section, {}).get(key) != value
    ]
    if differences:
        raise InputError(
            f"{path} belongs to a run with other settings ({'; '.join(differences)}): choose another training.run_dir"
        )


def check_model(path: Path, checkpoint: dict[str, Any], config: Config) -> None:
    """Refuse a model section that contradicts the checkpoint; one left at its defaults asks for nothing.

    Raises:
        InputError: naming both.
    """
    stored = model_config(checkpoint["hyper_parameters"]["config"])
    if config.model not in (ModelConfig(), stored):
        raise InputError(f"{path} holds {stored}, not {config.model}: leave the model section out, or set it to match")
