"""What the subcommands do: fit, evaluate, predict, and demo, which is all three."""

import logging
import os
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from training import checkpoints, figures, report
from training.callbacks import IterationBar, LossLog, checkpoint_callbacks
from training.config import Config
from training.data import SequenceData
from training.digits import resolve_source
from training.errors import InputError, device_errors
from training.metrics import ForecastMetrics, copy_last_frame
from training.module import ForecastModule
from training.trained import load


def fit(config: Config) -> None:
    """Train a model; a run directory that holds checkpoints is resumed."""
    _quiet()
    config.data.source = resolve_source(config.data)
    training, run_dir = config.training, Path(config.training.run_dir)
    pl.seed_everything(training.seed, verbose=False)
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    module, data = ForecastModule(config), SequenceData(config)
    resumed = _checkpoint_to_resume(config)
    _say(f"training on {data.digits.description}")
    _make_folder(run_dir)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    with device_errors():
        trainer = _trainer(config)
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    _say(f"trained {trainer.global_step} iterations; checkpoints are in {run_dir / 'checkpoints'}")


def evaluate(config: Config) -> report.Report:
    """Measure a checkpoint on the test set beside the copy-last-frame baseline, and write the report."""
    _quiet()
    trained = load(config)
    model_metrics, baseline_metrics = (ForecastMetrics(config.results.ssim) for _ in range(2))
    for batch in tqdm(trained.data.test_dataloader(), desc="Evaluating", disable=not config.training.progress_bar):
        frames, truth = trained.split(batch)
        model_metrics.update(trained.predict(frames), truth)
        baseline_metrics.update(copy_last_frame(frames, config.data.horizon), truth)
    result = report.Report(
        model=trained.name,
        facts=trained.facts(),
        results={trained.name: model_metrics, "copy last frame": baseline_metrics},
    )
    paths = result.write(_make_folder(_output(config)))
    print(result.table())
    _say(f"report: {', '.join(map(str, paths))}")
    return result


def predict(config: Config) -> list[Path]:
    """Draw forecasts of the first test sequences, and attention maps if the model has attention."""
    _quiet()
    trained = load(config)
    _check_query(config)
    folder = _make_folder(_output(config) / "pictures")
    written = []
    for number in range(min(config.results.pictures, len(trained.data.test_set))):
        frames, truth = trained.split(trained.data.test_set[number].unsqueeze(0))
        forecast = trained.predict(frames)
        videos = [video[0].float().cpu().numpy() for video in (frames, truth, forecast)]
        written.append(figures.strip(folder / f"forecast_{number}.png", *videos))
        written.append(figures.animation(folder / f"forecast_{number}.gif", *videos))
        if trained.has_attention:
            query = config.results.query or figures.brightest_pixel(videos[0][-1])
            layers = sorted({0, len(trained.model.cells) - 1})
            maps = trained.attention_maps(frames, query, layers)
            path = folder / f"attention_{number}.png"
            written.append(figures.attention(path, *videos, maps=maps, layers=layers, query=query))
    _say("pictures:", *(f"  {path}" for path in written), sep="\n")
    return written


def demo(config: Config) -> None:
    """Train a small SA-ConvLSTM, evaluate it and draw its forecasts: some minutes on two CPU cores."""
    config.data.root = config.data.root or os.environ.get("FASTSAM_MNIST") or None
    start = time.perf_counter()
    fit(config)
    result = evaluate(config)
    pictures = predict(config)
    print()
    print(result.table())
    _say(
        f"data: {result.facts['digits']}",
        f"pictures: {pictures[0].parent}",
        f"took {time.perf_counter() - start:.0f} s",
        sep="\n",
    )


def _checkpoint_to_resume(config: Config) -> Path | None:
    folder = Path(config.training.run_dir) / "checkpoints"
    if config.training.resume == "auto":
        found = checkpoints.newest_usable(folder)
        if found is None:
            return None
        path, checkpoint = found
    else:
        path = Path(config.training.resume)
        checkpoint = checkpoints.read(path)
    checkpoints.check_same_run(path, checkpoint, config)
    _say(f"resuming from {path}, iteration {checkpoint['global_step']} of {config.training.iterations}")
    return path


def _trainer(config: Config) -> pl.Trainer:
    training, run_dir = config.training, Path(config.training.run_dir)
    callbacks = [*checkpoint_callbacks(training, run_dir / "checkpoints"), LossLog(run_dir / "loss.csv")]
    if training.progress_bar:
        callbacks.append(IterationBar())
    return pl.Trainer(
        accelerator=training.accelerator,
        devices=training.devices,
        strategy="ddp" if training.devices > 1 else "auto",
        precision=training.precision,
        deterministic=training.deterministic,
        max_steps=training.iterations,
        max_epochs=-1,
        val_check_interval=training.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        logger=TensorBoardLogger(run_dir, name="tensorboard", version=""),
        callbacks=callbacks,
        enable_progress_bar=training.progress_bar,
        enable_model_summary=False,
    )


def _output(config: Config) -> Path:
    return Path(config.results.output or config.training.run_dir)


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made ({error.strerror}): choose another training.run_dir") from error
    return path


def _check_query(config: Config) -> None:
    query, size = config.results.query, config.data.image_size
    if query is not None and max(query) >= size:
        raise InputError(f"results.query {list(query)} is outside the frame: row and column must be below {size}")


@rank_zero_only
def _say(*lines: str, sep: str = " ") -> None:
    print(*lines, sep=sep, flush=True)


def _quiet() -> None:
    """Silence Lightning's advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The batch sampler starts from the global step, so the loader needs no state of its own.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
