"""Arguments that do not fit: one error that names the argument, what it was, and what it should be."""

import cases
import pytest
import torch
from torch import Tensor

VARIANTS = list(cases.PUBLIC_VARIANTS)


def _arguments(variant: str) -> tuple[str, cases.Arguments]:
    operator, options = cases.PUBLIC_VARIANTS[variant]
    return operator, cases.make(operator, **options)


def _tensors(arguments: cases.Arguments) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)]


def _refused(operator: str, arguments: cases.Arguments, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        cases.public(operator)(**arguments)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{operator}: ")
    return str(caught.value)


def _names(message: str, name: str) -> bool:
    """Whether the message is about the argument `name`, as a word; norms are pairs."""
    return f" {name.replace('norm_weight', 'norm[0]').replace('norm_bias', 'norm[1]')} " in message


@pytest.mark.parametrize("value", [[[1.0]], 1.0, "h"], ids=["list", "float", "str"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_not_a_tensor(backend_name, variant, value):
    operator, arguments = _arguments(variant)
    for name in _tensors(arguments):
        message = _refused(operator, {**arguments, name: value}, TypeError)
        assert _names(message, name) and type(value).__name__ in message and "torch.Tensor" in message


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_required_tensor_is_none(backend_name, variant):
    operator, arguments = _arguments(variant)
    optional = {"z", "depthwise", "bias", "key", "key_h", "key_m", "recurrent"}
    for name in set(_tensors(arguments)) - optional:
        message = _refused(operator, {**arguments, name: None}, TypeError)
        assert _names(message, name) and "NoneType" in message


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_rank(backend_name, variant):
    operator, arguments = _arguments(variant)
    for name in _tensors(arguments):
        for wrong in (arguments[name][None], arguments[name][0]):
            message = _refused(operator, {**arguments, name: wrong}, ValueError)
            assert _names(message, name) and str(tuple(wrong.shape)) in message
            assert f"{arguments[name].ndim} dimension" in message


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_size_of_any_dimension(backend_name, variant):
    """One more or one less than what the other arguments agree on: it, or the first to disagree with it, is named."""
    operator, arguments = _arguments(variant)
    # No other argument of self_attention than x has a batch or positions.
    free = {("x", 0), ("x", 2), ("x", 3)} if operator == "self_attention" else set()
    for name in _tensors(arguments):
        for dim in {*range(arguments[name].ndim)} - {dim for free_name, dim in free if free_name == name}:
            for change in (1, -1):
                shape = list(arguments[name].shape)
                shape[dim] += change
                call = {**arguments, name: arguments[name].new_zeros(shape)}
                message = _refused(operator, call, ValueError)
                assert any(
                    _names(message, blamed) and str(tuple(call[blamed].shape)) in message for blamed in _tensors(call)
                ), f"{name} of shape {tuple(shape)}: {message}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_dtype(backend_name, variant):
    operator, arguments = _arguments(variant)
    first, *others = _tensors(arguments)
    for name in others:
        message = _refused(operator, {**arguments, name: arguments[name].float()}, TypeError)
        assert "torch.float32" in message and "torch.float64" in message
        assert any(_names(message, blamed) for blamed in (name, first))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_not_floating_point(backend_name, variant, dtype):
    operator, arguments = _arguments(variant)
    message = _refused(operator, cases.map_tensors(lambda tensor: tensor.to(dtype), arguments), TypeError)
    assert str(dtype) in message and "floating-point" in message
    assert any(_names(message, name) for name in _tensors(arguments))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unserved_layouts_and_dtypes(backend_name, variant):
    operator, arguments = _arguments(variant)
    first = _tensors(arguments)[0]
    message = _refused(operator, {**arguments, first: arguments[first].to_sparse()}, TypeError)
    assert _names(message, first) and "torch.sparse_coo" in message and "to_dense" in message
    message = _refused(operator, cases.map_tensors(lambda tensor: tensor.to(torch.float8_e5m2), arguments), TypeError)
    assert "float8_e5m2" in message and "16, 32 or 64 bits" in message


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_dimensions(backend_name, variant):
    """Only the batch may be empty."""
    operator, arguments = _arguments(variant)
    for name in _tensors(arguments):
        for dim in range(0 if arguments[name].ndim < 4 or "wise" in name else 1, arguments[name].ndim):
            shape = list(arguments[name].shape)
            shape[dim] = 0
            call = {**arguments, name: arguments[name].new_zeros(shape)}
            message = _refused(operator, call, ValueError)
            assert any(
                _names(message, blamed) and str(tuple(call[blamed].shape)) in message for blamed in _tensors(call)
            )


@pytest.mark.parametrize("keys", ["double_attention-keys", "self_attention-keys"])
def test_keys_without_channels(backend_name, keys):
    """All maps that have D agree on D = 0."""
    operator, arguments = _arguments(keys)
    empty = {name: value[:0] if name.startswith(("key", "score")) else value for name, value in arguments.items()}
    message = _refused(operator, empty, ValueError)
    assert "D at least 1" in message and "(0, 5)" in message


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_device(backend_name, variant):
    operator, arguments = _arguments(variant)
    for name in _tensors(arguments):
        message = _refused(operator, {**arguments, name: arguments[name].to("meta")}, ValueError)
        assert "meta" in message and "cpu" in message
        assert any(_names(message, blamed) for blamed in _tensors(arguments))


@pytest.mark.parametrize(
    ("variant", "wrong", "words"),
    [
        ("double_attention", {"m": (2, 6, 4, 3)}, ["m ", "(2, 5, 4, 3)", "(2, 6, 4, 3)"]),
        ("double_attention", {"score_m": (4, 5)}, ["score_m ", "(5, 5)", "(4, 5)"]),
        ("double_attention", {"score_bias_h": (4,)}, ["score_bias_h ", "(5,)", "(4,)"]),
        ("double_attention", {"value_bias": (4,)}, ["value_bias ", "(5,)", "(4,)"]),
        ("double_attention-keys", {"key_m": (3, 5)}, ["key_m ", "(2, 5)", "(3, 5)"]),
        ("double_attention-keys", {"score_h": (5, 5)}, ["score_h ", "(2, 5)", "(5, 5)"]),
        ("self_attention", {"value": (7, 6)}, ["value ", "(7, 5)", "(7, 6)"]),
        ("separable_gates", {"z": (2, 5, 3, 4)}, ["z ", "(2, 5, 4, 3)", "(2, 5, 3, 4)"]),
        ("separable_gates", {"depthwise": (10, 1, 4, 4)}, ["depthwise ", "odd", "(10, 1, 4, 4)"]),
        ("separable_gates", {"depthwise": (10, 1, 3, 5)}, ["depthwise ", "(10, 1, 3, 3)", "(10, 1, 3, 5)"]),
        ("separable_gates", {"depthwise": (5, 1, 3, 3)}, ["depthwise ", "(10, 1, 3, 3)", "(5, 1, 3, 3)"]),
        ("separable_gates", {"pointwise": (20, 10, 1, 1)}, ["pointwise ", "(15, 10, 1, 1)", "(20, 10, 1, 1)"]),
        ("separable_gates", {"bias": (5,)}, ["bias ", "(15,)", "(5,)"]),
        ("lstm_gates", {"gates": (2, 15, 4, 3)}, ["gates ", "(2, 20, 4, 3)", "(2, 15, 4, 3)"]),
        ("lstm_gates-norms", {"recurrent": (2, 5, 4, 3)}, ["recurrent ", "(2, 20, 4, 3)", "(2, 5, 4, 3)"]),
        ("lstm_gates-norms", {"norm_weight": (5,)}, ["norm[0] ", "(20,)", "(5,)"]),
        ("lstm_gates-norms", {"norm_weight": (20, 12)}, ["norm[0] ", "(4C,)", "(4C, H, W)", "(20, 12)"]),
        ("lstm_gates-norms", {"norm_weight": (20, 4, 3)}, ["norm[1] ", "(4C, H, W)", "(20,)"]),
        ("lstm_gates-norms", {"recurrent_norm_weight": (20, 4, 3)}, ["recurrent_norm[0] ", "(4C,)", "(20, 4, 3)"]),
        ("lstm_gates-position_norms", {"norm_bias": (20, 3, 4)}, ["norm[1] ", "(20, 4, 3)", "(20, 3, 4)"]),
        ("lstm_gates-state_norm", {"state_norm_weight": (20,)}, ["state_norm[0] ", "(C,)", "(20,)"]),
        ("lstm_gates-state_norm", {"state_norm_weight": (5,)}, ["state_norm[1] ", "(C,)", "(5, 4, 3)"]),
        ("memory_gates", {"gates": (2, 20, 4, 3)}, ["gates ", "(2, 15, 4, 3)", "(2, 20, 4, 3)"]),
        ("memory_gates-norms", {"recurrent_norm_bias": (20,)}, ["recurrent_norm[1] ", "(15,)", "(20,)"]),
        ("memory_gates-all_norms", {"state_norm_bias": (5, 3, 4)}, ["state_norm[1] ", "(5, 4, 3)", "(5, 3, 4)"]),
        ("norm_gate", {"x": (2, 5, 3, 4)}, ["x ", "(2, 5, 4, 3)", "(2, 5, 3, 4)"]),
        ("norm_gate-norm", {"norm_weight": (5, 12)}, ["norm[0] ", "(C,)", "(C, H, W)", "(5, 12)"]),
        ("norm_gate-position_norm", {"norm_bias": (5,)}, ["norm[1] ", "(C, H, W)", "(5,)"]),
    ],
)
def test_the_message_says_what_would_fit(backend_name, variant, wrong, words):
    operator, arguments = _arguments(variant)
    changed = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in wrong.items()}
    message = _refused(operator, {**arguments, **changed}, ValueError)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("given", "missing"), [("key_h", "key_m"), ("key_m", "key_h")])
def test_one_key_map_alone(backend_name, given, missing):
    operator, arguments = _arguments("double_attention-keys")
    message = _refused(operator, {**arguments, missing: None}, ValueError)
    assert given in message and missing in message and "None" in message


@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1.0)], ids=["str", "None", "bool", "tensor"])
@pytest.mark.parametrize(("variant", "name"), [("lstm_gates", "forget_bias"), ("norm_gate", "scale")])
def test_a_constant_is_no_number(backend_name, variant, name, value):
    operator, arguments = _arguments(variant)
    message = _refused(operator, {**arguments, name: value}, TypeError)
    assert _names(message, name) and type(value).__name__ in message


@pytest.mark.parametrize(("value", "error"), [("relu", ValueError), ("", ValueError), (None, TypeError)])
def test_an_activation_that_there_is_not(backend_name, value, error):
    operator, arguments = _arguments("norm_gate-norm")
    message = _refused(operator, {**arguments, "activation": value}, error)
    assert _names(message, "activation") and (repr(value) if error is ValueError else "NoneType") in message


@pytest.mark.parametrize(
    ("norm", "error", "words"),
    [
        (torch.ones(20), TypeError, ["a pair (weight, bias) or None", "got Tensor"]),
        ({"weight": 1, "bias": 0}, TypeError, ["a pair (weight, bias) or None", "got dict"]),
        ((torch.ones(20),), ValueError, ["a pair (weight, bias)", "got 1 values"]),
        ((None, None), TypeError, ["norm[0] must be a torch.Tensor", "NoneType"]),
    ],
    ids=["tensor", "dict", "one value", "twice None"],
)
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("lstm_gates-recurrent", "norm"),
        ("lstm_gates-recurrent", "recurrent_norm"),
        ("lstm_gates", "state_norm"),
        ("memory_gates-recurrent", "recurrent_norm"),
        ("memory_gates", "state_norm"),
        ("norm_gate", "norm"),
    ],
)
def test_norm_is_no_pair(backend_name, variant, name, norm, error, words):
    operator, arguments = _arguments(variant)
    message = _refused(operator, {**arguments, name: norm}, error)
    assert all(word in message for word in [name, *words]), message


@pytest.mark.parametrize(
    ("variant", "name", "rows"),
    [
        ("lstm_gates-recurrent", "norm", "4C"),
        ("lstm_gates-recurrent", "recurrent_norm", "4C"),
        ("memory_gates", "norm", "3C"),
        ("memory_gates", "state_norm", "C"),
        ("norm_gate", "norm", "C"),
    ],
)
def test_norm_without_a_bias(backend_name, variant, name, rows):
    operator, arguments = _arguments(variant)
    weight = torch.ones({"4C": 20, "3C": 15, "C": 5}[rows], dtype=torch.float64)
    message = _refused(operator, {**arguments, name: (weight, None)}, TypeError)
    assert all(word in message for word in (f" {name}[1] must be a torch.Tensor", f"({rows},)", "NoneType")), message


@pytest.mark.parametrize("variant", ["lstm_gates-recurrent_norm", "memory_gates-recurrent_norm"])
def test_recurrent_norm_without_recurrent(backend_name, variant):
    operator, arguments = _arguments(variant)
    message = _refused(operator, {**arguments, "recurrent": None}, ValueError)
    assert "recurrent_norm" in message and "recurrent, which is None" in message


@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1.0)], ids=["str", "None", "bool", "tensor"])
@pytest.mark.parametrize("variant", ["lstm_gates-norms", "memory_gates", "norm_gate-norm"])
def test_eps_is_no_number(backend_name, variant, value):
    operator, arguments = _arguments(variant)
    message = _refused(operator, {**arguments, "eps": value}, TypeError)
    assert _names(message, "eps") and type(value).__name__ in message


@pytest.mark.parametrize("value", [0, 0.0, -1e-5, float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["lstm_gates-norms", "memory_gates", "norm_gate-norm"])
def test_eps_is_not_positive(backend_name, variant, value):
    operator, arguments = _arguments(variant)
    message = _refused(operator, {**arguments, "eps": value}, ValueError)
    assert _names(message, "eps") and "positive" in message and str(value) in message


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_an_error_leaves_the_operator_usable(backend_name, operator):
    arguments = cases.make(operator)
    with pytest.raises(ValueError):
        cases.public(operator)(**cases.map_tensors(lambda tensor: tensor[None], arguments))
    for output in cases.outputs_of(cases.public(operator)(**arguments)):
        assert output.isfinite().all()
