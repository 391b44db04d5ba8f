"""What the forward pass of the attention operators hands on to the backward pass: r, lse and shift of each source."""

import accuracy
import cases
import checks
import oracle
import pytest
import torch
from extension import require_native
from torch import Tensor

import fastsam

VARIANTS = [variant for variant in cases.VARIANTS if "attention" in variant]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)


def _arguments(variant: str, dtype: torch.dtype, seed: int = 0) -> tuple[str, cases.Arguments]:
    """Maps of mean 3, more positions than a tile has, and scores of up to 3."""
    operator, options = cases.VARIANTS[variant]
    arguments = cases.make(operator, **{**options, "channels": 13, "size": (9, 11), "seed": seed})
    arguments |= {name: arguments[name] + 3.0 for name in ("x", "h", "m") if name in arguments}
    return operator, cases.map_tensors(lambda value: value.to(dtype), cases.scale_scores(operator, arguments, 3.0))


def _forward(operator: str, arguments: cases.Arguments) -> tuple[Tensor, list[Tensor]]:
    z, *contexts = cases.registered(operator)(**arguments)
    return z, contexts


def _backward(operator: str, arguments: cases.Arguments, contexts: list[Tensor]) -> dict[str, Tensor]:
    """The gradients by the names of the arguments, for the upstream gradient of `checks.evaluate`."""
    keys = {"self_attention": ["key"], "double_attention": ["key_h", "key_m"]}[operator]
    inputs = {**arguments, **{name: arguments.get(name) for name in keys}}
    (dz,) = checks.upstream_for([cases.eager(operator)(**arguments)])
    gradients = getattr(torch.ops.fastsam, f"{operator}_backward")(dz, *inputs.values(), *contexts)
    return {f"gradient of {name}": value for name, value in zip(arguments, gradients, strict=True)}


def _naive_gradients(operator: str, arguments: cases.Arguments) -> dict[str, Tensor]:
    gradients = checks.evaluate(operator, cases.naive(operator), arguments).gradients
    return {f"gradient of {name}": value for name, value in gradients.items()}


def _sources(operator: str) -> list[tuple[str, str]]:
    """The map of each source, and the end of the names of its weights."""
    return [("x", "")] if operator == "self_attention" else [("h", "_h"), ("m", "_m")]


def _contexts_for(operator: str, arguments: cases.Arguments, shifts: list[Tensor]) -> list[Tensor]:
    """The contexts in float64 after each source's shift (B, C) was taken from its columns."""
    arguments = cases.map_tensors(Tensor.double, arguments)
    contexts = []
    for (name, end), shift in zip(_sources(operator), shifts, strict=True):
        x = arguments[name] - shift[:, :, None, None]
        query = oracle.matrix(arguments[f"score{end}"], arguments[_sources(operator)[0][0]])
        query = query + arguments[f"score_bias{end}"][:, None, None]
        keys = oracle.matrix(arguments[f"key{end}"], x) if f"key{end}" in arguments else x
        scores = torch.einsum("bdi,bdj->bij", query.flatten(2), keys.flatten(2))
        average = torch.einsum("bij,bcj->bci", scores.softmax(2), x.flatten(2)).view_as(x)
        contexts += [average, scores.logsumexp(2), shift]
    return contexts


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
def test_contexts_are_of_the_source_without_its_mean(backend_name, poison, variant, dtype):
    operator, arguments = _arguments(variant, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, contexts = _forward(operator, arguments)
    means = [arguments[name].double().mean((2, 3)) for name, _ in _sources(operator)]
    shifts = contexts[2::3]
    tolerance = 16 * torch.finfo(dtype if backend_name == "eager" else wide).eps
    for shift, mean in zip(shifts, means, strict=True):
        torch.testing.assert_close(shift.double(), mean, rtol=tolerance, atol=0)
    expected = _contexts_for(operator, arguments, [shift.double() for shift in shifts])
    for value, exact in zip(contexts, expected, strict=True):
        assert value.dtype == wide and value.is_contiguous()
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operator", cases.ATTENTIONS)
def test_a_mean_that_is_not_finite_is_not_taken(backend_name, operator, value):
    """Only of the channel and sample that have none."""
    arguments = cases.make(operator)
    name, _ = _sources(operator)[-1]
    _, contexts = _forward(operator, arguments)
    arguments[name][1, 2, 3, 1] = value
    _, spoiled = _forward(operator, arguments)
    contexts[-1][1, 2] = 0
    assert torch.equal(spoiled[-1], contexts[-1])


@DTYPES
@pytest.mark.parametrize(("first", "second"), [("eager", "cpu"), ("cpu", "eager")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_contexts_of_another_back_end(poison, variant, first, second, dtype):
    require_native()
    actual, exact, plain = [], [], []
    for seed in accuracy.seeds(dtype, 13):
        operator, arguments = _arguments(variant, dtype, seed)
        with fastsam.backend(first):
            _, contexts = _forward(operator, arguments)
        with fastsam.backend(second):
            actual.append(_backward(operator, arguments, contexts))
        exact.append(_naive_gradients(operator, cases.map_tensors(Tensor.double, arguments)))
        plain.append(_naive_gradients(operator, arguments))
    accuracy.assert_accurate(actual, exact, None if dtype == torch.float64 else plain)


@pytest.mark.parametrize(
    ("dtype", "distance"),
    [(torch.float64, -3.0), (torch.float64, 0.5), (torch.float32, 0.5), (torch.bfloat16, 0.5), (torch.bfloat16, 0.0)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_for_any_shift(backend_name, poison, variant, dtype, distance):
    """The shift of the context need not be the mean, nor fit into the dtype of the maps; far from the mean, where the
    gradients of narrow dtypes lose digits, it is right in float64 all the same.
    """
    generator = torch.Generator().manual_seed(7)
    actual, exact, plain = [], [], []
    for seed in accuracy.seeds(dtype, 13):
        operator, arguments = _arguments(variant, dtype, seed)
        maps = [arguments[name].double() for name, _ in _sources(operator)]
        shifts = [x.mean((2, 3)) + distance * (1 + 0.1 * torch.randn(x.shape[:2], generator=generator)) for x in maps]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        contexts = _contexts_for(operator, arguments, [shift.to(wide).double() for shift in shifts])
        actual.append(_backward(operator, arguments, [value.to(wide) for value in contexts]))
        exact.append(_naive_gradients(operator, cases.map_tensors(Tensor.double, arguments)))
        plain.append(_naive_gradients(operator, arguments))
    accuracy.assert_accurate(actual, exact, None if dtype == torch.float64 else plain)
