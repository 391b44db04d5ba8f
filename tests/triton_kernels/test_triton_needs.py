"""What Triton needs at run time to build what launches its kernels: a C compiler, and Python's headers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsam import backends


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A card of capability 8.6, and a machine with gcc and the headers; the folder of both."""
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False), build=SimpleNamespace(impl=None))
    triton = SimpleNamespace(__version__="3.6.0", knobs=knobs)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    for function in ("triton_state", "_below_triton", "_triton_cannot_build"):
        monkeypatch.setattr(backends, function, getattr(backends, function).__wrapped__)
    monkeypatch.setattr(backends.sysconfig, "get_path", lambda name, scheme: str(tmp_path / name))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    return tmp_path


def reason() -> str | None:
    return backends.unsupported("lstm_gates", "triton", torch.device("cuda", 0), torch.float32)


def test_a_compiler_and_headers_will_do(card):
    assert reason() is None
    (card / "gcc").rename(card / "clang")
    assert reason() is None
    (card / "clang").rename(card / "icx")
    assert "and there is no C compiler 'gcc' or 'clang' here: install one, or name it in CC" in reason()


def test_a_compiler_that_is_named(card, monkeypatch):
    monkeypatch.setenv("CC", "icx")
    assert "there is no C compiler 'icx' here" in reason()
    (card / "gcc").rename(card / "icx")
    assert reason() is None


def test_without_headers(card, monkeypatch):
    (card / "include" / "Python.h").rename(card / "Python.h")
    assert f"there is no {card / 'include' / 'Python.h'}: install Python's headers" in reason()
    monkeypatch.setenv("CPATH", f"/nowhere:{card}")
    assert reason() is None


def test_another_way_to_build(card):
    """Triton has a hook for it."""
    (card / "gcc").unlink()
    assert reason() is not None
    sys.modules["triton"].knobs.build.impl = lambda *_: ""
    assert reason() is None
