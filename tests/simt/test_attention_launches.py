"""How the CUDA kernels of the attention operators are launched: blocks and shared memory for sizes and cards."""

import re
from collections.abc import Callable

import pytest
import torch
from attention_calls import (
    MANY,
    WAYS,
    BackwardPlan,
    ForwardPlan,
    forward,
    make,
    plan_backward,
    plan_forward,
    plan_gates,
    sizes,
)
from call_fields import Way
from kernel_build import KernelFault, Kernels

KIBIBYTES = {61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a block may have, by compute capability times ten: CUDA C++ Programming Guide, appendix on
compute capabilities."""

PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "half": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float64": (torch.float64, False),
}

MULTIPROCESSORS = [1, 20, 28, 40, 64, 82, 128, 132]


@pytest.fixture(scope="module")
def kernels(compile_host: Callable[..., Kernels]) -> Kernels:
    return compile_host("attention.cu")


PLANS: list[Callable[..., ForwardPlan | BackwardPlan]] = [plan_forward, plan_gates, plan_backward]


def _assert_it_fits(kernels: Kernels, way: Way, channels: int, keys: int | None) -> None:
    inputs = sizes(8, channels, channels, 256, [keys] * 2)
    for multiprocessors in (1, 132):
        for plan in PLANS:
            shared_bytes = plan(kernels, way, inputs, multiprocessors).shared_bytes
            assert shared_bytes <= KIBIBYTES[way.capability] * 1024, f"{plan.__name__}, {channels} channels, D = {keys}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", KIBIBYTES)
def test_every_card_has_the_shared_memory(kernels: Kernels, capability: int, precision: str) -> None:
    """For 128 channels, with key maps of any size and without; in float64 for 64, and for 128 from 8.0 on."""
    way = Way(PRECISIONS[precision][0], capability, PRECISIONS[precision][1])
    most_channels = 64 if precision == "float64" and capability < 80 else 128
    for channels in {1, 16, 33, 64, 97, 128, *range(7, 129, 11)}:
        if channels > most_channels:
            continue
        for keys in {1, 16, channels // 2, channels, None} - {0}:
            if keys is None or keys <= channels:
                _assert_it_fits(kernels, way, channels, keys)


@pytest.mark.parametrize("plan", PLANS, ids=["forward", "gates", "backward"])
def test_float64_beyond_64_channels(kernels: Kernels, plan: Callable[..., ForwardPlan | BackwardPlan]) -> None:
    """7.0 has the memory for 128, and 7.5 with up to 16 query channels."""
    for capability, keys in ((70, None), (70, 16), (70, 128), (75, 16)):
        plan(kernels, Way(torch.float64, capability), sizes(8, 128, 128, 256, [keys]), 28)


def test_all_keys_are_made_at_once_where_they_fit(kernels: Kernels) -> None:
    """So it is with C = 64 on every card, and with C = 128 where 64 rows fit beside the weights of the keys."""
    for precision, (dtype, tf32) in PRECISIONS.items():
        if dtype == torch.float64:
            continue
        for capability in KIBIBYTES:
            for keys in (8, 16, 64):
                way, inputs = Way(dtype, capability, tf32), sizes(8, 64, 64, 1024, [keys] * 2)
                assert plan_forward(kernels, way, inputs, 28).keys_at_once == 0, (precision, capability)
                assert plan_backward(kernels, way, inputs, 28).rows_take_turns == 0, (precision, capability)
    plan = plan_forward(kernels, Way(torch.float32, 61), sizes(8, 128, 128, 1024, [16]), 28)
    assert plan.keys_at_once == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("keys", [None, 16], ids=["folded", "projected"])
def test_small_maps_fill_a_card(kernels: Kernels, precision: str, sources: int, keys: int | None) -> None:
    """Three of four multiprocessors at least: batch 8 at 16 x 16 are 32 tiles of 64 queries, or 128 of 16."""
    way = Way(PRECISIONS[precision][0], 90, PRECISIONS[precision][1])
    inputs = sizes(8, 64, 64, 256, [keys] * sources)
    for multiprocessors in MULTIPROCESSORS:
        wanted = 3 * multiprocessors / 4
        assert plan_forward(kernels, way, inputs, multiprocessors).blocks >= wanted
        assert plan_backward(kernels, way, inputs, multiprocessors).attend_blocks >= wanted


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("sources", [1, 2])
def test_backward_tiles_are_small_only_where_large_ones_leave_a_card_idle(
    kernels: Kernels, sources: int, channels: int
) -> None:
    """Both roles of each source have 32 tiles of 64 rows: 64 blocks fill up to 85 multiprocessors, 128 up to 170."""
    inputs, largest = sizes(8, channels, channels, 256, [16] * sources), 85 * sources
    for capability in (80, 90):
        way = Way(torch.bfloat16, capability)
        large, small = (plan_backward(kernels, way, inputs, count) for count in (largest, largest + 1))
        assert (large.rows, large.attend_blocks, large.prepare_blocks) == (64, 64 * sources, 32 * sources)
        assert (small.rows, small.attend_blocks, small.prepare_blocks) == (16, 256 * sources, 128 * sources)


@pytest.mark.parametrize("sources", [1, 2])
def test_large_maps_have_large_tiles(kernels: Kernels, sources: int) -> None:
    way = Way(torch.bfloat16, 90)
    for multiprocessors in MULTIPROCESSORS:
        inputs = sizes(8, 64, 64, 4096, [None] * sources)
        forward = plan_forward(kernels, way, inputs, multiprocessors)
        assert (forward.rows, forward.blocks) == (64, 8 * 4096 // 64)
        backward = plan_backward(kernels, way, inputs, multiprocessors)
        assert (backward.rows, backward.attend_blocks) == (64, 2 * sources * 8 * 4096 // 64)


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
    cases: dict[str, tuple[list[int | None], str]] = {
        "self_attention": ([512], "512 with projected keys"),
        "double_attention": ([None, 16], "2048 with folded keys and 16 with projected keys"),
    }
    for operator, (keys, queries) in cases.items():
        shapes = f"batch 8, channels 2048, value channels 96, query channels {queries}, positions 256"
        beginning = f"{operator} {name} ({shapes}) on CUDA device 0 needs "
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", PLANS, ids=["forward", "gates", "backward"])
def test_too_many_value_channels(
    kernels: Kernels, plan: Callable[..., ForwardPlan | BackwardPlan], precision: str
) -> None:
    way = Way(PRECISIONS[precision][0], 90, PRECISIONS[precision][1])
    plan(kernels, way, sizes(1, 16, 256, 64, [None]), 20)
    with pytest.raises(KernelFault, match=r"value channels 257, .* serves at most 256 value channels"):
        plan(kernels, way, sizes(1, 16, 257, 64, [None]), 20)


@pytest.mark.parametrize("gates", [False, True], ids=["alone", "with_gates"])
def test_contexts_are_refused_where_the_backward_pass_does_not_fit(kernels: Kernels, gates: bool) -> None:
    """Forward, 256 channels in tf32 have room on 8.6; backward they have not, which training must hear at once."""
    way, inputs = Way(torch.float32, 86, tf32=True), sizes(8, 256, 64, 256, [None, None])
    plan_forward(kernels, way, inputs, 28, gates, save=False)
    with pytest.raises(KernelFault) as backward:
        plan_backward(kernels, way, inputs, 28)
    with pytest.raises(KernelFault) as saving:
        plan_forward(kernels, way, inputs, 28, gates, save=True)
    said, reason = str(backward.value), "of shared memory a block"
    assert reason in said
    assert str(saving.value) == said.replace(" backward ", " forward ").replace(
        reason, f"{reason} in the backward pass"
    )


@pytest.mark.parametrize("gates", [False, True], ids=["alone", "with_gates"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_contexts_are_kept_where_the_backward_pass_fits(kernels: Kernels, precision: str, gates: bool) -> None:
    for capability in KIBIBYTES:
        way = Way(PRECISIONS[precision][0], capability, PRECISIONS[precision][1])
        inputs = sizes(8, 64, 64, 256, [16, None])
        saving, without = (plan_forward(kernels, way, inputs, 28, gates, save) for save in (True, False))
        assert saving == without


def test_the_harness_has_no_more_memory_than_the_card(kernels: Kernels) -> None:
    """What a plan asks for, static memory included, is enough and is needed."""
    way = WAYS["float32"]
    arguments = make("self_attention", way, batch=1, channels=128, size=(2, 4), out=9, keys=64)
    needed = plan_forward(kernels, way, sizes(1, 128, 9, 8, [64]), MANY).shared_bytes
    kernels.schedule(None)
    forward(kernels, way, arguments, MANY, save=False, most_shared_bytes=needed)
    for most_shared_bytes, said in ((needed - 64, "beyond this card: static"), (needed // 2, "bytes of dynamic")):
        with pytest.raises(KernelFault, match=f"attention_forward.*{said} shared memory"):
            forward(kernels, way, arguments, MANY, save=False, most_shared_bytes=most_shared_bytes)
