"""Evaluation reports and pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from training import figures
from training.config import DataConfig
from training.data import make_test_set
from training.digits import embedded_digits
from training.metrics import ForecastMetrics, copy_last_frame

Run = Callable[..., int]


@pytest.fixture
def trained(run: Run) -> None:
    assert run("fit", "--training.iterations=4") == 0


def test_evaluate(run: Run, trained: None, tmp_path: Path, capsys):
    assert run("evaluate", "--results.ssim=[ssim,ssim_openstl,ssim_predrnn]", "--data.test_seed=8") == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    facts, results = report["facts"], report["results"]
    assert facts["test seed"] == 8 and facts["sequences"] == 5 and "not MNIST" in facts["digits"]
    assert facts["checkpoint"].endswith("best.ckpt") and facts["iterations"] == 4
    assert facts["frames"] == "3 read, 3 predicted, 2 digits on 32x32 pixels"
    assert facts["trained on"] == f"digits, {facts['frames']}" and "note:" not in out
    assert facts["versions"].keys() >= {"torch", "python", "fastsam"}
    assert set(results) == {"sa_convlstm", "copy last frame"}
    for values in results.values():
        assert set(values["mean"]) == {
            *("mse", "mse_clipped", "mae", "mae_clipped", "psnr", "ssim", "ssim_openstl", "ssim_predrnn")
        }
        for name, mean in values["mean"].items():
            assert len(values["steps"][name]) == 3 and np.mean(values["steps"][name]) == pytest.approx(mean)
    markdown = (tmp_path / "run" / "report.md").read_text()
    for text in (f"{results['sa_convlstm']['mean']['mse']:.2f}", "not MNIST"):
        assert text in markdown and text in out


def test_other_frames_than_those_of_the_training_are_told(run: Run, trained: None, capsys):
    capsys.readouterr()
    assert run("evaluate", "--data.horizon=2", "--data.digits=1") == 0
    trained_on, here = "3 read, 3 predicted, 2 digits", "3 read, 2 predicted, 1 digit"
    told = f"note: trained on {trained_on} on 32x32 pixels; here on {here} on 32x32 pixels\n"
    assert told in capsys.readouterr().out


def test_baseline_in_the_report_is_the_copied_frame(run: Run, trained: None, tmp_path: Path):
    assert run("evaluate") == 0
    config = DataConfig(image_size=32, input_frames=3, horizon=3, test_sequences=5)
    metrics = ForecastMetrics()
    sequences, _ = make_test_set(config, embedded_digits())
    for index in range(5):
        video = sequences[index]
        metrics.update(copy_last_frame(video[None, :3], 3), video[None, 3:])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["results"]["copy last frame"]["mean"] == pytest.approx(metrics.means())


def test_evaluate_on_mnist(run: Run, trained: None, tmp_path: Path, mnist: Path):
    options = [f"--data.root={mnist}", f"--results.output={tmp_path / 'out'}"]
    assert run("evaluate", *options, "--data.source=mnist") == 0
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["facts"]
    assert facts["digits"] == f"MNIST digits from {mnist}" and facts["test seed"] == 0
    assert facts["trained on"].startswith("digits, 3 read")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_other_digits_must_be_asked_for(run: Run, tmp_path: Path, mnist: Path, capsys, command: str):
    root = f"--data.root={mnist}"
    assert run("fit", "--training.iterations=4", root) == 0
    assert run(command) == 2
    error = capsys.readouterr().err
    assert "trained on data.source=mnist, but data.source=auto stands for digits" in error
    assert "give --data.root" in error and "or --data.source digits" in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("report.*")) and not (tmp_path / "run" / "pictures").exists()
    assert run(command, root) == 0
    assert run(command, "--data.source=digits") == 0


def test_mnist_for_a_model_of_other_digits_must_be_asked_for(run: Run, trained: None, mnist: Path, capsys):
    assert run("evaluate", f"--data.root={mnist}") == 2
    error = capsys.readouterr().err
    assert "trained on data.source=digits, but data.source=auto stands for mnist" in error
    assert "leave out data.root" in error and "or --data.source mnist" in error


def test_predict(run: Run, trained: None, tmp_path: Path, capsys):
    assert run("predict", "--results.pictures=2", "--results.query=[3,30]") == 0
    folder = tmp_path / "run" / "pictures"
    names = {f"{kind}_{n}.{ending}" for n in (0, 1) for kind, ending in KINDS}
    assert {path.name for path in folder.iterdir()} == names
    out = capsys.readouterr().out
    assert all(str(folder / name) in out for name in names)
    pages = imageio.imread(folder / "forecast_0.gif", index=None)
    assert len(pages) == 6 and pages[0].std() > 0
    assert run("predict", "--results.query=[3,32]") == 2
    assert "outside the frame" in capsys.readouterr().err


KINDS = [("forecast", "png"), ("forecast", "gif"), ("attention", "png")]


def test_many_frames_fit_into_a_picture(tmp_path: Path):
    video = np.random.default_rng(0).random((30, 1, 8, 8))
    short = figures.strip(tmp_path / "short.png", video[:10], video[10:20], video[10:20])
    long = figures.strip(tmp_path / "long.png", video[:10], video[10:], video[10:])
    assert imageio.imread(short).shape == imageio.imread(long).shape


def test_brightest_pixel():
    frame = np.zeros((2, 5, 7))
    frame[0, 4, 2], frame[1, 0, 0] = 0.5, 0.9
    assert figures.brightest_pixel(frame) == (4, 2)
