"""SAM and SelfAttention against the paper's equations, and their citizenship in PyTorch."""

import copy
import math
import pickle
import random
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam.modules import SAM, SAMWeights, SelfAttention, SelfAttentionWeights
from fastsam.modules._projections import projects_keys

Case = dict[str, Any]


def random_cases(count: int) -> list[Case]:
    """Shapes drawn with a fixed seed: odd and prime ones, single positions, projected and folded keys."""
    draw = random.Random(3)
    cases = []
    for _ in range(count):
        channels = draw.choice([1, 3, 4, 8, 11, 20])
        cases.append(
            {
                "batch": draw.choice([1, 2, 3]),
                "height": draw.choice([1, 2, 5, 7, 8]),
                "width": draw.choice([1, 3, 6, 11]),
                "channels": channels,
                "attention_channels": draw.choice([1, 2, max(1, channels // 2), channels]),
                "kernel_size": draw.choice([None, 1, 3, 5]),
                "scale": draw.choice([1.0, 0.5]),
                "bias": draw.random() < 0.8,
            }
        )
    return cases


def make(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[SAM, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = {name: case[name] for name in ("channels", "attention_channels", "kernel_size", "scale", "bias")}
    sam = SAM(**sizes, **options, dtype=torch.float64)
    shape = (case["batch"], case["channels"], case["height"], case["width"])
    h, m = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    return sam.to(dtype), h.to(dtype), m.to(dtype)


def through_module(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of the module, by name."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    return measured(module(*leaves), dict(module.named_parameters()), leaves)


def through_oracle(
    function: Any, module: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The same of the naive transcription, in the given dtype."""
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
    leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
    return measured(function(parameters, *leaves, scale=module.scale), parameters, leaves)


def measured(
    outputs: Tensor | tuple[Tensor, ...], parameters: dict[str, Tensor], leaves: list[Tensor]
) -> dict[str, Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    names = [*parameters, *(f"input {k}" for k in range(len(leaves)))]
    gradients = torch.autograd.grad(outputs, [*parameters.values(), *leaves], upstream, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient is not None, f"{name} has no gradient"
    return {f"output {k}": output.detach() for k, output in enumerate(outputs)} | {
        f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm ratios. What vanishes by mathematics (key biases, saturated rows) is held against the largest gradient."""
    largest = max(float(value.norm()) for name, value in exact.items() if name.startswith("gradient"))
    scales = {name: float(value.norm()) for name, value in exact.items()}
    return {
        name: float((actual[name].double() - value).norm())
        / (scales[name] if scales[name] > 1e-6 * largest else largest)
        for name, value in exact.items()
    }


def assert_close(actual: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    wrong = {name: error for name, error in errors(actual, exact).items() if not error < tolerance}
    assert not wrong, wrong


@pytest.mark.parametrize("case", random_cases(20), ids=str)
def test_sam_equals_the_equations(case: Case, backend_name: str) -> None:
    sam, h, m = make(case)
    assert_close(through_module(sam, h, m), through_oracle(oracle.sam, sam, h, m))


@pytest.mark.parametrize("case", random_cases(6), ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"use_memory_attention": False},
        {"use_attention": False},
        {"value_channels": 5, "fusion_channels": 9},
        {"value_channels": 2, "fusion_channels": 3, "use_memory_attention": False},
    ],
    ids=str,
)
def test_sam_variants_equal_the_equations(case: Case, options: dict[str, Any], backend_name: str) -> None:
    sam, h, m = make(case, **options)
    assert_close(through_module(sam, h, m), through_oracle(oracle.sam, sam, h, m))


@pytest.mark.parametrize("options", [{}, {"fusion_channels": 3}, {"use_attention": False}], ids=str)
def test_dense_gates_hold_the_separable_ones(options: dict[str, Any], backend_name: str) -> None:
    torch.manual_seed(0)
    separable, dense = (SAM(8, 3, 3, dense_gates=dense, dtype=torch.float64, **options) for dense in (False, True))
    state_dict = separable.state_dict()
    product = state_dict.pop("pointwise.weight") * state_dict.pop("depthwise.weight").squeeze(1)
    bias = state_dict.pop("pointwise.bias")
    dense.load_state_dict({**state_dict, "gates.weight": product, "gates.bias": bias})
    h, m = (torch.randn(2, 8, 5, 6, dtype=torch.float64) for _ in range(2))
    actual, expected = through_module(dense, h, m), through_module(separable, h, m)
    assert actual.keys() - expected.keys() == {"gradient of gates.weight", "gradient of gates.bias"}
    assert_close(actual, {name: value for name, value in expected.items() if name in actual})


def test_bad_shapes_of_values_and_gates() -> None:
    for options, error, message in (
        ({"value_channels": 0}, ValueError, "SAM: value_channels must be at least 1, got 0"),
        ({"fusion_channels": 4.0}, TypeError, "SAM: fusion_channels must be a positive integer, got 4.0"),
        ({"dense_gates": 1}, TypeError, "SAM: dense_gates must be True or False, got 1"),
        ({"dense_gates": True, "kernel_size": None}, ValueError, "SAM: kernel_size must be an odd .*, got None"),
    ):
        with pytest.raises(error, match=message):
            SAM(8, **options)


def float32_errors(case: Case, gain: float) -> dict[str, tuple[float, float]]:
    """The errors of SAM and of plain PyTorch in float32, with the query and the keys multiplied by `gain`."""
    sam, h, m = make(case, torch.float32)
    with torch.no_grad():
        for projection in (sam.query, sam.key, sam.memory_key):
            projection.weight.mul_(gain)
    exact = through_oracle(oracle.sam, sam, h, m)
    plain = errors(through_oracle(oracle.sam, sam, h, m, dtype=torch.float32), exact)
    return {name: (error, plain[name]) for name, error in errors(through_module(sam, h, m), exact).items()}


@pytest.mark.parametrize("case", random_cases(8), ids=str)
def test_float32_errs_at_most_twice_as_much_as_plain_pytorch(case: Case, backend_name: str) -> None:
    floor = 8 * torch.finfo(torch.float32).eps  # plain PyTorch is exact now and then
    wrong = {name: both for name, both in float32_errors(case, 1.0).items() if not both[0] <= 2 * both[1] + floor}
    assert not wrong, wrong


def test_float32_with_large_logits_typically_errs_at_most_twice_as_much_as_plain_pytorch(backend_name: str) -> None:
    """Nearly tied maxima amplify the rounding of the logits, so that single ratios are luck; their mean is not."""
    several = [float32_errors(case, 30.0) for case in random_cases(20)]
    for name in several[0]:
        if "key.bias" not in name and all(name in one for one in several):
            logs = [math.log(max(mine, 1e-8) / max(plain, 1e-8)) for mine, plain in (one[name] for one in several)]
            assert math.exp(sum(logs) / len(logs)) < 2, name


@pytest.mark.parametrize("channels, attention_channels", [(12, 3), (12, 8)], ids=["projected keys", "folded keys"])
def test_logits_of_a_thousand_stay_exact(channels: int, attention_channels: int, backend_name: str) -> None:
    torch.manual_seed(0)
    sam = SAM(channels, attention_channels, dtype=torch.float64)
    h, m = (torch.randn(2, channels, 5, 6, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        logits = (sam.query(h).flatten(2).mT @ sam.key(h).flatten(2)).abs().max()
        sam.query.weight.mul_(1e3 / logits)
        sam.query.bias.mul_(1e3 / logits)
    actual = through_module(sam, h, m)
    assert all(value.isfinite().all() for value in actual.values())
    assert_close(actual, through_oracle(oracle.sam, sam, h, m), 1e-9)


@pytest.mark.parametrize("case", random_cases(10), ids=str)
def test_self_attention_equals_the_equations(case: Case, backend_name: str) -> None:
    _, x, _ = make(case)
    attention = SelfAttention(
        case["channels"], case["attention_channels"], scale=case["scale"], bias=case["bias"], dtype=torch.float64
    )
    assert_close(through_module(attention, x), through_oracle(oracle.self_attention_module, attention, x))


def test_cases_cover_both_forms_of_the_keys() -> None:
    forms = {projects_keys(case["channels"], case["attention_channels"]) for case in random_cases(20)}
    assert forms == {True, False}


@pytest.mark.parametrize("attention_channels", [2, 8])
def test_key_biases_have_gradients_of_exact_zeros(attention_channels: int, backend_name: str) -> None:
    sam = SAM(8, attention_channels)
    h, m = sam(torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5))
    (h + m).sum().backward()
    for key in (sam.key, sam.memory_key):
        assert key.bias.grad is not None
        assert torch.equal(key.bias.grad, torch.zeros_like(key.bias))


def test_no_memory_is_a_memory_of_zeros() -> None:
    sam, h = SAM(8, 4), torch.randn(2, 8, 3, 4)
    for absent, zero in zip(sam(h), sam(h, torch.zeros_like(h)), strict=True):
        assert torch.equal(absent, zero)


def test_weights_folded_once_serve_every_step() -> None:
    for module, inputs in ((SAM(8, 4), 2), (SAM(8, 2, use_memory_attention=False), 2), (SelfAttention(8, 2), 1)):
        maps = [torch.randn(2, 8, 3, 4) for _ in range(inputs)]
        torch.testing.assert_close(module(*maps, weights=module.fold()), module(*maps), rtol=0, atol=0)
    assert SAM(8, use_attention=False).fold() is None


def test_folding_chooses_the_cheaper_form() -> None:
    projected, folded = SAM(8, 3).fold(), SAM(8, 4).fold()
    assert isinstance(projected, SAMWeights) and isinstance(folded, SAMWeights)
    assert projected.key_h is not None and projected.score_h.shape == (3, 8)
    assert folded.key_h is None and folded.score_h.shape == (8, 8)


@pytest.mark.parametrize("options", [{}, {"use_memory_attention": False}], ids=str)
def test_attention_maps_are_the_rows_of_the_softmax(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    sam = SAM(6, 3, scale=1.5, dtype=torch.float64, **options)
    h, m = (torch.randn(2, 6, 4, 5, dtype=torch.float64) for _ in range(2))
    points = torch.tensor([[0, 0], [3, 4], [2, 1]])
    maps_h, maps_m = sam.attention_maps(h, m, points)
    query = 1.5 * sam.query(h)
    rows = points[:, 0] * 5 + points[:, 1]
    expected = oracle.attention_weights(query, sam.key(h))[:, rows].reshape(2, 3, 4, 5)
    torch.testing.assert_close(maps_h, expected)
    if options:
        assert maps_m is None
    else:
        expected = oracle.attention_weights(query, sam.memory_key(m))[:, rows].reshape(2, 3, 4, 5)
        torch.testing.assert_close(maps_m, expected)


def test_attention_maps_without_memory_are_those_of_zeros() -> None:
    sam, h = SAM(6, 3), torch.randn(1, 6, 4, 5)
    maps_m = sam.attention_maps(h, None, [(1, 2)]).m
    torch.testing.assert_close(maps_m, torch.full((1, 1, 4, 5), 1 / 20))


def test_self_attention_maps_are_the_rows_of_the_softmax() -> None:
    attention, x = SelfAttention(6, 3), torch.randn(2, 6, 4, 5)
    maps = attention.attention_maps(x, torch.tensor([[3, 0], [1, 4]], dtype=torch.int32))
    expected = oracle.attention_weights(attention.query(x), attention.key(x))[:, [15, 9]].reshape(2, 2, 4, 5)
    torch.testing.assert_close(maps, expected)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_attention_maps_make_no_square_matrix() -> None:
    sam, h = SAM(4, 4), torch.randn(1, 4, 32, 32)
    with LargestTensor() as largest:
        sam.attention_maps(h, h, [(0, 0), (5, 6)])
    assert largest.elements <= 4 * 32 * 32


def test_state_dict_has_the_names_of_the_paper() -> None:
    names = ["query", "key", "value", "memory_key", "memory_value", "fusion", "pointwise"]
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} | {"depthwise.weight"}
    assert set(SAM(8).state_dict()) == expected
    assert set(SAM(8, bias=False).state_dict()) == {name for name in expected if name.endswith("weight")}
    gates_only = {"depthwise.weight", "pointwise.weight", "pointwise.bias"}
    assert set(SAM(8, use_attention=False).state_dict()) == gates_only
    assert set(SAM(8, kernel_size=None).state_dict()) == expected - {"depthwise.weight"}
    separable = {"depthwise.weight", "pointwise.weight", "pointwise.bias"}
    assert set(SAM(8, dense_gates=True).state_dict()) == expected - separable | {"gates.weight", "gates.bias"}
    assert SAM(8, use_memory_attention=False).fusion.weight.shape == (8, 8, 1, 1)


class PlainSAM(nn.Module):
    """The module as one would write it in plain PyTorch."""

    def __init__(self, channels: int, attention_channels: int) -> None:
        super().__init__()
        self.query, self.key, self.memory_key = (nn.Conv2d(channels, attention_channels, 1) for _ in range(3))
        self.value, self.memory_value = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.fusion = nn.Conv2d(2 * channels, channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 5, padding=2, groups=2 * channels, bias=False)
        self.pointwise = nn.Conv2d(2 * channels, 3 * channels, 1)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        q = self.query(h).flatten(2).mT
        z_h = self.value(h).flatten(2) @ (q @ self.key(h).flatten(2)).softmax(-1).mT
        z_m = self.memory_value(m).flatten(2) @ (q @ self.memory_key(m).flatten(2)).softmax(-1).mT
        z = self.fusion(torch.cat([z_h, z_m], 1).unflatten(-1, h.shape[2:]))
        i, g, o = self.pointwise(self.depthwise(torch.cat([z, h], 1))).chunk(3, 1)
        m = (1 - i.sigmoid()) * m + i.sigmoid() * g.tanh()
        return o.sigmoid() * m, m


def test_state_dict_goes_to_plain_pytorch_and_back() -> None:
    sam, plain = SAM(8, 4), PlainSAM(8, 4)
    plain.load_state_dict(sam.state_dict())
    h, m = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(plain(h, m), tuple(sam(h, m)))
    restored = SAM(8, 4)
    restored.load_state_dict(plain.state_dict())
    torch.testing.assert_close(restored(h, m), sam(h, m), rtol=0, atol=0)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda sam: pickle.loads(pickle.dumps(sam))], ids=["deepcopy", "pickle"]
)
def test_sam_can_be_copied(duplicate: Any) -> None:
    sam, h = SAM(8, 4), torch.randn(2, 8, 3, 4)
    sam(h)
    torch.testing.assert_close(duplicate(sam)(h), sam(h), rtol=0, atol=0)


def test_channels_last_maps_give_the_same(backend_name: str) -> None:
    sam = SAM(8, 3)
    h, m = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    expected = sam(h, m)
    sam = sam.to(memory_format=torch.channels_last)
    strided = [x.to(memory_format=torch.channels_last) for x in (h, m)]
    torch.testing.assert_close(tuple(sam(*strided)), tuple(expected))


@pytest.mark.parametrize("module", [SAM(8, 4), SelfAttention(8, 2)], ids=["SAM", "SelfAttention"])
def test_bfloat16_parameters(module: nn.Module) -> None:
    x = torch.randn(2, 8, 5, 6)
    expected = module(x)
    actual = copy.deepcopy(module).bfloat16()(x.bfloat16())
    for low, full in zip(
        torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("attention_channels, dense_gates", [(2, False), (8, False), (2, True)])
def test_autocast_folds_in_full_precision_and_trains(
    attention_channels: int, dense_gates: bool, backend_name: str
) -> None:
    sam = SAM(8, attention_channels, dense_gates=dense_gates)
    h, m = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    expected, weights = sam(h, m), sam.fold()
    with torch.autocast("cpu", torch.bfloat16):
        actual, in_autocast = sam(h, m), sam.fold()
        mixed = sam(h.bfloat16(), m)
    assert isinstance(weights, SAMWeights) and isinstance(in_autocast, SAMWeights)
    torch.testing.assert_close(tuple(in_autocast), tuple(weights), rtol=0, atol=0)
    for low, full in zip([*actual, *mixed], [*expected, *expected], strict=True):
        torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)
    (actual[0].sum() + actual[1].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sam.parameters())


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_channels": 2}, {"use_memory_attention": False}, {"use_attention": False}, {"dense_gates": True}],
    ids=str,
)
def test_a_step_compiles_into_one_graph(options: dict[str, Any], backend_name: str) -> None:
    torch.compiler.reset()
    sam = SAM(8, **options)
    step = torch.compile(sam, fullgraph=True, backend="aot_eager")
    first, second = ([torch.randn(2, 8, 5, 6, requires_grad=True) for _ in range(2)] for _ in range(2))
    for maps in (first, second):
        with torch.compiler.set_stance("default" if maps is first else "fail_on_recompile"):
            actual = step(*maps)
        torch.testing.assert_close(tuple(actual), tuple(sam(*maps)))
        gradients = torch.autograd.grad(sum(x.square().sum() for x in actual), maps)
        expected = torch.autograd.grad(sum(x.square().sum() for x in sam(*maps)), maps)
        torch.testing.assert_close(gradients, expected)


def test_a_step_compiles_under_autocast() -> None:
    torch.compiler.reset()
    sam, h = SAM(8, 2), torch.randn(1, 8, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sam(h, h)
        actual = torch.compile(sam, fullgraph=True, backend="aot_eager")(h, h)
    torch.testing.assert_close(tuple(actual), tuple(expected))


def test_a_step_can_be_exported() -> None:
    sam, h = SAM(8, 2).eval(), torch.randn(1, 8, 4, 5)
    program = torch.export.export(sam, (h, h))
    torch.testing.assert_close(tuple(program.module()(h, h)), tuple(sam(h, h)))


def test_meta_tensors_give_shapes() -> None:
    h, m = SAM(8, device="meta")(torch.empty(2, 8, 4, 5, device="meta"))
    assert h.shape == m.shape == (2, 8, 4, 5)


def test_second_derivatives_on_the_eager_back_end() -> None:
    sam, h = SAM(2, 1, 1, dtype=torch.float64), torch.randn(1, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    with fastsam.backend("eager"):
        assert torch.autograd.gradgradcheck(sam, (h, torch.randn_like(h, requires_grad=True)))


def test_self_attention_folds_the_output_projection() -> None:
    weights = SelfAttention(8, 2).fold()
    assert isinstance(weights, SelfAttentionWeights)
    assert weights.value.shape == (8, 8) and weights.key is not None and weights.key.shape == (2, 8)
