"""The peers: everything that fastsam is compared with, and fastsam itself.

| peer | what it is |
|---|---|
| eager | plain PyTorch, unfused (`benchmarks.plain`): every other variant is checked against it before it is timed |
| SDPA | the same with one F.scaled_dot_product_attention call, preparation inside the clock |
| torch.compile | the eager form, compiled; on a GPU also max-autotune and reduce-overhead |
| FlexAttention | on a GPU: the form with flex_attention, compiled |
| fastsam | this package with the back end that `auto` picks |
| fastsam NAME | its other back ends that serve the call, but for the long training iterations |
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastsam
from benchmarks import plain
from benchmarks.cases import (
    ATTENTION,
    ATTENTION_CHANNELS,
    CELL,
    CHANNELS,
    GATES,
    KERNEL_SIZE,
    LAYERS,
    LSTM_GATES,
    OPERATORS,
    SAM,
    TRAINED_MODELS,
    TRAINING,
    Case,
)
from fastsam import backends

Builder = Callable[[str, Case], nn.Module]
"""Builds the module of a model (`Case.models`) for a case."""

FASTSAM, EAGER = "fastsam", "eager"
_WITH_ATTENTION = frozenset({ATTENTION, SAM, CELL, "base model", "SA-ConvLSTM"})
_EVERYTHING = frozenset({ATTENTION, SAM, CELL, GATES, LSTM_GATES, *TRAINED_MODELS})


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    models: those it exists for. compile_mode: of torch.compile, None leaves the module as it is. backend: of fastsam.
    quadratic: holds N x N matrices. backward_only: left out of the forward cases, to save time.
    """

    name: str
    build: Builder
    models: frozenset[str] = _EVERYTHING
    compile_mode: str | None = None
    backend: str | None = None
    quadratic: bool = False
    backward_only: bool = False

    def module(self, model: str, case: Case) -> nn.Module:
        """The module, not compiled yet."""
        return self.build(model, case)

    def compiled(self, module: nn.Module) -> nn.Module:
        """The module as it is called. Of a model the cell is compiled, not its loop over the frames."""
        if self.compile_mode is None:
            return module
        targets = module.forecaster.cells if isinstance(module, _Forecast) else [module]
        for target in targets:
            target.compile(dynamic=False, mode=None if self.compile_mode == "default" else self.compile_mode)
        return module

    def selected(self) -> contextlib.AbstractContextManager[Any]:
        """The context to call the module in."""
        return contextlib.nullcontext() if self.backend is None else fastsam.backend(self.backend)


def peers(case: Case, device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """The peers of a case, eager first and fastsam last."""
    eager = partial(_plain, plain.attend_eager)
    found = [
        Peer(EAGER, eager, quadratic=True),
        Peer("SDPA", partial(_plain, plain.attend_sdpa), _WITH_ATTENTION),
        Peer("torch.compile", eager, compile_mode="default", quadratic=True),
    ]
    if device.type == "cuda":
        flex = partial(_plain, plain.attend_flex)
        options: dict[str, Any] = {"models": frozenset({SAM}), "quadratic": True, "backward_only": True}
        found += [
            Peer("max-autotune", eager, compile_mode="max-autotune", **options),
            Peer("reduce-overhead", eager, compile_mode="reduce-overhead", **options),
            Peer("FlexAttention", flex, frozenset({ATTENTION}), compile_mode="default"),
        ]
    operators = OPERATORS[case.group]
    chosen = {backends.explain(operator, device, dtype, case.size**2)[0] for operator in operators}
    # Without a card Triton's kernels are interpreted, which is for tests.
    names = [name for name in backends.NAMES[1:] if name != "triton" or device.type == "cuda"]
    for name in names:
        serves = all(backends.unsupported(operator, name, device, dtype) is None for operator in operators)
        # On a card every back end has a row of its own, from which `auto` is told what to choose.
        if case.group != TRAINING and serves and (chosen != {name} or device.type == "cuda"):
            found.append(Peer(f"{FASTSAM} {name}", _fast, backend=name, quadratic=name == "eager"))
    found.append(Peer(FASTSAM, _fast))
    return [peer for peer in found if case.backward or not peer.backward_only]


def _plain(attend: plain.Attend, model: str, case: Case) -> nn.Module:
    builders: dict[str, Callable[[], nn.Module]] = {
        ATTENTION: lambda: plain.DoubleAttention(attend),
        SAM: lambda: plain.SAM(attend),
        CELL: lambda: _Step(plain.SAConvLSTMCell(CHANNELS, CHANNELS, attend=attend, device=None, dtype=None)),
        GATES: plain.SeparableGates,
        LSTM_GATES: plain.NormalisedLSTMGates,
    }
    if case.group != TRAINING:
        return builders[model]()
    cells = {"ConvLSTM": plain.ConvLSTMCell, "base model": plain.BaseCell, "SA-ConvLSTM": plain.SAConvLSTMCell}
    return _Forecast(
        fastsam.Forecaster(
            cells[model], 1, (CHANNELS,) * LAYERS, patch_size=case.patch_size, embed_channels=CHANNELS, attend=attend
        ),
        case.frames,
    )


def _fast(model: str, case: Case) -> nn.Module:
    builders: dict[str, Callable[[], nn.Module]] = {
        ATTENTION: lambda: _FastAttention(CHANNELS, ATTENTION_CHANNELS, KERNEL_SIZE),
        SAM: lambda: fastsam.SAM(CHANNELS, ATTENTION_CHANNELS, KERNEL_SIZE),
        CELL: lambda: _Step(fastsam.SAConvLSTMCell(CHANNELS, CHANNELS, KERNEL_SIZE, layer_norm=True)),
        GATES: _FastGates,
        LSTM_GATES: _FastLSTMGates,
    }
    if case.group != TRAINING:
        return builders[model]()
    models = {"ConvLSTM": fastsam.ConvLSTM, "base model": fastsam.BaseModel, "SA-ConvLSTM": fastsam.SAConvLSTM}
    return _Forecast(models[model](patch_size=case.patch_size), case.frames)


class _FastAttention(fastsam.SAM):
    """The attention of `fastsam.SAM` alone. Its weights are folded at every call, as a model does once a sequence."""

    def forward(self, h: Tensor, m: Tensor) -> Tensor:  # type: ignore[override]
        *operands, key_h, key_m = self.fold()  # type: ignore[misc]
        return fastsam.ops.double_attention(h, m, *operands, key_h=key_h, key_m=key_m)


class _FastGates(plain.SeparableGates):
    def forward(self, z: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return fastsam.ops.separable_gates(z, h, m, self.depthwise.weight, self.pointwise.weight, self.pointwise.bias)


class _FastLSTMGates(plain.NormalisedLSTMGates):
    def forward(self, gates: Tensor, recurrent: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        norms = {
            "norm": (self.input_norm.weight, self.input_norm.bias),
            "recurrent_norm": (self.hidden_norm.weight, self.hidden_norm.bias),
        }
        return fastsam.ops.lstm_gates(gates, c, 1.0, recurrent=recurrent, eps=self.input_norm.eps, **norms)


class _Step(nn.Module):
    """One step of a cell as a function of maps: (x, h, c, m) -> the next (h, c, m)."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.cell(x, state)[1])


class _Forecast(nn.Module):
    """All next-frame predictions of a sequence read as it truly was, as at the beginning of scheduled sampling."""

    def __init__(self, forecaster: nn.Module, read: int) -> None:
        super().__init__()
        self.forecaster = forecaster
        self.read = read

    def forward(self, frames: Tensor) -> Tensor:
        past, future = frames.split([self.read, frames.shape[1] - self.read], dim=1)
        return self.forecaster(past, future.shape[1], truth=future[:, :-1], all_steps=True)
