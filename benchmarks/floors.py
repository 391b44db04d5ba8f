"""The least work that a case needs: floating-point operations, and bytes that must be read or written.

The operations are those of the best known algorithm in O(N) memory: keys projected, values folded behind the softmax,
scores computed again in the backward pass. A pair of positions costs, for each source (C channels, D of the keys):

    forward     scores 2 D, average 2 C
    backward    scores 2 D, dP = dR^T x 2 C, dx from P 2 C, dx and dq from dE 4 D

A convolution costs the same for each of its output, its input gradient and its weight gradient.
"""

from typing import NamedTuple

from benchmarks.cases import (
    ATTENTION,
    ATTENTION_CHANNELS,
    CELL,
    CHANNELS,
    GATES,
    KERNEL_SIZE,
    LAYERS,
    LSTM_GATES,
    SAM,
    Case,
)

C, D, K = CHANNELS, ATTENTION_CHANNELS, KERNEL_SIZE


class Work(NamedTuple):
    """Floating-point operations and bytes of one call."""

    flops: float
    bytes: float

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> float:
        """The time that a machine of these rates needs at least."""
        return max(self.flops / flops_a_second, self.bytes / bytes_a_second)


def work(model: str, case: Case, itemsize: int) -> Work:
    """The least work of a model in a case, for elements of `itemsize` bytes."""
    if case.frames:
        return _training(model, case, itemsize)
    flops = _pairs(_SOURCES.get(model, 0), case) + _linear(_FLOPS[model], case)
    return Work(flops, _MAPS[model][case.backward] * C * case.batch * case.size**2 * itemsize)


def quadratic_bytes(case: Case, itemsize: int) -> float:
    """About what a form that holds N x N matrices keeps of them: the softmax of each source, and transient copies.

    A training iteration keeps one for each source, layer and step.
    """
    matrix = case.batch * case.size**4 * itemsize
    if not case.backward:
        return 2 * matrix
    kept = 2 * LAYERS * (2 * case.frames - 1) if case.frames else 2
    return (kept + 3) * matrix


_ATTENTION_FLOPS = 2 * (3 * C * D + 2 * C * C)  # one query, and for each source a key and a folded value
_SELF_ATTENTION_FLOPS = 2 * (2 * C * D + C * C)
_GATES_FLOPS = 2 * (K * K * 2 * C + 2 * C * 3 * C)
_CONVOLUTIONS_FLOPS = 2 * K * K * 2 * C * 4 * C

_SOURCES = {ATTENTION: 2, SAM: 2, CELL: 2, "base model": 2, "SA-ConvLSTM": 2}
_FLOPS = {
    ATTENTION: _ATTENTION_FLOPS,
    SAM: _ATTENTION_FLOPS + _GATES_FLOPS,
    CELL: _ATTENTION_FLOPS + _GATES_FLOPS + _CONVOLUTIONS_FLOPS,
    GATES: _GATES_FLOPS,
    LSTM_GATES: 0,
    "ConvLSTM": _CONVOLUTIONS_FLOPS,
    "base model": 2 * _SELF_ATTENTION_FLOPS + _CONVOLUTIONS_FLOPS,
    "SA-ConvLSTM": _ATTENTION_FLOPS + _GATES_FLOPS + _CONVOLUTIONS_FLOPS,
}
"""Forward operations at a position, without those of the pairs."""

_MAPS = {
    # h, m -> z; backward also reads them and dz, and writes dh, dm
    ATTENTION: (3, 3 + 5),
    # h, m -> h^, m'; then h, m, dh^, dm' -> dh, dm
    SAM: (4, 4 + 6),
    # x, h, c, m -> h^, c', m'; then these four and three gradients -> four gradients
    CELL: (7, 7 + 11),
    # z, h, m -> h^, m'; then z, h, m, dh^, dm' -> dz, dh, dm
    GATES: (5, 5 + 8),
    # two times four gates, c -> h, c'; then gates, c, dh, dc' -> dgates, dc
    LSTM_GATES: (11, 11 + 20),
}
"""Maps of C channels that must be read or written: forward, and forward + backward."""


def _pairs(sources: int, case: Case) -> float:
    a_pair = 2 * D + 2 * C + (6 * D + 4 * C if case.backward else 0)
    return sources * a_pair * case.batch * case.size**4


def _linear(flops: float, case: Case) -> float:
    return flops * case.batch * case.size**2 * (3 if case.backward else 1)


def _training(model: str, case: Case, itemsize: int) -> Work:
    """All steps; of the bytes only the input and output maps of each layer are counted, an underestimate."""
    patch_channels = case.patch_size**2
    a_layer = _pairs(_SOURCES.get(model, 0), case) + _linear(_FLOPS[model], case)
    embedding_and_output = _linear(2 * 2 * patch_channels * C, case)
    steps = 2 * case.frames - 1
    maps = LAYERS * 2 * C * case.batch * case.size**2 * (3 if case.backward else 1)
    return Work(steps * (LAYERS * a_layer + embedding_and_output), steps * maps * itemsize)
