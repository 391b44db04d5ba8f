"""`lstm_gates`, `memory_gates` and `norm_gate` with and without norms, against the naive float64 forms."""

from typing import Any

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate, evaluate

SIZES = [(1, 1), (3, 5), (4, 4), (1, 17), (47, 1), (6, 8), (7, 7), (7, 9), (8, 8), (5, 13), (97, 1)]
CHANNELS = [1, 3, 8, 13, 64, 65]
DTYPES = {"argvalues": [torch.float64, torch.float32], "ids": ["float64", "float32"]}

PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("lstm_gates", {}),
    ("lstm_gates", {"recurrent": True}),
    ("memory_gates", {}),
    ("memory_gates", {"recurrent": True}),
    ("norm_gate", {"activation": "identity", "scale": 3}),
    ("norm_gate", {"activation": "tanh", "scale": -0.5}),
    ("norm_gate", {}),
]
NORMED: list[tuple[str, dict[str, Any]]] = [
    ("lstm_gates", {"norm": "channel"}),
    ("lstm_gates", {"norm": "position", "recurrent": True}),
    ("lstm_gates", {"recurrent_norm": "channel"}),
    ("lstm_gates", {"norm": "channel", "recurrent_norm": "channel"}),
    ("lstm_gates", {"norm": "position", "recurrent_norm": "position"}),
    ("memory_gates", {"norm": "channel", "recurrent": True}),
    ("memory_gates", {"norm": "channel", "recurrent_norm": "channel"}),
    ("memory_gates", {"norm": "position", "recurrent_norm": "position"}),
    ("norm_gate", {"norm": "channel", "scale": 2.0}),
    ("norm_gate", {"norm": "position", "activation": "tanh"}),
    ("norm_gate", {"norm": "channel", "activation": "identity"}),
]
STATE_NORMED: list[tuple[str, dict[str, Any]]] = [
    ("lstm_gates", {"state_norm": "channel"}),
    ("lstm_gates", {"norm": "position", "recurrent_norm": "position", "state_norm": "position"}),
    ("memory_gates", {"norm": "channel", "recurrent_norm": "channel", "state_norm": "channel"}),
    ("memory_gates", {"recurrent": True, "state_norm": "position"}),
]
NORM_OF = {"gates": "norm", "x": "norm", "recurrent": "recurrent_norm"}
"""The norm that a map of gates goes through."""


@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize(("operator", "options"), [*PLAIN, *NORMED, *STATE_NORMED], ids=str)
@pytest.mark.parametrize(("size", "channels"), [(size, CHANNELS[i % 6]) for i, size in enumerate(SIZES)])
def test_shapes(backend_name, poison, size, channels, operator, options, dtype):
    options = {**options, "channels": channels, "size": size, "dtype": dtype}
    assert_accurate(operator, [cases.make(operator, seed=seed, **options) for seed in seeds(dtype, channels)])


@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize(("operator", "options"), [*PLAIN, *NORMED, *STATE_NORMED], ids=str)
def test_model_sized(backend_name, poison, three_threads, operator, options, dtype):
    arguments = cases.make(operator, batch=5, channels=64, size=(16, 16), **options, dtype=dtype)
    assert_accurate(operator, arguments)


@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize(("operator", "options"), [*NORMED, *STATE_NORMED], ids=str)
def test_maps_of_several_blocks(backend_name, poison, three_threads, operator, options, dtype):
    """More positions than the kernels sum at once."""
    arguments = cases.make(operator, batch=4, channels=2, size=(37, 43), **options, dtype=dtype)
    assert_accurate(operator, arguments)


@pytest.mark.parametrize("offset", [30.0, -1000.0])
@pytest.mark.parametrize(("operator", "options"), NORMED, ids=str)
def test_means_far_from_zero(backend_name, operator, options, offset):
    """Where E[x^2] - E[x]^2 would lose most digits of the variance, and all of them for the larger mean."""
    options = {"batch": 2, "channels": 4, "size": (9, 70), **options, "dtype": torch.float32}
    draws = [cases.make(operator, **options, seed=seed) for seed in range(24)]
    maps = [name for name in draws[0] if NORM_OF.get(name) in options]
    assert maps
    assert_accurate(operator, [{**draw, **{name: draw[name] + offset for name in maps}} for draw in draws])


@pytest.mark.parametrize(("operator", "options"), NORMED, ids=str)
def test_constant_maps(backend_name, operator, options):
    """Without variance the norm gives its bias, and eps keeps the gradients finite."""
    arguments = cases.make(operator, **options)
    maps = [name for name in arguments if name in NORM_OF]
    flat = {**arguments, **{name: torch.full_like(arguments[name], 0.1) for name in maps}}
    result = evaluate(operator, cases.public(operator), flat)
    plain = {name: value for name, value in flat.items() if "norm" not in name}
    for name in maps:
        bias = flat.get(f"{NORM_OF[name]}_bias", flat[name])
        plain[name] = (bias if bias.ndim > 1 else bias[:, None, None]).expand_as(flat[name])
    expected = cases.outputs_of(cases.naive(operator)(**plain))
    torch.testing.assert_close(tuple(result.outputs.values()), expected, rtol=1e-9, atol=1e-11)
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())


@pytest.mark.parametrize("eps", [1e-12, 0.5, 3])
@pytest.mark.parametrize(("operator", "options"), [*NORMED, *STATE_NORMED], ids=str)
def test_eps(backend_name, operator, options, eps):
    assert_accurate(operator, {**cases.make(operator, **options), "eps": eps})


@pytest.mark.parametrize(("operator", "options"), [*NORMED, *STATE_NORMED], ids=str)
def test_a_sample_does_not_depend_on_the_others(native_backend, operator, options):
    """Bit for bit, whatever its place in the batch."""
    arguments = cases.make(operator, batch=5, channels=3, size=(6, 7), **options, dtype=torch.float32)
    together = cases.outputs_of(cases.public(operator)(**arguments))
    for sample in range(5):
        one = cases.map_tensors(lambda x, at=sample: x[at : at + 1] if x.ndim == 4 else x, arguments)
        alone = cases.outputs_of(cases.public(operator)(**one))
        assert all(torch.equal(left, right[sample : sample + 1]) for left, right in zip(alone, together, strict=True))


@pytest.mark.parametrize("output", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("variant", ["lstm_gates", "lstm_gates-all_norms", "memory_gates", "memory_gates-state_norm"])
def test_gradient_from_one_output_only(backend_name, variant, output):
    """The other output's gradient is absent, not zero-filled by the caller."""
    operator, options = cases.PUBLIC_VARIANTS[variant]
    arguments = cases.make(operator, **options)
    gradients = []
    for function in (cases.public(operator), cases.naive(operator)):
        leaves = cases.map_tensors(lambda tensor: tensor.clone().requires_grad_(), arguments)
        tensors = [value for value in leaves.values() if isinstance(value, torch.Tensor)]
        gradients.append(torch.autograd.grad(function(**leaves)[output].square().sum(), tensors, allow_unused=True))
    for actual, expected in zip(*gradients, strict=True):
        expected = torch.zeros_like(actual) if expected is None else expected
        torch.testing.assert_close(actual, expected)
