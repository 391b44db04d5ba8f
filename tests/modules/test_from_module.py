"""SAM.from_module against the published modules."""

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_cells import CellOnCHM, CellOnHCM, CellToHCM, CellWithPeepholes, StackOfCells
from published_sams import (
    WithConvolutionsAfterAttention,
    WithGatesInAnotherOrder,
    WithLayersK2V2,
    WithLayersQhVm,
    WithStackedProjections,
)
from torch import Tensor, nn

import fastsam
from fastsam.modules import SAM, attention

Make = Callable[[], nn.Module]

# Channels of 8: attention channels of 3 leave the keys projected, those of 4 and 8 fold them.
ONE_BY_ONE: dict[str, Make] = {
    "k2 v2": lambda: WithLayersK2V2(8, 3),
    "k2 v2, folded keys": lambda: WithLayersK2V2(8, 4),
    "k2 v2 without biases": lambda: WithLayersK2V2(8, 3, bias=False),
    "qh vm": lambda: WithLayersQhVm(8, 8),
    "qh vm, few values": lambda: WithLayersQhVm(8, 3, value_dim=5),
    "after attention": lambda: WithConvolutionsAfterAttention(8, 3),
    "stacked, 1x1": lambda: WithStackedProjections(8, 5, 1),
}
PUBLISHED = ONE_BY_ONE | {
    "stacked, 3x3": lambda: WithStackedProjections(8, 5, 3),
    "stacked, 5x5": lambda: WithStackedProjections(8, 3, (5, 5)),
}
COMPOSED = ("after attention",)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    module = PUBLISHED[name]().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)  # farther from the means that small logits give
    return module


def recurrence(module: nn.Module, inputs: list[Tensor], m: Tensor) -> list[Tensor]:
    """The outputs of all steps, each with the output of the step before in its input, and the last memory."""
    h, outputs = torch.zeros_like(m), []
    for x in inputs:
        h, m = module(x + h, m)[:2]
        outputs.append(h)
    return [*outputs, m]


def maps(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 5, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < tolerance


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recurrence_and_its_gradients_are_those_of_the_original(name: str, backend_name: str) -> None:
    module = made(name)
    sam = SAM.from_module(module)
    weights = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    measured = []
    for of in (module, sam):
        *inputs, m = (x.requires_grad_() for x in maps(5))
        outputs = recurrence(of, inputs, m)
        gradients = torch.autograd.grad(sum((weights * output).sum() for output in outputs), [*inputs, m])
        measured.append([*outputs, *gradients])
    assert_close(measured[1], measured[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_state_dict_serves_as_well(name: str) -> None:
    module = made(name)
    for one, other in zip(*(SAM.from_module(of).parameters() for of in (module, module.state_dict())), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in COMPOSED])
def test_training_goes_on_as_the_original_does(name: str) -> None:
    module = made(name)
    sam = SAM.from_module(module)
    *inputs, m, target = maps(5)
    losses: list[list[float]] = []
    for of in (module, sam):
        optimizer = torch.optim.Adam(of.parameters(), 1e-2)
        losses.append([])
        for _ in range(5):
            loss = (recurrence(of, inputs, m)[-2] - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # Adam divides by gradients that nearly vanish
    assert losses[1][-1] < losses[1][0]


def test_composed_values_train() -> None:
    sam = SAM.from_module(made("after attention"))
    sum(x.square().sum() for x in recurrence(sam, maps(2), maps(1)[0])).backward()
    gradients = {name: parameter.grad for name, parameter in sam.named_parameters()}
    assert all(gradients[f"{name}.weight"].abs().max() > 0 for name in ("value", "memory_value", "fusion"))
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    module = made(name, dtype)
    sam = SAM.from_module(module)
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in sam.parameters())
    exact, (h, m) = copy.deepcopy(module).double(), maps(2, dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(sam(h, m), exact(h.double(), m.double())[:2], tolerance)


def test_the_original_is_left_alone() -> None:
    module = made("after attention")
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    sam = SAM.from_module(module)
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_1x1_gates_and_attention_are_one_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sam, (h, m) = SAM.from_module(made(name)), maps(2)
    calls = []
    monkeypatch.setattr(attention, "attention_gates", lambda *operands: calls.append(operands))
    sam(h, m)
    assert len(calls) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_and_state_dict_make_it_again(name: str) -> None:
    sam = SAM.from_module(made(name))
    options = ("kernel_size", "value_channels", "fusion_channels", "dense_gates", "scale")
    again = SAM(
        *(sam.channels, sam.attention_channels),
        **{option: getattr(sam, option) for option in options},
        bias=sam.query.bias is not None,
        dtype=torch.float64,
    )
    again.load_state_dict(sam.state_dict())
    h, m = maps(2)
    torch.testing.assert_close(again(h, m), sam(h, m), rtol=0, atol=0)


def test_other_arithmetic_behind_the_names_is_seen() -> None:
    module = WithGatesInAnotherOrder(8, 3)
    with pytest.raises(ValueError, match="WithGatesInAnotherOrder has the parameters of a known SAM but computes"):
        SAM.from_module(module)
    assert isinstance(SAM.from_module(module.state_dict()), SAM)


class Failing(WithLayersK2V2):
    """The parameters of a published module with another forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__(8, 3)
        self.forward = forward


def missing_attribute(h: Tensor, m: Tensor) -> Tensor:
    return h.View(-1)


UNUSABLE: list[tuple[Callable[[], nn.Module], str]] = [
    (
        lambda: Failing(lambda h: h),
        r"could not be run on maps h \(2, 8, 3, 4\), m \(2, 8, 3, 4\): TypeError: .*takes 1",
    ),
    (lambda: Failing(missing_attribute), "could not be run on maps .*: AttributeError: .*has no attribute 'View'"),
    (lambda: made("k2 v2").to("meta"), "could not be run on maps .*: NotImplementedError: .*meta"),
    (lambda: Failing(lambda h, m: h), "returns Tensor, not the maps h, m"),
    (lambda: Failing(lambda h, m: {"h": h, "m": m}), "returns dict, not the maps h, m"),
    (lambda: Failing(lambda h, m: (h,)), "returns 1 values, not the maps h, m"),
    (
        lambda: Failing(lambda h, m: (h[:, :4], m)),
        r"its h on random maps is of shape \(2, 4, 3, 4\), not \(2, 8, 3, 4\)",
    ),
    (lambda: Failing(lambda h, m: (None, m)), r"its h on random maps is a NoneType, not a tensor"),
    (
        lambda: Failing(lambda h, m: (h * float("nan"), m)),
        "computes something else: its h on random maps is off by nan",
    ),
]


@pytest.mark.parametrize("make, message", UNUSABLE, ids=[message[:40] for _, message in UNUSABLE])
def test_an_original_that_cannot_be_compared(make: Callable[[], nn.Module], message: str) -> None:
    module = make()
    begin = f"SAM.from_module: {type(module).__name__} has the parameters of a known SAM but "
    with pytest.raises(
        ValueError, match=f"(?s){begin}.*{message}.*; its state_dict converts without this check"
    ) as raised:
        SAM.from_module(module)
    assert (raised.value.__cause__ is not None) == ("could not be run" in message)
    assert isinstance(SAM.from_module(module.state_dict()), SAM)


def test_an_original_that_keeps_tensors_with_a_history() -> None:
    module = made("k2 v2")
    module.kept = module(*maps(2))[0]  # copy.deepcopy refuses it
    assert isinstance(SAM.from_module(module), SAM)


def changed(name: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """A published state dict with some entries replaced, by zeros of these shapes, or taken out, by ()."""
    state_dict = dict(made(name, torch.float32).state_dict())
    for key, shape in shapes.items():
        state_dict[key.replace("__", ".")] = torch.zeros(shape)
    return {key: value for key, value in state_dict.items() if value.ndim}


def with_another(name: str, key: str, **kind: Any) -> dict[str, Tensor]:
    state_dict = changed(name)
    return state_dict | {key: state_dict[key].to(**kind)}


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.Conv2d(3, 4, 1), ValueError, r"Conv2d is no SAM that is known here. It holds weight, bias; known are"),
    (nn.Identity, ValueError, "It holds no parameters; known are"),
    (dict, ValueError, "the state_dict is no SAM that is known here"),
    (lambda: nn.Sequential(made("k2 v2")), ValueError, r"holds 0\.layer_q\.weight, "),
    (lambda: changed("k2 v2", layer_z__bias=()), ValueError, "biases for all or none:"),
    (lambda: changed("k2 v2", gamma=(1,)), ValueError, "gamma; known are"),
    (lambda: SAM(2, 1), ValueError, "query.weight, .*jerrywn121/TianChi_AIEarth: conv_h, conv_m, conv_z, conv_output"),
    (lambda: 3, TypeError, "module must be a torch.nn.Module or a state_dict, got int"),
    (
        lambda: changed("k2 v2", layer_k2__weight=(4, 8, 1, 1)),
        ValueError,
        r"layer_k2.weight must have shape \(D, C, 1, 1\) = \(3, 8, 1, 1\), got \(4, 8, 1, 1\)",
    ),
    (
        lambda: changed("k2 v2", layer_z__weight=(16, 8, 1, 1)),
        ValueError,
        r"layer_z.weight must have shape \(Z, 2V, 1, 1\) = \(16, 16, 1, 1\), got \(16, 8, 1, 1\)",
    ),
    (
        lambda: changed("k2 v2", layer_q__weight=(3, 8)),
        ValueError,
        r"layer_q.weight must have shape \(D, C, k, k\), got \(3, 8\)",
    ),
    (
        lambda: changed("k2 v2", layer_m__bias=(8,)),
        ValueError,
        r"layer_m.bias must have shape \(3C,\) = \(24,\), got \(8,\)",
    ),
    (
        lambda: changed("stacked, 3x3", conv_h__weight=(16, 8, 1, 1)),
        ValueError,
        r"conv_h.weight must have shape \(3D, C, 1, 1\) = \(15, 8, 1, 1\), got \(16, 8, 1, 1\)",
    ),
    (
        lambda: changed("stacked, 3x3", conv_output__weight=(24, 13, 3, 5)),
        ValueError,
        r"conv_output.weight must have shape \(3C, Z\+C, k, k\) = \(24, 13, 3, 3\), got \(24, 13, 3, 5\)",
    ),
    (
        lambda: changed("stacked, 3x3", conv_output__weight=(24, 13, 2, 2)),
        ValueError,
        r"conv_output.weight must have shape \(3C, Z\+C, k, k\), k odd, got \(24, 13, 2, 2\)",
    ),
    (
        lambda: with_another("k2 v2", "layer_v.weight", dtype=torch.float64),
        TypeError,
        "layer_v.weight is torch.float64, it must be torch.float32 as layer_q.weight is",
    ),
    (
        lambda: with_another("k2 v2", "layer_v.weight", device="meta"),
        ValueError,
        "layer_v.weight is on meta, it must be on cpu as layer_q.weight is",
    ),
]


@pytest.mark.parametrize("make, error, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_errors_name_what_is_wrong(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}") as raised:
        SAM.from_module(make())
    assert str(raised.value).startswith("SAM.from_module: ")


def section(heading: str) -> list[str]:
    """The code blocks of a section of the README; FASTSAM_TEST_README names another file to read."""
    readme = os.environ.get("FASTSAM_TEST_README", Path(__file__).parents[2] / "README.md")
    after = Path(readme).read_text(encoding="utf-8").split(f"### {heading}\n")[1]
    return re.findall(r"```python\n(.*?)```", re.split(r"\n##+ ", after)[0], re.DOTALL)


BLOCKS = section("You already have a SAM")
STACKS: dict[str, Callable[..., nn.Module]] = {
    "cells": CellOnHCM,
    "cells of another": CellOnCHM,
    "cell_list": CellToHCM,
}


def stack(name: str) -> tuple[StackOfCells, Tensor]:
    """A published model of two layers in float64, and frames for it."""
    torch.manual_seed(0)
    model = StackOfCells(name.split()[0], [STACKS[name](1, 8), STACKS[name](8, 8)]).double()
    return model, torch.stack(maps(3), dim=1)[:, :, :1]


@pytest.mark.parametrize("name", STACKS)
def test_the_readme_replaces_the_modules_of_a_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, frames = stack(name)
    torch.save(model, "checkpoint.pth")
    names = {"torch": torch, "fastsam": fastsam}
    exec(BLOCKS[0].replace("in model.cells:", f"in model.{model.name}:"), names)
    assert all(isinstance(cell.attention_layer, SAM) for cell in getattr(names["model"], model.name))
    assert_close([names["model"](frames)], [model(frames)])
    assert f"model.{model.name}" in BLOCKS[0]


def test_the_readme_changes_a_cell_that_hands_its_map_on() -> None:
    torch.manual_seed(0)
    cell = CellWithPeepholes(3, 8).double()
    before = [line for line in BLOCKS[1].splitlines() if line.endswith("# before")]
    after = [line for line in BLOCKS[1].splitlines() if line not in before]
    assert len(before) == 1
    results = []
    for lines in (before, after):
        new_h, prev_memory = maps(2)
        names = {"fastsam": fastsam, "self": copy.deepcopy(cell), "new_h": new_h, "prev_memory": prev_memory}
        names |= {"row": 2, "column": 3}
        exec("\n".join(lines), names)
        results.append(names)
    expected, actual = results
    assert_close([actual["new_h"], actual["new_memory"]], [expected["new_h"], expected["new_memory"]])
    assert_close([actual["attention_h"][:, 0]], [expected["attention_h"][:, 2 * 6 + 3]])


def test_the_readme_converts_a_cell() -> None:
    model, _ = stack("cells")
    x, h, c, m = maps(4)
    names = {"fastsam": fastsam, "model": model, "x": x[:, :1], "h": h, "c": c, "m": m}
    exec(BLOCKS[2], names)
    output, state = model.cells[0](x[:, :1], (h, c, m))
    assert_close([names[name] for name in ("output", "h", "c", "m")], [output, *state])
