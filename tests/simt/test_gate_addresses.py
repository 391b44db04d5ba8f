"""Offsets of maps with more than 2^32 numbers in the CUDA kernels of the gates."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy
import pytest
from addresses import SPACE, Touched, assert_to_the_end, new_addresses, run_blocks
from attention_calls import WAYS
from call_fields import Way
from kernel_build import Kernels

from fastsam.ops._gates.update import Update

LARGE_CARD = 2**20
"""Multiprocessors of a card that gets many small parts of the work: blocks whose loops are short."""

# lstm_gates, memory_gates and norm_gate.

MAPS = {
    "many_samples": (2**20 + 1, 1024, 4),
    "large_maps": (33, 3, 2**27 + 1),
    "long_rows": (1, 1, 2**32 + 2**10),
    "strided": (3, 5, 64),
}
"""Batch, channels and positions. Rows of the second are no multiples of a vector long."""

ROW_STRIDES = {"strided": 2**31 + 8}
"""Of inputs that are not contiguous."""


class Gates(NamedTuple):
    """A call with two terms. norms: a letter a term, as for gate_calls.draw."""

    update: Update
    norms: str
    maps: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.update.kind}-{self.norms}-{self.maps}-{self.dtype}"

    def inputs(self, address: Iterator[int]) -> list[int]:
        fields = [*MAPS[self.maps], int("p" in self.norms), *self.update.fields]
        for norm in self.norms:
            fields += [*self.map(self.update.gates, address), *self.weights(norm, address)]
        return [*fields, *self.map(1, address)]

    def map(self, gates: int, address: Iterator[int]) -> list[int]:
        _, channels, positions = MAPS[self.maps]
        stride = ROW_STRIDES.get(self.maps, positions)
        return [next(address), gates * channels * stride, stride]

    def weights(self, norm: str, address: Iterator[int]) -> list[int]:
        return [0, 0] if norm == "-" else [next(address), next(address)]

    def statistics(self, address: Iterator[int]) -> list[int]:
        return [0 if norm == "-" else next(address) for norm in self.norms]

    def run_forward(self, kernels: Kernels, kernel: str, blocks: Iterable[int]) -> list[Touched]:
        address = new_addresses()
        fields = [*self.inputs(address), next(address), next(address), *self.statistics(address)]
        call, space = getattr(kernels, f"forward_{self.dtype}"), (next(address), SPACE, LARGE_CARD)
        return run_blocks(kernels, kernel, blocks, lambda: call(numpy.array(fields), 1.0, 1e-5, *space))

    def run_backward(self, kernels: Kernels, kernel: str, blocks: Iterable[int]) -> list[Touched]:
        address = new_addresses()
        fields = [*self.inputs(address), *self.map(1, address), *self.map(1, address), *self.statistics(address)]
        for norm in self.norms:
            fields += [next(address), *self.weights(norm, address)]
        fields += [next(address)]
        call, space = getattr(kernels, f"backward_{self.dtype}"), (next(address), SPACE, LARGE_CARD)
        return run_blocks(kernels, kernel, blocks, lambda: call(numpy.array(fields), 1.0, *space))


UPDATES = [Update("lstm", "hidden", 1.0), Update("memory", "hidden"), Update("product", "tanh", 1.0)]
DTYPES = ["float32", "float16"]


def gates_with(**norms: list[str]) -> pytest.MarkDecorator:
    """Calls with these maps and norms. With norms of positions a block takes all samples: they must not be many."""
    calls = [
        Gates(update, of_terms, maps, dtype)
        for maps, choices in norms.items()
        for of_terms in choices
        for update in UPDATES
        for dtype in DTYPES
    ]
    return pytest.mark.parametrize("gates", calls, ids=str)


@pytest.fixture(scope="module")
def lstm(compile_host: Callable[..., Kernels]) -> Kernels:
    kernels = compile_host("lstm_gates.cu")
    kernels.schedule(None)
    return kernels


@gates_with(many_samples=["--", "cc"], large_maps=["--", "cc", "pp"], long_rows=["--", "pp"])
def test_gates(lstm: Kernels, gates: Gates) -> None:
    has_weights = (gates.norms, gates.maps) == ("pp", "long_rows")
    objects = gates.run_forward(lstm, "lstm_gates_forward", [0, -1])
    assert_to_the_end(objects, ["x", "c", *(["weight", "bias"] if has_weights else [])], ["h", "c_new"])
    objects = gates.run_backward(lstm, "lstm_gates_backward", [0, -1])
    assert_to_the_end(objects, ["x", "c", "dh", "dc_new"], ["dc"])
    dx = [one for one in objects if one.name == "dx"]
    assert_to_the_end(dx if gates.norms == "--" else dx[:1], written=["dx"])  # with norms the next launch has the rest
    if (gates.norms, gates.maps, gates.update.kind) == ("cc", "many_samples", "lstm"):
        assert_to_the_end(objects, written=["sums of channels"])


@gates_with(strided=["--", "cc", "pp"])
def test_gates_of_strided_maps(lstm: Kernels, gates: Gates) -> None:
    objects = gates.run_forward(lstm, "lstm_gates_forward", [0, -1])
    assert_to_the_end(objects, ["x", "c"])
    objects = gates.run_backward(lstm, "lstm_gates_backward", [0, -1])
    assert_to_the_end(objects, ["x", "c", "dh", "dc_new"])


@gates_with(many_samples=["cc"], strided=["cc"])
def test_moments(lstm: Kernels, gates: Gates) -> None:
    """The last blocks, two for a sample at most, are those of the second term."""
    objects = gates.run_forward(lstm, "lstm_moments", [0, -2, -1])
    _, second = (one for one in objects if one.name == "x")
    assert_to_the_end([second], ["x"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_long_rows(lstm: Kernels, dtype: str) -> None:
    """128 blocks take turns at the chunks of this row, and the last chunk is for the first of them."""
    gates = Gates(Update("product", "tanh", 1.0), "cc", "long_rows", dtype)
    _, second = (one for one in gates.run_forward(lstm, "lstm_moments", [-128]) if one.name == "x")
    assert_to_the_end([second], ["x"])


@gates_with(many_samples=["cc"], large_maps=["cc", "pp"], long_rows=["pp"])
def test_norm_backward(lstm: Kernels, gates: Gates) -> None:
    rows, warps = gates.update.gates * MAPS[gates.maps][1], 8  # a warp a row, where samples are many
    blocks = [rows // warps - 1] if gates.maps == "many_samples" else []
    objects = gates.run_backward(lstm, "lstm_norm_backward", [0, *blocks, -1])
    assert_to_the_end(objects, ["x"], ["dx"])
    if gates.update.kind != "lstm":
        return
    if gates.maps == "many_samples":
        assert_to_the_end(objects, ["sums of channels"])  # of the first sample's last block
    elif gates.maps == "long_rows":
        assert_to_the_end(objects, ["weight"], ["dweight", "dbias"])
    elif gates.norms == "pp":
        assert_to_the_end(objects, ["gradients of weights so far"], ["gradients of weights so far"])


# separable_gates.


class Separable(NamedTuple):
    """A call with contiguous maps, or with these strides of the inputs, as batch and channel."""

    batch: int
    channels: int
    z_channels: int
    size: tuple[int, int]
    kernel_size: int
    strides: tuple[int, int] | None = None

    @property
    def positions(self) -> int:
        return self.batch * self.size[0] * self.size[1]

    @property
    def inputs(self) -> int:
        return self.channels + self.z_channels

    def map(self, channels: int, address: Iterator[int]) -> list[int]:
        area = self.size[0] * self.size[1]
        return [next(address), *(self.strides or (channels * area, area))]

    def fields(self, address: Iterator[int]) -> list[int]:
        channels = self.channels
        maps = [part for count in (self.z_channels, channels, channels) for part in self.map(count, address)]
        depthwise, pointwise, bias = itertools.islice(address, 3)
        sizes = [self.batch, channels, self.z_channels, *self.size, self.kernel_size]
        return [*sizes, *maps, depthwise if self.kernel_size else 0, pointwise, bias]

    def run_forward(self, kernels: Kernels, way: Way, blocks: Iterable[int]) -> list[Touched]:
        address = new_addresses()
        fields = [*self.fields(address), next(address), next(address)]
        call = way.function(kernels, "forward")
        arguments = (numpy.array(fields), *way.card(LARGE_CARD))
        return run_blocks(kernels, "separable_gates_forward", blocks, lambda: call(*arguments))

    def run_backward(self, kernels: Kernels, way: Way, launch: str, blocks: Iterable[int]) -> list[Touched]:
        address = new_addresses()
        fields = [*self.fields(address), *self.map(self.channels, address), *self.map(self.channels, address)]
        dz, dh, dm, ddepthwise, dpointwise, dbias = itertools.islice(address, 6)
        fields += [dz, dh, dm, ddepthwise if self.kernel_size else 0, dpointwise, dbias]
        call = way.function(kernels, "backward")
        arguments = (numpy.array(fields), next(address), SPACE, *way.card(LARGE_CARD))
        return run_blocks(kernels, f"separable_gates_backward_{launch}", blocks, lambda: call(*arguments))


MANY_SAMPLES = Separable(2**16 + 2**11, 1024, 1024, (9, 7), 3)
CALLS = {
    "many_samples": MANY_SAMPLES,
    "no_filter": MANY_SAMPLES._replace(size=(4, 16), kernel_size=0),
    "large_maps": Separable(1, 4, 4, (2**16, 2**16 + 8), 5),
}
STRIDED = Separable(3, 20, 20, (8, 8), 5, (2**34 + 4, 2**30 + 4))

each_way = pytest.mark.parametrize("way", ["float32", "half_16"])
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(scope="module")
def separable(compile_host: Callable[..., Kernels]) -> Kernels:
    kernels = compile_host("separable_gates.cu")
    kernels.schedule(None)
    return kernels


@each_way
@each_call
def test_separable_gates_forward(separable: Kernels, name: str, way: str) -> None:
    objects = CALLS[name].run_forward(separable, WAYS[way], [0, -1])
    assert_to_the_end(objects, ["z", "h", "m"], ["h_hat", "m_new"])


@each_way
def test_separable_gates_of_strided_maps(separable: Kernels, way: str) -> None:
    assert_to_the_end(STRIDED.run_forward(separable, WAYS[way], [0, -1]), ["z", "h", "m"])
    objects = STRIDED.run_backward(separable, WAYS[way], "gates", [0, -1])
    assert_to_the_end(objects, ["z", "h", "m", "dh_hat", "dm_new"])
    objects = STRIDED.run_backward(separable, WAYS[way], "channels", [STRIDED.z_channels - 1, STRIDED.inputs - 1])
    assert_to_the_end(objects, ["z", "h"])


@each_way
@each_call
def test_separable_gates_backward_gates(separable: Kernels, name: str, way: str) -> None:
    """The last tile comes once for each 32 channels, and u is written for the first of them."""
    call = CALLS[name]
    groups = -(-call.channels // 32)
    objects = call.run_backward(separable, WAYS[way], "gates", [0, -groups, -1])
    assert_to_the_end(objects, ["z", "h", "m", "dh_hat", "dm_new"], ["dm", "u", "dgates"])


@each_way
@each_call
def test_separable_gates_backward_products(separable: Kernels, name: str, way: str) -> None:
    """Parts of dpointwise come first, then tiles of 64 x 64 of du, those of h after those of z."""
    call = CALLS[name]
    tiles_of_du, tiles_of_h = -(-call.inputs // 64) * -(-call.positions // 64), -(-call.channels // 64)
    objects = call.run_backward(separable, WAYS[way], "products", [0, -tiles_of_du - 1, -tiles_of_h - 1, -1])
    assert_to_the_end(objects, ["dgates", "u"], ["du"] if call.kernel_size else ["dz", "dh"])
    if name != "large_maps":
        assert_to_the_end(objects, written=["parts of dpointwise"])


@each_way
@pytest.mark.parametrize("name", ["many_samples", "no_filter"])
def test_separable_gates_backward_channels(separable: Kernels, name: str, way: str) -> None:
    """The last channels of z and of h, then the sums: 256 numbers of dpointwise a block, and a row of dbias. A block
    goes through all positions: here there are more channels instead."""
    call = CALLS[name]._replace(batch=2**11 + 2**6, channels=2**15, z_channels=2**15)
    channels = call.inputs if call.kernel_size else 0
    of_pointwise = -(-3 * call.channels * call.inputs // 256)
    of_channels = [call.z_channels - 1, channels - 1] if channels else []
    objects = call.run_backward(separable, WAYS[way], "channels", [*of_channels, channels + of_pointwise - 1, -1])
    assert_to_the_end(objects, ["dgates", "parts of dpointwise"])
    if channels:
        assert_to_the_end(objects, ["z", "h", "du"], ["dz", "dh"])
