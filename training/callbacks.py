"""Lightning callbacks: the loss of every step as CSV, a progress bar that counts iterations, and checkpoints."""

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor

from training import checkpoints
from training.config import TrainingConfig
from training.errors import InputError
from training.module import sampling_probability


class LossLog(Callback):
    """Writes step, loss and sampling probability of every iteration to a CSV file, with all digits of the loss.

    Lightning's CSVLogger starts a new file in a resumed run. This one keeps the rows up to the step that the run
    resumes from and goes on below them, so the file reads like that of a run that never stopped.

    Args:
        path: the CSV file.
    """

    HEADER = ("step", "loss", "sampling_probability")

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        kept: list[list[str]] = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                kept = [row for row in csv.reader(file) if row and row[0].isdecimal() and len(row) == len(self.HEADER)]
        rewritten = self.path.with_suffix(".new")
        with open(rewritten, "w", newline="") as file:
            csv.writer(file).writerows([self.HEADER, *(row for row in kept if int(row[0]) <= trainer.global_step)])
        rewritten.replace(self.path)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        if trainer.is_global_zero:
            probability = sampling_probability(pl_module.config.training, trainer.global_step - 1)
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([trainer.global_step, repr(float(loss)), f"{probability:.6f}"])


class IterationBar(TQDMProgressBar):
    """Lightning's bar, counting iterations: a resumed run starts where it was and shows its own speed.

    Where the output is no terminal, which cannot redraw a line, it prints rarely.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 100)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        bar = self.train_progress_bar
        bar.total = trainer.max_steps
        bar.initial = bar.n = trainer.global_step
        bar.set_description("Training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class NewestCheckpoints(ModelCheckpoint):
    """Checkpoints every so many steps and, unlike its parent, also after the last one.

    In a run that resumes from one of its folder's files all of them count, wherever they were written: Lightning knows
    them by their folder's name. Lightning never deletes the one that a run resumed from; the next resume does, beyond
    the newest three.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        folder = Path(str(self.dirpath))
        if trainer.ckpt_path is None or not Path(trainer.ckpt_path).resolve().is_relative_to(folder.resolve()):
            return
        found = checkpoints.newest_first(folder)
        earlier = [path for path in found if checkpoints.step_of(path) <= trainer.global_step]
        _remember(self, {path: float(checkpoints.step_of(path)) for path in earlier[: self.save_top_k]})
        for path in earlier[self.save_top_k :]:
            if trainer.is_global_zero:
                path.unlink(missing_ok=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint with the best validation.

    In a resumed run the score to beat is the one in the file: the checkpoint that it resumes from was written before
    the validation of its step, and Lightning takes no score from a folder that was moved.
    """

    @property
    def state_key(self) -> str:
        """Its name in checkpoints, which is that of the parent: so it was before it had a class of its own."""
        return super().state_key.replace(type(self).__name__, ModelCheckpoint.__name__, 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        path = Path(str(self.dirpath), f"{self.filename}.ckpt")
        try:
            saved = checkpoints.read(path)
            checkpoints.check_same_run(path, saved, pl_module.config)
        except InputError:  # there is none of this run that can be read: the next validation is the best
            _remember(self, {})
            return
        score = saved.get("callbacks", {}).get(self.state_key, {}).get("best_model_score")
        if score is not None and saved["global_step"] <= trainer.global_step:
            _remember(self, {path: float(score)})


def _remember(callback: ModelCheckpoint, scores: dict[Path, float]) -> None:
    """Make the callback believe that it has written these files, of these scores, and no others."""
    models = {str(path): torch.tensor(score, dtype=torch.float64) for path, score in scores.items()}
    ranked = sorted(models, key=lambda name: float(models[name]), reverse=callback.mode == "max")
    best, worst = (ranked[0], ranked[-1]) if ranked else ("", "")
    callback.best_k_models = models
    callback.best_model_path, callback.best_model_score = best, models.get(best)
    # The latter is read only where there are models.
    callback.kth_best_model_path, callback.kth_value = worst, models.get(worst, callback.kth_value)


def checkpoint_callbacks(config: TrainingConfig, folder: Path) -> list[ModelCheckpoint]:
    """The newest three checkpoints with a link ``last.ckpt``, and ``best.ckpt`` by validation MSE."""
    newest = NewestCheckpoints(
        folder,
        filename="step={step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=3,
        save_last="link",
        every_n_train_steps=config.checkpoint_every,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    best = BestCheckpoint(
        folder,
        filename="best",
        monitor="validation_mse",
        mode="min",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    return [newest, best]
