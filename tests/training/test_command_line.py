"""Every bad option, setting or file gives one line and exit code 2; good ones arrive where they belong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import fastsam
from training.cli import COMMANDS, CONFIGS, main, make_parser, read_config
from training.config import Config, model_config
from training.module import build_model

BAD_OPTIONS = [
    ("--model.nme=x", "--model.nme"),
    ("--model.name=lstm", "model.name 'lstm' must be one of convlstm, base"),
    ("--model.hidden_channels=[]", "hidden_channels"),
    ("--model.hidden_channels=[8,-1]", "hidden_channels"),
    ("--model.hidden_channels=8", "hidden_channels"),
    ("--model.kernel_size=4", "kernel_size"),
    ("--model.kernel_size=-3", "kernel_size"),
    ("--model.attention_channels=0", "attention_channels"),
    ("--model.layer_norm=maybe", "layer_norm"),
    ("--model.patch_size=2.5", "patch_size"),
    ("--model.embed_channels=none", "embed_channels"),
    ("--model.options=3", "model.options"),
    ("--model.options={links:", "model.options"),
    ('--model.options={"patch_size":2}', "model.options must not hold 'patch_size'"),
    ('--model.options={"dtype":"half"}', "model.options must not hold 'dtype'"),
    ('--model.options={"links":5}', "model sa_convlstm: SAConvLSTMCell has no option 'links'; it takes kernel_size,"),
    ('--model.name=memory --model.options={"use_attention":true}', "use_attention is what makes the rows differ"),
    ("--model.name=predrnn --model.attention_channels=2", "bias, shared_input; null leaves a setting to the model"),
    ("--model.name=cms_lstm --model.layer_norm=true", "model cms_lstm: CMSLSTM.__init__() got an unexpected keyword"),
    ("--model.name=traj_gru --model.layer_norm=false", "model traj_gru: TrajGRUCell has no option 'layer_norm'"),
    ("--model.name=mim --model.hidden_channels=[8]", "at least two layers"),
    ("--model.name=cms_lstm --data.image_size=28", "model cms_lstm: SpatiotemporalExpression: map_size must have"),
    ("--model.name=predrnn_se --data.image_size=28", "model predrnn_se does not take frames of data.image_size 28"),
    ("--data.source=cifar", "data.source"),
    ("--data.root=/no/such/place", "/no/such/place does not exist"),
    ("--data.source=mnist --data.root=/no/such/place", "/no/such/place does not exist"),
    ("--data.download=perhaps", "data.download"),
    ("--data.input_frames=0", "input_frames"),
    ("--data.horizon=-1", "horizon"),
    ("--data.image_size=27", "image_size"),
    ("--data.digits=two", "data.digits"),
    ("--data.seed=-1", "data.seed"),
    ("--data.test_seed=4294967296", "test_seed"),
    ("--data.test_sequences=0", "test_sequences"),
    ("--data.validation_sequences=x", "validation_sequences"),
    ("--data.workers=-1", "workers"),
    ("--optimiser.learning_rate=0", "learning_rate"),
    ("--optimiser.learning_rate=nan", "learning_rate"),
    ("--optimiser.learning_rate=inf", "learning_rate"),
    ("--optimiser.momentum=0.9", "--optimiser.momentum"),
    ("--training.iterations=0", "iterations"),
    ("--training.iterations=1e3", "iterations"),
    ("--training.batch_size=-8", "batch_size"),
    ("--training.batch_size=3 --training.devices=2", "must be a multiple of training.devices"),
    ("--training.sampling_start=1.5", "sampling_start"),
    ("--training.sampling_iterations=-1", "sampling_iterations"),
    ("--training.checkpoint_every=0", "checkpoint_every"),
    ("--training.validate_every=0", "validate_every"),
    ("--training.seed=-1", "training.seed"),
    ("--training.accelerator=abacus", "accelerator"),
    ("--training.devices=0", "devices"),
    ("--training.precision=8", "precision"),
    ("--training.deterministic=2", "deterministic"),
    ("--training.threads=0", "threads"),
    ("--training.progress_bar=3", "progress_bar"),
    ("--training.resume=missing.ckpt", "checkpoint missing.ckpt does not exist"),
    ("--results.batch_size=0", "results.batch_size"),
    ("--results.ssim=[ssim_best]", "results.ssim"),
    ("--results.pictures=0", "pictures"),
    ("--results.query=[1]", "results.query"),
    ("--training.accelerator=gpu --training.devices=8", "training.accelerator, devices or precision"),
    ("--config=missing.yaml", "missing.yaml"),
    ("stray", "stray"),
]


def fails_with_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("python -m training: error: ") and error.count("\n") == 1, error
    assert expected in error


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS, ids=[options for options, _ in BAD_OPTIONS])
def test_bad_option(capsys, tmp_path: Path, options: str, expected: str):
    fails_with_one_line(capsys, ["fit", f"--training.run_dir={tmp_path}", *options.split()], expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--results.checkpoint=missing.ckpt", "checkpoint missing.ckpt does not exist"),
        ("", "no checkpoint in"),
        ("--training.precision=8", "precision"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_bad_option_after_training(capsys, tmp_path: Path, command: str, options: str, expected: str):
    fails_with_one_line(capsys, [command, f"--training.run_dir={tmp_path}", *options.split()], expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: {nme: x}", "model.nme"),
        ("modell: {name: base}", "modell"),
        ("model: {hidden_channels: [4}", "config"),
        ("model: {hidden_channels: four}", "hidden_channels"),
        ("training: {iterations: -4}", "training.iterations"),
        ("optimiser: {learning_rate: fast}", "learning_rate"),
        ("- a\n- b", "config"),
    ],
)
def test_bad_config_file(capsys, tmp_path: Path, content: str, expected: str):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    fails_with_one_line(capsys, ["fit", f"--config={file}"], expected)


@pytest.mark.parametrize("arguments", [[], ["train"], ["fit", "evaluate"]])
def test_bad_command(capsys, arguments: list[str]):
    fails_with_one_line(capsys, arguments, "")


def test_run_directory_that_is_a_file(capsys, run: Callable[..., int], tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert run("fit", f"--training.run_dir={tmp_path / 'file'}") == 2
    assert "training.run_dir" in capsys.readouterr().err


def test_options_override_the_file(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: {name: base, hidden_channels: [4, 4]}\ntraining: {iterations: 7}")
    arguments = ["fit", f"--config={file}", "--model.hidden_channels=[8]", "--data.seed=3"]
    command, config = read_config(make_parser(), arguments)
    assert (command, config.model.name, config.model.hidden_channels) == ("fit", "base", [8])
    assert (config.training.iterations, config.data.seed, config.data.horizon) == (7, 3, 10)


@pytest.mark.parametrize("name", ["moving_mnist", "demo"])
def test_shipped_configs(name: str):
    file = CONFIGS / f"{name}.yaml"
    _, config = read_config(make_parser(), ["fit", f"--config={file}"])
    written = yaml.safe_load(file.read_text())
    for section, values in written.items():
        for key, value in values.items():
            assert config.as_dict()[section][key] == value
    if name == "demo":
        assert read_config(make_parser(), ["demo"])[1] == config


def test_defaults_are_the_papers():
    config = Config()
    assert (config.training.iterations, config.training.batch_size) == (80_000, 8)
    assert config.optimiser.learning_rate == 1e-3
    assert config.training.sampling_start / config.training.sampling_iterations == pytest.approx(2e-5)
    with torch.device("meta"):
        model, published = build_model(config.model), fastsam.SAConvLSTM()
    assert parameter_shapes(model) == parameter_shapes(published)


def parameter_shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", fastsam.MODELS)
def test_what_is_left_out_is_the_model_s_own(name: str):
    """At other frames than the model's own, for models that are bound to a size."""
    _, config = read_config(make_parser(), ["fit", f"--model.name={name}", "--data.image_size=48"])
    size = {"frame_size": (48, 48)} if fastsam.MODELS[name].takes_frame_size else {}
    with torch.device("meta"):
        model, published = build_model(config.model), fastsam.build(name, **size)
    assert parameter_shapes(model) == parameter_shapes(published)
    assert model.patch_size == published.patch_size


def test_options_of_the_model(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: {name: cms_lstm, kernel_size: 5, options: {scales: [1, 2], forget_bias: 0.5}}")
    _, config = read_config(make_parser(), ["fit", f"--config={file}", "--model.options.scales=[2]"])
    assert config.model.options == {"scales": [2], "forget_bias": 0.5, "frame_size": [64, 64]}
    cell = build_model(config.model).cells[0]
    assert cell.expression.scales == (2,)
    assert (cell.cell.kernel_size, cell.cell.forget_bias, cell.cell.map_size) == (5, 0.5, (16, 16))


def test_a_given_frame_size_stays():
    options = ["--model.name=mim", '--model.options={"frame_size": null}']
    _, config = read_config(make_parser(), ["fit", *options])
    assert config.model.options == {"frame_size": None}


@pytest.mark.parametrize("embedding", ["null", "5", "auto"])
def test_embedding(embedding: str):
    """null has always meant none; auto is the model's own."""
    _, config = read_config(make_parser(), ["fit", f"--model.embed_channels={embedding}"])
    channels = getattr(build_model(config.model).embedding, "out_channels", None)
    assert channels == {"null": None, "5": 5, "auto": 64}[embedding]


def test_model_sections_of_older_checkpoints_are_read():
    """All keys that there were before there were options, each with a value."""
    stored = {
        "name": "sa_convlstm",
        "hidden_channels": [3],
        "kernel_size": 3,
        "attention_channels": None,
        "layer_norm": False,
        "patch_size": 2,
        "embed_channels": None,
    }
    model = build_model(model_config({"model": stored}))
    expected = fastsam.SAConvLSTM(1, [3], kernel_size=3, layer_norm=False, patch_size=2, embed_channels=None)
    assert parameter_shapes(model) == parameter_shapes(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_can_be_read_back(capsys, tmp_path: Path, command: str):
    with pytest.raises(SystemExit) as stop:
        main([command, "--model.hidden_channels=[3]", "--print_config"])
    assert stop.value.code == 0
    file = tmp_path / "settings.yaml"
    file.write_text(capsys.readouterr().out)
    _, config = read_config(make_parser(), [command, f"--config={file}"])
    assert config.model.hidden_channels == [3]
