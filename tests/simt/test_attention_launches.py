"""How the CUDA kernels of the attention operators are launched: blocks and shared memory for sizes and cards."""

import re
from collections.abc import Callable

import pytest
import torch
from attention_calls import Way, plan_backward, plan_forward, sizes
from kernel_build import KernelFault, Kernels

KIBIBYTES = {61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a block may have, by compute capability times ten: CUDA C++ Programming Guide, appendix on
compute capabilities."""

PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "half": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}

MULTIPROCESSORS = [1, 20, 28, 40, 64, 82, 128, 132]


@pytest.fixture(scope="module")
def kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("attention.cu")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", KIBIBYTES)
@pytest.mark.parametrize(("most_channels", "keys"), [(128, None), (128, 16), (64, "channels")], ids=str)
def test_every_card_has_the_shared_memory(
    kernels: Kernels, capability: int, precision: str, most_channels: int, keys: int | str | None
) -> None:
    way = Way(PRECISIONS[precision][0], capability, PRECISIONS[precision][1])
    for channels in range(1, most_channels + 1):
        inputs = sizes(8, channels, channels, 256, [channels if keys == "channels" else keys] * 2)  # type: ignore[list-item]
        for multiprocessors in (1, 132):
            for plan in (plan_forward, plan_backward):
                shared_bytes = plan(kernels, way, inputs, multiprocessors).shared_bytes
                assert shared_bytes <= KIBIBYTES[capability] * 1024, f"{plan.__name__}, {channels} channels"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keys", [None, 16], ids=["folded", "projected"])
def test_small_maps_fill_a_card(kernels: Kernels, precision: str, keys: int | None) -> None:
    """Three of four multiprocessors at least: batch 8 at 16 x 16 are 32 tiles of 64 queries, or 128 of 16."""
    way = Way(PRECISIONS[precision][0], 90, PRECISIONS[precision][1])
    inputs = sizes(8, 64, 64, 256, [keys, keys])
    for multiprocessors in MULTIPROCESSORS:
        wanted = 3 * multiprocessors / 4
        assert plan_forward(kernels, way, inputs, multiprocessors).blocks >= wanted
        assert plan_backward(kernels, way, inputs, multiprocessors).attend_blocks >= wanted


def test_large_maps_have_large_tiles(kernels: Kernels) -> None:
    way = Way(torch.bfloat16, 90)
    for multiprocessors in MULTIPROCESSORS:
        inputs = sizes(8, 64, 64, 4096, [None, None])
        forward = plan_forward(kernels, way, inputs, multiprocessors)
        assert (forward.rows, forward.blocks) == (64, 8 * 4096 // 64)
        backward = plan_backward(kernels, way, inputs, multiprocessors)
        assert (backward.rows, backward.attend_blocks) == (64, 4 * 8 * 4096 // 64)


@pytest.mark.parametrize("keys", [None, 16], ids=["folded", "projected"])
def test_tiles_are_copied_ahead_where_the_card_can(kernels: Kernels, keys: int | None) -> None:
    inputs = sizes(8, 64, 64, 256, [keys])
    for capability in KIBIBYTES:
        for plan in (plan_forward, plan_backward):
            stages = plan(kernels, Way(torch.float16, capability), inputs, 20).stages
            assert stages == (2 if capability >= 80 else 1), f"{plan.__name__}, capability {capability}"


def test_two_blocks_find_room_before_tiles_are_copied_ahead(kernels: Kernels) -> None:
    """128 channels in float32 take more than half of the 99 KiB of 8.6 with two tiles, not of the 163 KiB of 8.0."""
    inputs = sizes(8, 128, 128, 256, [16])
    assert plan_forward(kernels, Way(torch.float32, 86), inputs, 132).stages == 1
    assert plan_forward(kernels, Way(torch.float32, 80), inputs, 132).stages == 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", [61, 75, 86, 90])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_too_many_channels_for_a_card(kernels: Kernels, name: str, capability: int, precision: str) -> None:
    way = Way(PRECISIONS[precision][0], capability, PRECISIONS[precision][1])
    for keys in ([512], [16, 16]):
        operator = "self_attention" if len(keys) == 1 else "double_attention"
        beginning = (
            f"{operator} {name} (batch 8, channels 2048, value channels 96, positions 256) on CUDA device 0 needs "
        )
        end = ' KiB: use fewer channels, or fastsam.backend("eager")'
        plan = plan_forward if name == "forward" else plan_backward
        with pytest.raises(KernelFault) as fault:
            plan(kernels, way, sizes(8, 2048, 96, 256, keys), 20)
        found = re.fullmatch(
            re.escape(beginning) + r"(\d+) KiB of shared memory a block, this card has (\d+)" + re.escape(end),
            str(fault.value),
        )
        assert found is not None, fault.value
        needed, available = found.groups()
        assert int(available) == KIBIBYTES[capability]
        assert int(needed) > int(available)


def test_too_many_value_channels(kernels: Kernels) -> None:
    inputs = sizes(1, 16, 257, 64, [None])
    with pytest.raises(KernelFault, match=r"value channels 257, .* serves at most 256 value channels"):
        plan_forward(kernels, Way(torch.float32, 90), inputs, 20)
