"""What is measured: the groups, their shapes, and their inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS, ATTENTION_CHANNELS, KERNEL_SIZE = 64, 16, 5
"""C, D and k of the paper."""

LAYERS, FRAME_SIZE, INPUT_FRAMES = 4, 64, 10
"""The paper's MovingMNIST configuration: 64x64 frames, 10 read and 10 predicted."""

SAM, ATTENTION, CELL, GATES, LSTM_GATES, TRAINING = (
    "SAM",
    "double attention",
    "SA-ConvLSTM cell",
    "separable gates",
    "LSTM gates",
    "training iteration",
)
GROUPS = (SAM, TRAINING, ATTENTION, CELL, GATES, LSTM_GATES)
"""In the order in which they run: what matters most first."""

TRAINED_MODELS = ("ConvLSTM", "base model", "SA-ConvLSTM")

OPERATORS = {
    SAM: ("double_attention", "separable_gates"),
    ATTENTION: ("double_attention",),
    CELL: ("double_attention", "separable_gates", "lstm_gates"),
    GATES: ("separable_gates",),
    LSTM_GATES: ("lstm_gates",),
    TRAINING: ("double_attention", "self_attention", "separable_gates", "lstm_gates"),
}
"""The operators of fastsam that a group calls."""


@dataclass(frozen=True)
class Case:
    """One group at one shape in one direction; its variants are timed together.

    size: height and width of the maps. backward: forward and backward, else forward alone without gradients.
    frames: frames read, and as many predicted, in a training iteration; 0 elsewhere.
    """

    group: str
    size: int
    batch: int
    backward: bool
    frames: int = 0

    @property
    def direction(self) -> str:
        return "forward + backward" if self.backward else "forward"

    @property
    def models(self) -> tuple[str, ...]:
        """What is compared within the case: three models in a training iteration, the group itself elsewhere."""
        return TRAINED_MODELS if self.group == TRAINING else (self.group,)

    @property
    def patch_size(self) -> int:
        return FRAME_SIZE // self.size

    def __str__(self) -> str:
        frames = f", {self.frames} + {self.frames} frames" if self.frames else ""
        return f"{self.group}, {self.size}x{self.size}, batch {self.batch}{frames}, {self.direction}"


def speed_cases(device_type: str, quick: bool) -> list[Case]:
    """All timed cases; `quick` keeps the small maps, both directions for SAM only, and short sequences."""
    maps = [(16, 8), (32, 8)] if quick else [(16, 8), (32, 8), (64, 2 if device_type == "cpu" else 8), (128, 1)]
    batches = [] if quick else [(32, 1), (32, 2), (32, 4)]
    cases = []
    for group in GROUPS:
        directions = (True,) if quick and group != SAM else (False, True)
        if group == TRAINING:
            shapes, frames = [(size, 8) for size in ((16,) if quick else (16, 32))], 2 if quick else INPUT_FRAMES
        else:
            shapes, frames = maps + (batches if group == SAM else []), 0
        cases += [Case(group, size, batch, backward, frames) for size, batch in shapes for backward in directions]
    return cases


def memory_cases(quick: bool) -> list[Case]:
    """The cases whose peak memory is measured: SAM against N and against the batch."""
    shapes = [(16, 1), (32, 1)] if quick else [(16, 1), (32, 1), (64, 1), (128, 1), (32, 2), (32, 4), (32, 8)]
    return [Case(SAM, size, batch, backward=True) for size, batch in shapes]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The same random inputs for every variant; they ask for gradients where the case has a backward pass."""
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int) -> Tensor:
        values = torch.randn(case.batch, channels, case.size, case.size, generator=generator)
        return values.to(device, dtype).requires_grad_(case.backward)

    c = CHANNELS
    if case.group == TRAINING:
        frames = torch.rand(case.batch, 2 * case.frames, 1, FRAME_SIZE, FRAME_SIZE, generator=generator)
        return [frames.to(device, dtype)]
    channels = {SAM: [c, c], ATTENTION: [c, c], CELL: [c] * 4, GATES: [c] * 3, LSTM_GATES: [4 * c, 4 * c, c]}
    return [draw(count) for count in channels[case.group]]
