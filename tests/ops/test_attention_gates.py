"""The attention and 1x1 gates as one registered operator, which compiled code and tensor subclasses call."""

import cases
import pytest
import torch
from torch import Tensor

import fastsam
from fastsam.ops import separable_gates
from fastsam.ops._attention import Source, native
from fastsam.ops._attention.gates import aggregate, attention_gates

OPERATOR = torch.ops.fastsam.attention_gates.default
FORMS = [(sources, keys, bias) for sources in (1, 2) for keys in (None, 2) for bias in (True, False)]


def arguments(sources: int, keys: int | None, bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """In the order of the registered operator; the second source is the memory itself."""
    of = cases.double_attention(channels=3, out=4, keys=keys, dtype=dtype)
    gates = cases.separable_gates(channels=3, z=4, kernel=None, bias=bias, dtype=dtype)
    flat = [of["h"], of["score_h"], of["score_bias_h"], of["value_h"], of.get("key_h")]
    second = [of["m"], of["score_m"], of["score_bias_m"], of["value_m"], of.get("key_m")]
    second = second if sources == 2 else [None] * 5
    return [of["m"], gates["pointwise"], gates["bias"], of["value_bias"], *flat, *second]


def leaves(values: list[Tensor | None]) -> list[Tensor | None]:
    """Leaves that want gradients; what is given twice stays one."""
    made = {id(value): value.clone().requires_grad_() for value in values if value is not None}
    return [None if value is None else made[id(value)] for value in values]


def sources_of(values: list[Tensor | None]) -> list[Source]:
    return [Source(*values[start : start + 5]) for start in (4, 9) if values[start] is not None]


def two_operators(values: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    m, pointwise, bias, value_bias, h, *_ = values
    return separable_gates(aggregate(sources_of(values), value_bias), h, m, None, pointwise, bias)


def results(function, values: list[Tensor | None]) -> list[Tensor]:
    """Outputs, and gradients of all arguments."""
    values = leaves(values)
    h_hat, m_new = function(values)
    distinct = list({id(value): value for value in values if value is not None}.values())
    return [h_hat, m_new, *torch.autograd.grad(h_hat.square().sum() + m_new.cos().sum(), distinct)]


@pytest.mark.parametrize(("sources", "keys", "bias"), FORMS)
def test_equals_the_two_operators(backend_name, sources, keys, bias):
    values = arguments(sources, keys, bias)
    for actual, expected in zip(
        results(lambda given: OPERATOR(*given)[:2], values), results(two_operators, values), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sources", [1, 2])
def test_equals_the_two_operators_on_triton(sources):
    values = arguments(sources, 2, True, torch.float32)
    with fastsam.backend("triton"):
        actual = results(lambda given: OPERATOR(*given)[:2], values)
    for mine, expected in zip(actual, results(two_operators, values), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sources", "keys", "bias"), FORMS)
def test_opcheck(sources, keys, bias):
    values = leaves(arguments(sources, keys, bias, torch.float32))
    if sources == 2:
        values[9] = values[9].detach().clone().requires_grad_()  # opcheck wants no tensor twice
    torch.library.opcheck(OPERATOR, tuple(values))


@pytest.mark.parametrize("use_memory_attention", [True, False])
def test_compiled_code_calls_it(use_memory_attention):
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        calls.extend(str(node.target) for node in graph.graph.nodes if "fastsam" in str(node.target))
        return graph

    torch._dynamo.reset()
    sam = fastsam.SAM(3, 2, None, use_memory_attention=use_memory_attention, dtype=torch.float64)
    h, m = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    outputs = torch.compile(sam, fullgraph=True, backend=backend)(h, m)
    torch._dynamo.reset()
    assert calls == ["fastsam.attention_gates"]
    for actual, expected in zip(outputs, sam(h, m), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_second_derivatives_say_where_to_get_them():
    values = leaves(arguments(2, None, True))
    h_hat, *_ = OPERATOR(*values)
    (gradient,) = torch.autograd.grad(h_hat.square().sum(), [values[0]], create_graph=True)
    with pytest.raises(RuntimeError, match=r'attention_gates has no second derivative.*backend\("eager"\)'):
        gradient.sum().backward()


def test_arguments_are_checked():
    values = arguments(1, None, True)
    values[1] = values[1][:, :-1]
    with pytest.raises(ValueError, match=r"separable_gates: pointwise must have shape \(3C, Cz\+C, 1, 1\)"):
        OPERATOR(*values)


def test_autocast_casts_the_memory_once():
    """It stays one tensor where it is attended to and updated, as the kernel for both wants it."""
    values = [None if value is None else value.float() for value in arguments(2, None, True)]
    values[9] = values[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h_hat, _ = attention_gates(sources_of(values), values[3], *values[:3])
    expected, _ = two_operators(values)
    torch.testing.assert_close(h_hat, expected)
    from fastsam.ops import _dispatch

    half = values[0].bfloat16()
    first, second, other = _dispatch.without_autocast(lambda *given: given, half, half, values[4].bfloat16())
    assert first is second and first is not other and first.dtype == torch.float32


def test_a_memory_that_needs_a_copy_is_copied_once(monkeypatch):
    """Also where it is attended to and updated, for the kernel that does both."""
    copies, dense = [], native.dense

    def counted(tensor: Tensor) -> Tensor:
        result = dense(tensor)
        if result is not tensor:
            copies.append(tensor)
        return result

    monkeypatch.setattr(native, "dense", counted)
    monkeypatch.setattr(native, "run", lambda *_: None)
    values = arguments(2, None, True)
    h, m = (values[place].contiguous(memory_format=torch.channels_last) for place in (4, 0))
    first, second = sources_of(values)
    native.forward_with_gates([first._replace(x=h), second._replace(x=m)], values[3], m, *values[1:3], save=False)
    assert [id(tensor) for tensor in copies] == [id(m), id(h)]
