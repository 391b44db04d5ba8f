"""NaN, infinities and scores of +-1e3: what eager PyTorch makes of them is what every back end makes of them."""

import cases
import checks
import pytest
import torch
from torch import Tensor

VARIANTS = list(cases.PUBLIC_VARIANTS)
ATTENTIONS = [variant for variant in VARIANTS if "attention" in variant]


def _spoil(tensor: Tensor, value: float) -> Tensor:
    """The same tensor with its middle element replaced."""
    spoiled = tensor.clone()
    spoiled[tuple(length // 2 for length in tensor.shape)] = value
    return spoiled


def _assert_same_kinds_of_number(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, reference in expected.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual[name]), kind(reference)), f"{name}: {kind.__name__}"


def _spoiled_arguments(variant: str, value: float, dtype: torch.dtype):
    operator, options = cases.PUBLIC_VARIANTS[variant]
    arguments = cases.make(operator, **{**options, "size": (7, 6), "batch": 3, "dtype": dtype})
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            yield operator, name, {**arguments, name: _spoil(argument, value)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_spreads_as_in_eager(native_backend, variant, dtype):
    for operator, name, arguments in _spoiled_arguments(variant, float("nan"), dtype):
        actual = checks.evaluate(operator, cases.public(operator), arguments)
        expected = checks.evaluate(operator, cases.eager(operator), arguments)
        assert any(output.isnan().any() for output in actual.outputs.values()), f"NaN in {name} is lost"
        _assert_same_kinds_of_number(actual.tensors(), expected.tensors())


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinity_spreads_as_in_eager(native_backend, variant, dtype, value):
    for operator, _, arguments in _spoiled_arguments(variant, value, dtype):
        names = cases.OUTPUTS[operator]
        actual = cases.outputs_of(cases.public(operator)(**arguments))
        expected = cases.outputs_of(cases.eager(operator)(**arguments))
        _assert_same_kinds_of_number(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize(("size", "kernel"), [((7, 1), 7), ((5, 2), 7), ((3, 5), 5), ((4, 9), 3), ((2, 97), 3)])
def test_infinity_at_the_edge_of_the_map(native_backend, size, kernel, value):
    """What a kernel computes beyond the map, to fill its vectors, must not reach a gradient."""
    for seed in range(3):
        arguments = cases.separable_gates(2, 3, size, z=2, kernel=kernel, seed=seed)
        arguments["h"][1, 1, seed % size[0], -1] = value
        actual = checks.evaluate("separable_gates", cases.public("separable_gates"), arguments)
        expected = checks.evaluate("separable_gates", cases.eager("separable_gates"), arguments)
        for name, reference in expected.gradients.items():
            assert not (~actual.gradients[name].isfinite() & reference.isfinite()).any(), name


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 120.0), (torch.float64, 760.0)])
def test_gates_over_the_whole_range_of_exp(backend_name, dtype, largest):
    """Every size of gate, through where exp overflows and underflows."""
    x = torch.linspace(-largest, largest, 200_003, dtype=torch.float64).to(dtype)
    x = torch.cat([x, torch.logspace(-8, 0, 5_000, dtype=torch.float64).to(dtype)])
    maps = x.view(1, 1, 1, -1)
    zero, ten = torch.zeros_like(maps), torch.full_like(maps, 40.0)
    closed = -1e9 * torch.ones_like(maps)
    only_g = torch.cat([ten, closed, maps, ten], 1)  # c_new = tanh(x)
    only_f = torch.cat([closed, maps, zero, zero], 1)  # c_new = sigmoid(x) of c = 1
    _, tanh = cases.public("lstm_gates")(only_g, zero)
    _, sigmoid = cases.public("lstm_gates")(only_f, zero + 1)
    tolerance = 4 * torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny
    for actual, exact in ((tanh, maps.double().tanh()), (sigmoid, maps.double().sigmoid())):
        assert actual.isfinite().all()
        assert ((actual.double() - exact).abs() <= tolerance * exact.abs() + tiny).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_from_upstream_spreads_as_in_eager(native_backend, variant, dtype):
    operator, options = cases.PUBLIC_VARIANTS[variant]
    arguments = cases.make(operator, **{**options, "size": (7, 6), "batch": 3, "dtype": dtype})

    def upstream(gradient: Tensor) -> Tensor:
        return _spoil(gradient, float("nan"))

    actual = checks.evaluate(operator, cases.public(operator), arguments, upstream=upstream)
    expected = checks.evaluate(operator, cases.eager(operator), arguments, upstream=upstream)
    _assert_same_kinds_of_number(actual.gradients, expected.gradients)


def test_nan_stays_in_its_batch_element(backend_name):
    arguments = cases.double_attention(3)
    arguments["h"][1, 2, 3, 1] = float("nan")
    z = cases.public("double_attention")(**arguments)
    assert z.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert z[::2].isfinite().all()


@pytest.mark.parametrize("variant", ATTENTIONS)
def test_scores_of_a_thousand_in_float64(backend_name, poison, variant):
    operator, options = cases.PUBLIC_VARIANTS[variant]
    for seed in range(5):
        arguments = cases.make(operator, **{**options, "size": (9, 11), "seed": seed})
        checks.assert_accurate(operator, cases.scale_scores(operator, arguments, 1e3))


@pytest.mark.parametrize("variant", ATTENTIONS)
def test_scores_of_a_thousand_in_float32(backend_name, poison, variant):
    """Errors over many draws together: of one draw they hang on the rounding of one or two nearly tied scores."""
    operator, options = cases.PUBLIC_VARIANTS[variant]
    draws = [
        cases.make(operator, **{**options, "channels": 16, "size": (9, 11), "seed": seed, "dtype": torch.float32})
        for seed in range(60)
    ]
    scaled = [cases.scale_scores(operator, arguments, 1e3) for arguments in draws]
    checks.assert_accurate(operator, scaled)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_beyond_the_range_of_exp(backend_name, poison, sign):
    """All scores of a row shifted by +-1e4, which the softmax must not notice."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 4, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = 1.0
    value = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    arguments = {"x": x, "score": torch.zeros(5, 5).double(), "score_bias": torch.zeros(5).double()}
    arguments |= {"value": value, "value_bias": torch.zeros(3).double()}
    arguments["score"][1:, 1:] = 0.3 * torch.eye(4)
    shifted = {**arguments, "score_bias": torch.tensor([sign * 1e4, 0, 0, 0, 0], dtype=torch.float64)}
    expected = checks.evaluate("self_attention", cases.naive("self_attention"), arguments)
    actual = checks.evaluate("self_attention", cases.public("self_attention"), shifted)
    torch.testing.assert_close(actual.outputs, expected.outputs, rtol=1e-10, atol=1e-10)
    for name in ("value", "value_bias"):
        torch.testing.assert_close(actual.gradients[name], expected.gradients[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ATTENTIONS)
def test_maps_with_a_mean(native_backend, variant, dtype, mean):
    """Maps far from 0 for their spread, as images are: terms of the size of the mean cancel in the gradients."""
    operator, options = cases.PUBLIC_VARIANTS[variant]
    options = {**options, "channels": 24, "size": (8, 9)}
    draws = []
    for seed in range(6):
        arguments = cases.make(operator, **options, seed=seed)
        maps = [name for name in ("h", "m", "x") if name in arguments]
        arguments |= {name: arguments[name] + mean for name in maps}
        scaled = cases.scale_scores(operator, arguments, 3.0)
        draws.append(cases.map_tensors(lambda tensor: tensor.to(dtype), scaled))
    checks.assert_accurate(operator, draws)
