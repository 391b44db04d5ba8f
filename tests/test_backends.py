"""Choosing the implementation: by default, by `with fastsam.backend(...)`, by FASTSAM_BACKEND."""

import contextlib
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from extension import require_native

import fastsam
from fastsam import backends, ops

ROOT = Path(__file__).resolve().parent.parent


def _maps(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(2, 12, 4, 5, generator=generator)
    return gates.to(device, dtype), gates[:, :3].to(device, dtype)


CALLS = {
    "double_attention": lambda x, c: ops.double_attention(c, c, *[x.new_ones(3, 3)] * 2, *[x.new_ones(3)] * 2,
                                                          *[x.new_ones(3, 3)] * 2, x.new_ones(3)),
    "self_attention": lambda x, c: ops.self_attention(c, x.new_ones(3, 3), x.new_ones(3), x.new_ones(3, 3),
                                                      x.new_ones(3)),
    "separable_gates": lambda x, c: ops.separable_gates(None, c, c, None, x.new_ones(9, 3, 1, 1), None),
    "lstm_gates": lambda x, c: ops.lstm_gates(x, c),
    "memory_gates": lambda x, c: ops.memory_gates(x[:, :9], c),
    "norm_gate": lambda x, c: ops.norm_gate(x[:, :3], c),
}  # fmt: skip


@pytest.fixture
def broken_eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager form of every operator raises: what still works did not use it."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the eager form was called")

    for operator in CALLS:
        monkeypatch.setattr(importlib.import_module(f"fastsam.ops.{operator}.eager"), operator, fail)


def test_auto_is_the_default():
    environment = {name: value for name, value in os.environ.items() if name != "FASTSAM_BACKEND"}
    assert _python("print(fastsam.backends.selected())", environment).stdout.strip() == "auto"


@pytest.mark.parametrize("name", ["auto", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", CALLS)
def test_native_code_serves(operator, dtype, name, broken_eager):
    require_native()
    gates, c = _maps(dtype)
    c.requires_grad_()
    with fastsam.backend(name):
        outputs = CALLS[operator](gates, c)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        torch.autograd.backward([output.sum() for output in outputs])
    assert c.grad.isfinite().all()


@pytest.mark.parametrize("operator", CALLS)
def test_eager_serves_when_forced(operator, broken_eager):
    with fastsam.backend("eager"), pytest.raises(AssertionError, match="the eager form was called"):
        CALLS[operator](*_maps())


@pytest.mark.parametrize(("dtype", "device"), [(torch.float16, "cpu"), (torch.float32, "meta")])
@pytest.mark.parametrize("operator", CALLS)
def test_auto_falls_back_to_eager(operator, dtype, device):
    with fastsam.backend("auto"):
        outputs = CALLS[operator](*_maps(dtype, device))
    output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    assert output.dtype == dtype and output.device.type == device


@pytest.mark.parametrize("operator", CALLS)
def test_a_forced_back_end_that_cannot_serve_says_why(operator):
    require_native()
    with fastsam.backend("cpu"):
        with pytest.raises(RuntimeError, match=rf"{operator}.*'cpu'.*torch\.float16"):
            CALLS[operator](*_maps(torch.float16))
        with pytest.raises(RuntimeError, match=rf"{operator}.*'cpu'.*meta"):
            CALLS[operator](*_maps(device="meta"))


@pytest.mark.parametrize("operator", CALLS)
def test_without_the_extension(operator, monkeypatch):
    """auto works with PyTorch alone; cpu says what is missing."""
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_native_error", "No module named 'fastsam._native'")
    with fastsam.backend("auto"):
        CALLS[operator](*_maps())
    with fastsam.backend("cpu"), pytest.raises(RuntimeError, match=r"extension.*No module named 'fastsam\._native'"):
        CALLS[operator](*_maps())


def _fake_triton(monkeypatch: pytest.MonkeyPatch, triton: object) -> None:
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(backends, "triton_state", backends.triton_state.__wrapped__)


def _triton(version: str, interpret: bool) -> SimpleNamespace:
    return SimpleNamespace(__version__=version, knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=interpret)))


@pytest.mark.parametrize("operator", CALLS)
def test_without_triton(operator, monkeypatch):
    """auto and cpu do not miss it; triton says what is missing."""
    _fake_triton(monkeypatch, None)
    CALLS[operator](*_maps())
    with fastsam.backend("triton"), pytest.raises(RuntimeError, match=rf"{operator}.*'triton'.*cannot be imported"):
        CALLS[operator](*_maps())


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        (_triton("3.3.1", True), r"Triton 3\.4 or newer, this is 3\.3\.1"),
        (_triton("3.10.0", False), "these are on cpu, where TRITON_INTERPRET=1"),
        (_triton("4.0", True), None),
    ],
)
def test_what_triton_needs(monkeypatch, triton, reason):
    _fake_triton(monkeypatch, triton)
    got = backends.unsupported("lstm_gates", "triton", torch.device("cpu"), torch.float32)
    assert got is None if reason is None else re.search(reason, got)


def test_what_triton_serves(monkeypatch):
    _fake_triton(monkeypatch, _triton("3.6.0", True))

    def reason(device: str, dtype: torch.dtype) -> str | None:
        return backends.unsupported("lstm_gates", "triton", torch.device(device), dtype)

    assert "these tensors are torch.float64" in reason("cpu", torch.float64)
    assert "these are on meta" in reason("meta", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason("cuda:0", torch.float32) == "PyTorch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 1 else (8, 0))
    monkeypatch.setattr(backends, "_below_triton", backends._below_triton.__wrapped__)
    assert "needs compute capability 8.0, this card has 7.5" in reason("cuda:1", torch.float16)
    assert reason("cuda:0", torch.float16) is None


def test_what_cuda_needs(monkeypatch):
    """A card that nothing was compiled for is known before the call."""
    native = SimpleNamespace(cuda=SimpleNamespace(code_capability=lambda: 0, architectures="8.6"))
    monkeypatch.setattr(backends, "_native", native)
    monkeypatch.setattr(backends, "cuda_code", backends.cuda_code.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    reason = backends.unsupported("lstm_gates", "cuda", torch.device("cuda", 0), torch.float32)
    assert "compiled for compute capability 8.6" in reason and "device 0 of capability 7.5" in reason
    native.cuda.code_capability = lambda: 75
    assert backends.unsupported("lstm_gates", "cuda", torch.device("cuda", 0), torch.float32) is None
    assert backends.cuda_code(0) == (75, None)


def test_a_card_is_asked_once(monkeypatch):
    """While CUDA runs, what a card can do does not change."""
    asked = []
    monkeypatch.setattr(backends, "_unsupported_on_card", functools.cache(backends._unsupported_on_card.__wrapped__))
    monkeypatch.setattr(backends, "_unsupported", lambda *call: asked.append(call) or call[1])
    for initialized, calls in ((False, 2), (True, 3)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialized=initialized: initialized)
        for _ in range(2):
            assert backends.unsupported("lstm_gates", "cuda", torch.device("cuda", 1), torch.float32) == "cuda"
        assert len(asked) == calls
    assert backends.unsupported("lstm_gates", "triton", torch.device("cuda", 1), torch.float32) == "triton"
    assert backends.unsupported("lstm_gates", "cpu", torch.device("cpu"), torch.float32) == "cpu"
    assert asked[-1] == ("lstm_gates", "cpu", torch.device("cpu"), torch.float32)


def test_triton_is_not_imported_before_it_is_asked_for():
    code = "import sys, torch\nfastsam.SAM(2)(torch.ones(1, 2, 3, 3))\nprint('triton' in sys.modules)"
    result = _python(code, {**os.environ, "FASTSAM_BACKEND": "auto"})
    assert result.stdout.strip() == "False", result.stderr


def test_nested_contexts_restore():
    outside = backends.selected()
    with fastsam.backend("eager"):
        with fastsam.backend("auto"):
            assert backends.selected() == "auto"
        assert backends.selected() == "eager"
        with pytest.raises(KeyError), fastsam.backend("auto"):
            raise KeyError
        assert backends.selected() == "eager"
    assert backends.selected() == outside


def test_unknown_name():
    outside = backends.selected()
    with pytest.raises(ValueError, match=r"'nonsense'.*'auto', 'eager', 'cpu'"), fastsam.backend("nonsense"):
        pass
    assert backends.selected() == outside


def test_the_backward_pass_stays_on_its_back_end(broken_eager):
    require_native()
    gates, c = _maps()
    gates.requires_grad_()
    with fastsam.backend("cpu"):
        h, _ = ops.lstm_gates(gates, c)
    with fastsam.backend("eager"):
        h.sum().backward()
    assert gates.grad.isfinite().all()


def _python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import fastsam, fastsam.backends\n{code}"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_environment_variable():
    result = _python("print(fastsam.backends.selected())", {**os.environ, "FASTSAM_BACKEND": "eager"})
    assert result.stdout.strip() == "eager", result.stderr


def test_environment_variable_with_an_unknown_name():
    result = _python("", {**os.environ, "FASTSAM_BACKEND": "nonsense"})
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "FASTSAM_BACKEND" in last and "'nonsense'" in last and "'eager'" in last


def test_an_instruction_set_that_is_not_there():
    require_native()
    result = _python("", {**os.environ, "FASTSAM_CPU_ISA": "nonsense"})
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "FASTSAM_CPU_ISA" in last and "'nonsense'" in last and "generic" in last


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The operators agree with eager on each instruction set that this processor has."""
    require_native()
    native = backends.native_module()
    assert native is not None
    result = _python(_AGREES, {**os.environ, "FASTSAM_CPU_ISA": isa})
    if "this build and processor offer" in result.stderr:
        pytest.skip(f"no {isa} here")
    assert result.stdout.split() == [isa, "agrees"], result.stderr


_AGREES = """
import torch
sam = fastsam.SAM(13, 4, dtype=torch.float64)
cell = fastsam.modules.CMSLSTMCell(13, 13, scales=(1,), dtype=torch.float64)
both = torch.nn.ModuleList([sam, cell])
h = torch.randn(2, 13, 7, 9, dtype=torch.float64)
def run(name):
    with fastsam.backend(name):
        both.zero_grad()
        outputs = [*sam(*sam(h, h)), *cell(h, (h, h))[1]]
        sum(output.square().sum() for output in outputs).backward()
    return [*outputs, *(parameter.grad for parameter in both.parameters())]
for left, right in zip(run("cpu"), run("eager")):
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
print(fastsam.backends.native_module().cpu_isa(), "agrees")
"""
