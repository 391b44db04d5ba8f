"""`lstm_gates` against the naive float64 form."""

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate, evaluate

import fastsam

SIZES = [(1, 1), (3, 5), (4, 4), (1, 17), (47, 1), (6, 8), (7, 7), (7, 9), (8, 8), (5, 13), (97, 1)]
CHANNELS = [1, 3, 8, 13, 64, 65]
NORMS = [
    {"norm": "channel"},
    {"norm": "position", "recurrent": True},
    {"recurrent_norm": "channel"},
    {"norm": "channel", "recurrent_norm": "channel"},
    {"norm": "position", "recurrent_norm": "position"},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("size", "channels"), [(size, CHANNELS[i % 6]) for i, size in enumerate(SIZES)])
def test_shapes(backend_name, poison, size, channels, dtype):
    options = {"channels": channels, "size": size, "dtype": dtype}
    draws = [cases.lstm_gates(seed=seed, **options) for seed in seeds(dtype, channels)]
    assert_accurate("lstm_gates", draws)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize(("size", "channels"), [(size, CHANNELS[i % 6]) for i, size in enumerate(SIZES)])
def test_shapes_with_norms(backend_name, poison, size, channels, norms, dtype):
    options = {**norms, "channels": channels, "size": size, "dtype": dtype}
    draws = [cases.lstm_gates(seed=seed, **options) for seed in seeds(dtype, channels)]
    assert_accurate("lstm_gates", draws)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norms", [{}, *NORMS], ids=str)
def test_model_sized(backend_name, poison, three_threads, norms, dtype):
    assert_accurate("lstm_gates", cases.lstm_gates(5, 64, (16, 16), **norms, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_maps_of_several_blocks(backend_name, poison, three_threads, norms, dtype):
    """More positions than the kernels sum at once."""
    assert_accurate("lstm_gates", cases.lstm_gates(4, 2, (37, 43), **norms, dtype=dtype))


@pytest.mark.parametrize("offset", [30.0, -1000.0])
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_means_far_from_zero(backend_name, norms, offset):
    """Where E[x^2] - E[x]^2 would lose most digits of the variance, and all of them for the larger mean."""
    draws = [cases.lstm_gates(2, 4, (9, 70), **norms, seed=seed, dtype=torch.float32) for seed in range(24)]
    maps = [name for name, norm in (("gates", "norm"), ("recurrent", "recurrent_norm")) if norm in norms]
    assert_accurate("lstm_gates", [{**draw, **{name: draw[name] + offset for name in maps}} for draw in draws])


@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_constant_maps(backend_name, norms):
    """Without variance the norm gives its bias, and eps keeps the gradients finite."""
    arguments = cases.lstm_gates(**norms)
    maps = [name for name in ("gates", "recurrent") if name in arguments]
    flat = {**arguments, **{name: torch.full_like(arguments[name], 0.1) for name in maps}}
    result = evaluate("lstm_gates", cases.public("lstm_gates"), flat)
    biases = {"gates": "norm_bias", "recurrent": "recurrent_norm_bias"}
    plain = {name: arguments[name] for name in ("c", "forget_bias")}
    for name in maps:
        bias = flat.get(biases[name], flat[name])
        plain[name] = (bias if bias.ndim > 1 else bias[:, None, None]).expand_as(flat[name])
    expected = cases.outputs_of(cases.naive("lstm_gates")(**plain))
    torch.testing.assert_close(tuple(result.outputs.values()), expected, rtol=1e-9, atol=1e-11)
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())


@pytest.mark.parametrize("eps", [1e-12, 0.5, 3])
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_eps(backend_name, norms, eps):
    assert_accurate("lstm_gates", {**cases.lstm_gates(**norms), "eps": eps})


@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_a_sample_does_not_depend_on_the_others(native_backend, norms):
    """Bit for bit, whatever its place in the batch."""
    arguments = cases.lstm_gates(5, 3, (6, 7), **norms, dtype=torch.float32)
    together = cases.outputs_of(cases.public("lstm_gates")(**arguments))
    for sample in range(5):
        one = cases.map_tensors(lambda x, at=sample: x[at : at + 1] if x.ndim == 4 else x, arguments)
        alone = cases.outputs_of(cases.public("lstm_gates")(**one))
        assert all(torch.equal(left, right[sample : sample + 1]) for left, right in zip(alone, together, strict=True))


@pytest.mark.parametrize("forget_bias", [0.0, 1, -2.5])
def test_forget_bias(backend_name, forget_bias):
    assert_accurate("lstm_gates", cases.lstm_gates(forget_bias=forget_bias))


def test_forget_bias_is_zero_by_default(backend_name):
    arguments = cases.lstm_gates(forget_bias=0.0)
    default = fastsam.ops.lstm_gates(arguments["gates"], arguments["c"])
    for left, right in zip(default, fastsam.ops.lstm_gates(**arguments), strict=True):
        assert torch.equal(left, right)


def test_saturated_gates(backend_name):
    """Gates of +-1e3: remembers, forgets, writes and hides exactly, and its gradients are finite."""
    arguments = cases.lstm_gates(forget_bias=0.0)
    gates = (1000 * arguments["gates"].sign()).requires_grad_()
    h, c_new = fastsam.ops.lstm_gates(gates, arguments["c"])
    i, f, g, o = gates.detach().sign().chunk(4, dim=1)
    expected = (f > 0) * arguments["c"] + (i > 0) * g
    torch.testing.assert_close(c_new, expected)
    torch.testing.assert_close(h, (o > 0) * expected.tanh())
    (h.sum() + c_new.sum()).backward()
    assert gates.grad.isfinite().all()


@pytest.mark.parametrize("output", [0, 1], ids=["h", "c_new"])
def test_gradient_from_one_output_only(backend_name, output):
    """The other output's gradient is absent, not zero-filled by the caller."""
    arguments = cases.lstm_gates()
    gradients = []
    for function in (fastsam.ops.lstm_gates, cases.naive("lstm_gates")):
        leaves = [arguments[name].clone().requires_grad_() for name in ("gates", "c")]
        gradients.append(torch.autograd.grad(function(*leaves, 0.75)[output].square().sum(), leaves))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
