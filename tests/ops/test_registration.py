"""The operators as torch.library knows them."""

import cases
import pytest
import torch
from torch import Tensor

import fastsam

VARIANTS = list(cases.VARIANTS)
PUBLIC_VARIANTS = list(cases.PUBLIC_VARIANTS)


def _arguments(variant: str, **options) -> tuple[str, cases.Arguments]:
    operator, defaults = cases.PUBLIC_VARIANTS[variant]
    return operator, cases.make(operator, **{**defaults, **options})


def _differentiable(operator: str, result) -> tuple[Tensor, ...]:
    return cases.outputs_of(result)[: len(cases.OUTPUTS[operator])]


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(backend_name, variant, requires_grad):
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes."""
    operator, arguments = _arguments(variant, dtype=torch.float32)
    arguments = cases.map_tensors(lambda tensor: tensor.requires_grad_(requires_grad), arguments)
    torch.library.opcheck(cases.registered(operator), (), arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_of_a_positional_call(backend_name, variant):
    """Optional arguments at their defaults are left out, as tracers and the dispatcher do."""
    operator, arguments = _arguments(variant, **({"forget_bias": 0.0} if variant == "lstm_gates" else {}))
    arguments = cases.map_tensors(lambda tensor: tensor.requires_grad_(), arguments)
    schema = cases.registered(operator)._schema.arguments
    values = [arguments.get(argument.name, argument.default_value) for argument in schema]
    while schema[len(values) - 1].has_default_value() and not isinstance(values[-1], Tensor):
        values.pop()
    torch.library.opcheck(cases.registered(operator), tuple(values))


# Their last argument, which the public functions set where the new state has a norm.
STATE_FORMS = [("lstm_gates-norms", "gate"), ("memory_gates-recurrent", "gate"), ("norm_gate-norm", "keep_state")]


@pytest.mark.parametrize(("variant", "flag"), STATE_FORMS)
def test_opcheck_of_what_the_norm_of_a_state_is_made_of(backend_name, variant, flag):
    operator, arguments = _arguments(variant, dtype=torch.float32)
    arguments = cases.map_tensors(lambda tensor: tensor.requires_grad_(), arguments)
    torch.library.opcheck(cases.registered(operator), (), {**arguments, flag: True})


@pytest.mark.parametrize(("variant", "flag"), STATE_FORMS)
def test_gradient_of_what_the_norm_of_a_state_is_made_of(backend_name, variant, flag):
    """Of both outputs together, against finite differences."""
    operator, arguments = _arguments(variant, channels=2)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return cases.registered(operator)(**{**arguments, **dict(zip(names, values, strict=True)), flag: True})[:2]

    assert torch.autograd.gradcheck(call, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_of_other_layouts(backend_name, variant, layout):
    """The strides that fake tensors promise are those that come out."""
    operator, arguments = _arguments(variant)
    arguments = cases.map_tensors(lambda tensor: cases.LAYOUTS[layout](tensor).requires_grad_(), arguments)
    torch.library.opcheck(cases.registered(operator), (), arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_registered_operator_equals_the_public_function(backend_name, variant):
    operator, arguments = _arguments(variant)
    results = []
    for function in (cases.public(operator), cases.registered(operator)):
        leaves = cases.map_tensors(lambda tensor: tensor.clone().requires_grad_(), arguments)
        outputs = _differentiable(operator, function(**leaves))
        tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
        gradients = torch.autograd.grad([output.square().sum() for output in outputs], tensors)
        results.append([*outputs, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_registered_operator_under_autocast(backend_name, variant):
    """On a CPU autocast means float32, as for PyTorch's own softmax; the gradients have the dtypes of the arguments."""
    operator, arguments = _arguments(variant, dtype=torch.float32)
    half = cases.map_tensors(lambda tensor: tensor.bfloat16().requires_grad_(), arguments)
    rounded = cases.map_tensors(lambda tensor: tensor.detach().float(), half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = _differentiable(operator, cases.registered(operator)(**half))
    expected = cases.outputs_of(cases.eager(operator)(**rounded))
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, reference)
    torch.autograd.backward([output.sum() for output in outputs])
    for name, value in half.items():
        if isinstance(value, Tensor):
            assert value.grad.dtype == torch.bfloat16 and value.grad.isfinite().all(), name


@pytest.mark.parametrize("variant", PUBLIC_VARIANTS)
def test_public_function_under_autocast(backend_name, variant):
    """Mixed dtypes, which are an error outside of autocast, are brought to one."""
    operator, arguments = _arguments(variant, dtype=torch.float32)
    first = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    mixed = {**arguments, first: arguments[first].bfloat16()}
    with pytest.raises(TypeError, match="bfloat16"):
        cases.public(operator)(**mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = cases.outputs_of(cases.public(operator)(**mixed))
    expected = cases.outputs_of(cases.eager(operator)(**{**mixed, first: mixed[first].float()}))
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("variant", PUBLIC_VARIANTS)
def test_autocast_leaves_float64_alone(backend_name, variant):
    operator, arguments = _arguments(variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cases.outputs_of(cases.public(operator)(**arguments))
    for actual, expected in zip(inside, cases.outputs_of(cases.public(operator)(**arguments)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("variant", PUBLIC_VARIANTS)
def test_meta_tensors_have_shapes(variant):
    operator, arguments = _arguments(variant)
    meta = cases.map_tensors(lambda tensor: tensor.to("meta"), arguments)
    with fastsam.backend("auto"):
        outputs = cases.outputs_of(cases.public(operator)(**meta))
    for actual, expected in zip(outputs, cases.outputs_of(cases.eager(operator)(**arguments)), strict=True):
        assert actual.device.type == "meta"
        assert actual.shape == expected.shape


@pytest.mark.parametrize(
    "variant",
    [
        "double_attention-keys",
        "self_attention",
        "separable_gates",
        "lstm_gates",
        "lstm_gates-recurrent",
        "lstm_gates-norms",
        "lstm_gates-position_norms",
        "lstm_gates-all_norms",
        "memory_gates-state_norm",
        "memory_gates-norms",
        "norm_gate-norm",
    ],
)
def test_compiled_operator(native_backend, variant):
    """Traced whole with its backward pass, and not again for other numbers or another batch size."""
    torch._dynamo.reset()
    operator, _ = cases.PUBLIC_VARIANTS[variant]
    compiled = torch.compile(cases.public(operator), fullgraph=True, backend="aot_eager")
    maps = {"h", "m", "x", "y", "z", "gates", "c", "recurrent"}
    for batch, stance in ((3, "default"), (3, "fail_on_recompile"), (6, "fail_on_recompile")):
        _, arguments = _arguments(variant, batch=batch, seed=batch)
        results = []
        for function in (compiled, cases.public(operator)):
            leaves = cases.map_tensors(lambda tensor: tensor.clone().requires_grad_(), arguments)
            for name in maps & leaves.keys():
                torch._dynamo.mark_dynamic(leaves[name], 0)
            with torch.compiler.set_stance(stance):
                outputs = cases.outputs_of(function(**leaves))
            tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
            gradients = torch.autograd.grad([output.square().sum() for output in outputs], tensors)
            results.append([*outputs, *gradients])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_registered_operator_checks_its_arguments(native_backend, variant):
    """The same errors as the public function's: a wrong shape must not reach the compiled code."""
    operator, arguments = _arguments(variant)
    *_, name = (argument for argument, value in arguments.items() if isinstance(value, Tensor))
    last = arguments[name]
    wrong = {**arguments, name: torch.cat([last, last], dim=1 if last.ndim == 4 else 0)}
    with pytest.raises((ValueError, TypeError), match=operator):
        cases.registered(operator)(**wrong)


@pytest.mark.parametrize("operator", ["lstm_gates", "memory_gates", "norm_gate"])
def test_a_bias_without_a_weight_is_refused(operator):
    arguments = cases.make(operator, norm="channel")
    with pytest.raises(ValueError, match=f"{operator}: norm has a bias without a weight"):
        cases.registered(operator)(**{**arguments, "norm_weight": None})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_a_traced_call_depends_on_its_inputs(native_backend, operator):
    arguments, others = (cases.make(operator, seed=seed, dtype=torch.float32) for seed in range(2))
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]

    def call(*tensors):
        return cases.public(operator)(**{**arguments, **dict(zip(names, tensors, strict=True))})

    traced = torch.jit.trace(call, [arguments[name] for name in names])
    given = [others[name] for name in names]
    torch.testing.assert_close(traced(*given), call(*given), rtol=0, atol=0)
