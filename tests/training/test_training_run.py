"""Training runs: the curve does not depend on being interrupted, and damaged checkpoints are not fatal."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY
from torch.nn.functional import mse_loss

import fastsam
from training.checkpoints import load_model, read
from training.cli import main
from training.config import Config, TrainingConfig
from training.module import ForecastModule, sampling_probability, truth_mask

Run = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]

# Kills its own process with SIGKILL in the forward pass of the eighth step, so after the checkpoint of the fourth.
KILLED_IN_STEP_8 = """
import os, signal, sys
from training.cli import main
from training.module import ForecastModule

step = ForecastModule.training_step

def killed(self, batch, batch_idx):
    if self.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

ForecastModule.training_step = killed
main(sys.argv[1:])
"""


def losses(folder: Path) -> list[tuple[str, str, str]]:
    """Rows of the loss log as written, so that comparing them compares all bits."""
    with open(folder / "loss.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "loss", "sampling_probability"]
    return [tuple(row) for row in rows]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step=*"))


@pytest.fixture
def uninterrupted(run: Run, tmp_path: Path) -> list[tuple[str, str, str]]:
    folder = tmp_path / "uninterrupted"
    assert run("fit", "--training.iterations=12", f"--training.run_dir={folder}") == 0
    rows = losses(folder)
    assert [int(step) for step, *_ in rows] == list(range(1, 13))
    assert len({loss for _, loss, _ in rows}) == 12
    return rows


def test_killed_run_continues_exactly(uninterrupted, run: Run, tmp_path: Path, capsys):
    folder = tmp_path / "killed"
    options = [*TINY, "--training.iterations=12", f"--training.run_dir={folder}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run([sys.executable, "-c", KILLED_IN_STEP_8, "fit", *options], env=environment, timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert len(losses(folder)) == 7 and checkpoints(folder) == ["step=00000004.ckpt"]
    assert run("fit", "--training.iterations=12", f"--training.run_dir={folder}") == 0
    assert "resuming from" in capsys.readouterr().out
    assert losses(folder) == uninterrupted


@pytest.mark.slow
def test_two_processes_train_like_one(run: Run, tmp_path: Path):
    """Each takes half of every batch; only the order of summation differs."""
    options = [*TINY, "--training.iterations=6", "--training.devices=2", f"--training.run_dir={tmp_path / 'two'}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", "training", "fit", *options], env=environment, timeout=120, check=True)
    assert run("fit", "--training.iterations=6") == 0
    one, two = ([float(loss) for _, loss, _ in losses(tmp_path / folder)] for folder in ("run", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_a_finished_run_can_be_prolonged(uninterrupted, run: Run, tmp_path: Path):
    for iterations in (6, 6, 12):
        assert run("fit", f"--training.iterations={iterations}") == 0
    assert losses(tmp_path / "run") == uninterrupted
    assert checkpoints(tmp_path / "run") == ["step=00000006.ckpt", "step=00000008.ckpt", "step=00000012.ckpt"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.resolve().name == "step=00000012.ckpt"


@pytest.mark.parametrize("change", ["nothing", "moved", "damaged"])
def test_a_resumed_run_knows_its_best(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    scores = {4: 5.0, 8: 3.0, 12: 4.0, 16: 4.5}
    monkeypatch.setattr(
        ForecastModule, "validation_step", lambda self, *_: self.log("validation_mse", scores[self.global_step])
    )
    folder = tmp_path / "run"
    assert run("fit", "--training.iterations=8") == 0
    if change == "moved":
        folder = folder.rename(tmp_path / "moved")
    best = folder / "checkpoints" / "best.ckpt"
    if change == "damaged":
        best.write_bytes(b"")
    assert run("fit", "--training.iterations=16", f"--training.run_dir={folder}") == 0
    kept = torch.load(best, weights_only=True)
    assert kept["global_step"] == (12 if change == "damaged" else 8)
    # The name by which Lightning finds its state in checkpoints that are older than its class.
    assert any(re.match(r"ModelCheckpoint\{'monitor': 'validation_mse'", name) for name in kept["callbacks"])
    assert checkpoints(folder) == ["step=00000008.ckpt", "step=00000012.ckpt", "step=00000016.ckpt"]


def test_a_run_that_is_resumed_again_and_again_keeps_few_checkpoints(run: Run, tmp_path: Path):
    for iterations in (4, 12, 24, 36):
        assert run("fit", f"--training.iterations={iterations}") == 0
        # The one that a run resumed from stays until the next.
        assert len(checkpoints(tmp_path / "run")) <= 4
    assert checkpoints(tmp_path / "run")[1:] == ["step=00000028.ckpt", "step=00000032.ckpt", "step=00000036.ckpt"]


def test_files_of_another_run_are_left_alone(run: Run, tmp_path: Path, trained: Path):
    """A run that resumes from elsewhere: what it finds in its folder is not of its own."""
    other = ["--model.hidden_channels=[5]", "--data.validation_sequences=2"]
    assert run("fit", "--training.iterations=4", *other) == 0
    assert run("fit", "--training.iterations=24", f"--training.resume={trained}") == 0
    folder = tmp_path / "run" / "checkpoints"
    assert "step=00000004.ckpt" in checkpoints(tmp_path / "run")
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert best["hyper_parameters"]["config"]["model"]["hidden_channels"] == [4]


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(uninterrupted, run: Run, tmp_path: Path, capsys):
    assert run("fit", "--training.iterations=8") == 0
    newest = tmp_path / "run" / "checkpoints" / "step=00000008.ckpt"
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    assert run("fit", "--training.iterations=12") == 0
    out = capsys.readouterr().out
    assert re.search(r"warning: checkpoint .*step=00000008.ckpt is truncated or damaged", out)
    assert re.search(r"resuming from .*step=00000004.ckpt, iteration 4 of 12", out)
    assert losses(tmp_path / "run") == uninterrupted


def test_only_damaged_checkpoints_is_an_error(run: Run, tmp_path: Path, capsys):
    assert run("fit", "--training.iterations=4") == 0
    for path in (tmp_path / "run" / "checkpoints").glob("step=*"):
        path.write_bytes(b"")
    assert run("fit", "--training.iterations=4") == 2
    assert "none of the 1 checkpoints" in capsys.readouterr().err


def damaged(path: Path, kind: str) -> Path:
    content = path.read_bytes()
    changed = path.with_name(f"{kind}.ckpt")
    if kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, changed)
    elif kind == "other_weights":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"].popitem()
        torch.save(checkpoint, changed)
    else:
        changed.write_bytes({"empty": b"", "truncated": content[:-100], "text": b"hello\n" * 99}[kind])
    return changed


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "foreign"])
@pytest.mark.parametrize("option", ["fit --training.resume", "evaluate --results.checkpoint"])
def test_damaged_checkpoint(run: Run, tmp_path: Path, capsys, trained: Path, kind: str, option: str):
    command, name = option.split()
    assert run(command, f"{name}={damaged(trained, kind)}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{kind}.ckpt" in error


def test_weights_that_do_not_fit(run: Run, capsys, trained: Path):
    assert run("evaluate", f"--results.checkpoint={damaged(trained, 'other_weights')}") == 2
    assert "do not fit its model" in capsys.readouterr().err


def test_another_model_section_than_the_checkpoints(run: Run, capsys, trained: Path):
    assert run("predict", f"--results.checkpoint={trained}", "--model.hidden_channels=[5]") == 2
    assert "hidden_channels=[5]" in capsys.readouterr().err


@pytest.fixture
def trained(run: Run, tmp_path: Path) -> Path:
    """The checkpoint of a run of four steps, in another directory than `run` uses."""
    folder = tmp_path / "trained"
    assert run("fit", "--training.iterations=4", f"--training.run_dir={folder}") == 0
    return folder / "checkpoints" / "step=00000004.ckpt"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.hidden_channels=[5]", "model.hidden_channels was [4], now [5]"),
        ("--data.seed=1", "data.seed was 0, now 1"),
        ("--optimiser.learning_rate=0.1", "optimiser.learning_rate was 0.002, now 0.1"),
        ("--training.batch_size=4", "training.batch_size was 2, now 4"),
    ],
)
def test_another_run_is_not_resumed(run: Run, capsys, trained: Path, option: str, expected: str):
    assert run("fit", option, f"--training.run_dir={trained.parents[1]}") == 2
    error = capsys.readouterr().err
    assert expected in error and "choose another training.run_dir" in error


def test_resume_from_a_named_checkpoint(uninterrupted, run: Run, tmp_path: Path, trained: Path):
    assert run("fit", "--training.iterations=12", f"--training.resume={trained}") == 0
    assert losses(tmp_path / "run") == uninterrupted[4:]


def test_a_checkpoint_is_loaded_in_python(trained: Path):
    model = load_model(trained, read(trained))
    assert isinstance(model, fastsam.SAConvLSTM) and not model.training
    module, past = ForecastModule.load_from_checkpoint(trained), torch.rand(2, 3, 1, 32, 32)
    torch.testing.assert_close(module(past), model(past, horizon=3), rtol=0, atol=0)


def test_scheduled_sampling_falls_linearly():
    config = TrainingConfig()
    steps = {0: 1.0, 1: 1 - 2e-5, 25_000: 0.5, 50_000: 0.0, 70_000: 0.0}
    assert {step: sampling_probability(config, step) for step in steps} == pytest.approx(steps)
    assert sampling_probability(TrainingConfig(sampling_iterations=0), 0) == 0


def test_truth_mask_is_a_function_of_seed_and_step():
    config = TrainingConfig(batch_size=64)
    mask = truth_mask(config, 25_000, 10)
    assert mask.shape == (64, 9) and mask.dtype == torch.bool
    assert 0.4 < mask.float().mean() < 0.6
    assert torch.equal(mask, truth_mask(config, 25_000, 10))
    assert not torch.equal(mask, truth_mask(config, 25_001, 10))
    assert not torch.equal(mask, truth_mask(TrainingConfig(batch_size=64, seed=1), 25_000, 10))
    assert truth_mask(config, 0, 10).all() and not truth_mask(config, 50_000, 10).any()


def test_loss_counts_the_predictions_made_while_reading(monkeypatch: pytest.MonkeyPatch):
    config = Config()
    config.model.hidden_channels, config.data.input_frames, config.data.horizon = [2], 3, 2
    config.training.batch_size = 2
    module = ForecastModule(config)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    batch = torch.rand(2, 5, 1, 32, 32)
    # At step 0 every true frame is fed, so the predictions are those of reading the whole sequence.
    predictions = module.model(batch[:, :4], 1, all_steps=True)
    torch.testing.assert_close(module.training_step(batch, 0), mse_loss(predictions, batch[:, 1:]))


def test_logs_for_people(run: Run, tmp_path: Path):
    assert run("fit", "--training.iterations=4") == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "config.yaml").read_text().startswith("model:")


def test_horizon_of_one_and_every_model(run: Run, tmp_path: Path):
    for name in ("convlstm", "base", "memory", "sa_convlstm_without_zm"):
        options = [f"--model.name={name}", f"--training.run_dir={tmp_path / name}", "--data.horizon=1"]
        if name == "convlstm":
            options.append("--model.attention_channels=null")
        assert run("fit", "--training.iterations=2", *options) == 0
        assert run("predict", *options) == 0
        assert (tmp_path / name / "pictures" / "attention_0.png").exists() == (name not in ("convlstm", "memory"))


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_every_model_by_name(run: Run, tmp_path: Path, name: str):
    """Three iterations; the checkpoint is read back and measured."""
    options = [f"--model.name={name}", "--model.hidden_channels=[4,4]", "--data.input_frames=2", "--data.horizon=2"]
    options += ["--model.attention_channels=null", "--data.test_sequences=2", "--data.validation_sequences=2"]
    assert run("fit", "--training.iterations=3", *options) == 0
    assert len({loss for _, loss, _ in losses(tmp_path / "run")}) == 3
    assert run("evaluate", *options) == 0
    results = json.loads((tmp_path / "run" / "report.json").read_text())["results"]
    assert results[name]["mean"]["mse"] != pytest.approx(results["copy last frame"]["mean"]["mse"])
    assert run("predict", *options) == 0
    attends = name == "base" or name.startswith("sa_convlstm")
    assert (tmp_path / "run" / "pictures" / "attention_0.png").exists() == attends


def test_a_model_bound_to_its_frames_keeps_their_size_in_the_checkpoint(run: Run, tmp_path: Path, capsys):
    options = ["--model.name=cms_lstm", "--model.attention_channels=null"]
    assert run("fit", "--training.iterations=1", *options) == 0
    assert run("evaluate", *options, "--data.image_size=48") == 2
    error = capsys.readouterr().err
    assert "'frame_size': [32, 32]" in error and "'frame_size': [48, 48]" in error
    common = [option for option in TINY if not option.startswith("--model.")]
    assert main(["evaluate", *common, f"--training.run_dir={tmp_path / 'run'}", "--data.image_size=48"]) == 2
    assert "model cms_lstm does not take frames of data.image_size 48" in capsys.readouterr().err
