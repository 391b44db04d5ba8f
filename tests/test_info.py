"""`fastsam.info()` tells what is installed, in every state an installation can be in."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsam import backends
from fastsam._version import __version__

module = importlib.import_module("fastsam.info")


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installation without the extension; the path its build report would have."""
    path = tmp_path / "_build.json"
    monkeypatch.setattr(module, "_REPORT", path)
    monkeypatch.setattr(backends, "native_module", lambda: None)
    monkeypatch.setattr(backends, "native_error", lambda: "No module named 'fastsam._native'")
    return path


def test_this_installation() -> None:
    info = module.info()
    assert (info.version, info.torch_version) == (__version__, torch.__version__)
    assert info.threads == torch.get_num_threads()
    assert {choice.device_type for choice in info.choices} == {"cpu", "cuda"}
    for choice in info.choices:
        expected = backends.explain(choice.operator, torch.device(choice.device_type), getattr(torch, choice.dtype))
        assert (choice.backend, choice.reason) == expected
    assert (backends.native_module() is None) == (info.native_error is not None)
    assert info.native_error is not None or info.instruction_set in info.instruction_sets


def test_text_names_operators_and_choices() -> None:
    text = str(module.info())
    assert text.startswith(f"fastsam {__version__}\n")
    for operator in module.OPERATORS:
        assert operator in text
    assert "eager" in text and "on cuda" in text and "OpenMP" in text


def test_nothing_was_built(not_built: Path) -> None:
    info = module.info()
    assert info.native.startswith("not built here")
    assert info.instruction_set is None and info.cuda.runtime is None
    assert "No module named 'fastsam._native'" in str(info)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"CPU": 1}'])
def test_damaged_build_report(not_built: Path, text: str) -> None:
    not_built.write_text(text)
    assert "not built here" in str(module.info())


def test_the_reason_of_the_build_is_told(not_built: Path) -> None:
    not_built.write_text('{"CPU": {"built": false, "text": "skipped, no working C++17 compiler"}}')
    assert "skipped, no working C++17 compiler" in str(module.info())


def test_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        runtime_version=lambda: 13000,
        driver_version=lambda: 12080,
        device_count=lambda: 2,
        compute_capability=lambda device: (8 + device, 6 * (1 - device)),
        architectures="7.5,8.6,12.0+PTX",
    )
    native = SimpleNamespace(cpu_isa=lambda: "avx2", cpu_isas=lambda: ["generic", "avx2"], cuda=cuda)
    monkeypatch.setattr(backends, "native_module", lambda: native)
    info = module.info()
    assert info.cuda.architectures == ("7.5", "8.6", "12.0+PTX")
    assert (info.cuda.runtime, info.cuda.driver, info.cuda.devices) == ("13.0", "12.8", ("8.6", "9.0"))
    assert "compute capability 0: 8.6, 1: 9.0" in str(info)
    assert "avx2 in use" in str(info)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option: str) -> None:
    result = subprocess.run([sys.executable, "-m", "fastsam", option], capture_output=True, text=True)
    assert result.returncode == 0 and "tune" in result.stdout


def test_command() -> None:
    result = subprocess.run([sys.executable, "-m", "fastsam"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith(f"fastsam {__version__}\n")
