"""Where the numbers lie must not matter: strides, storage offsets, empty batches, which gradients are asked for."""

import math
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate, evaluate, same_bits
from torch import Tensor

VARIANTS = list(cases.PUBLIC_VARIANTS)


def _arguments(variant: str, **options) -> tuple[str, cases.Arguments]:
    operator, defaults = cases.PUBLIC_VARIANTS[variant]
    return operator, cases.make(operator, **{**defaults, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_in_any_layout(backend_name, poison, variant, layout, dtype):
    draws = [_arguments(variant, dtype=dtype, seed=seed) for seed in seeds(dtype, 5)]
    assert_accurate(draws[0][0], [cases.map_tensors(cases.LAYOUTS[layout], arguments) for _, arguments in draws])


@pytest.mark.parametrize("layout", [*cases.LAYOUTS, "expanded_scalar"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_upstream_gradients_in_any_layout(backend_name, poison, variant, layout):
    operator, arguments = _arguments(variant)
    if layout == "expanded_scalar":  # what `output.sum().backward()` sends down

        def upstream(gradient: Tensor) -> Tensor:
            return gradient.new_full((), 0.5).expand_as(gradient)

    else:
        upstream = cases.LAYOUTS[layout]
    assert_accurate(operator, arguments, upstream=upstream)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_contiguous_and_own_their_memory(backend_name, variant):
    operator, arguments = _arguments(variant)
    arguments = cases.map_tensors(cases.channels_last, arguments)
    result = evaluate(operator, cases.public(operator), arguments)
    memory = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, Tensor)}
    for name, output in result.outputs.items():
        assert output.is_contiguous(), name
        assert output.untyped_storage().data_ptr() not in memory, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_around_or_in_the_arguments_is_written(backend_name, variant, dtype):
    operator, arguments = _arguments(variant, size=(5, 7), dtype=dtype)
    laid_out = cases.map_tensors(cases.embedded, arguments)
    storages = [value._base for value in laid_out.values() if isinstance(value, Tensor)]
    before = [storage.clone() for storage in storages]
    upstream_storages = []

    def upstream(gradient: Tensor) -> Tensor:
        view = cases.embedded(gradient)
        upstream_storages.append((view._base, view._base.clone()))
        return view

    evaluate(operator, cases.public(operator), laid_out, upstream=upstream)
    for storage, copy in [*zip(storages, before, strict=True), *upstream_storages]:
        assert torch.equal(storage, copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_around_the_results_is_written(native_backend, variant, dtype, monkeypatch):
    """Everything allocated for results comes with sentinels before and behind it."""
    allocations = []

    def guarded(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        room = torch.full([math.prod(shape) + 128], 12345.0, dtype=dtype)
        allocations.append(room)
        return room[64:-64].view(shape)

    def empty(*shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], Sequence) else shape
        return guarded(sizes, dtype or torch.get_default_dtype())

    operator, arguments = _arguments(variant, size=(5, 7), dtype=dtype)
    expected = evaluate(operator, cases.public(operator), arguments)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: guarded(like.shape, like.dtype))
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *shape, dtype=None: empty(*shape, dtype=dtype or like.dtype))
    actual = evaluate(operator, cases.public(operator), arguments)
    monkeypatch.undo()
    assert same_bits(actual, expected)
    assert len(allocations) >= len(actual.tensors())
    for room in allocations:
        assert (room[:64] == 12345.0).all() and (room[-64:] == 12345.0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_gradient_alone(backend_name, poison, variant):
    """Gradients do not depend on which others are asked for, and nobody else gets one."""
    operator, arguments = _arguments(variant)
    everything = evaluate(operator, cases.public(operator), arguments)
    for name in everything.gradients:
        alone = evaluate(operator, cases.public(operator), arguments, wanted=[name])
        torch.testing.assert_close(alone.gradients[name], everything.gradients[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_wanted(backend_name, poison, variant):
    operator, arguments = _arguments(variant)
    expected = evaluate(operator, cases.public(operator), arguments).outputs.values()
    leaves = cases.map_tensors(lambda tensor: tensor.clone().requires_grad_(), arguments)
    with torch.no_grad():
        silent = cases.public(operator)(**leaves)
    with torch.inference_mode():
        inferred = cases.public(operator)(**leaves)
    plain = cases.public(operator)(**arguments)
    for outputs in (silent, inferred, plain):
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        for output, reference in zip(outputs, expected, strict=True):
            assert not output.requires_grad
            if backend_name == "eager":  # PyTorch multiplies matrices in another order where a gradient is wanted
                torch.testing.assert_close(output, reference)
            else:
                assert torch.equal(output.clone(), reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(backend_name, poison, variant):
    operator, arguments = _arguments(variant, batch=0)
    result = evaluate(operator, cases.public(operator), arguments)
    for name, output in result.outputs.items():
        assert output.shape[0] == 0 and output.shape[2:] == (4, 3), name
    for name, gradient in result.gradients.items():
        assert gradient.shape == arguments[name].shape, name
        assert not gradient.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_accumulate(backend_name, variant):
    """Two backward passes into .grad: the second adds to the first."""
    operator, arguments = _arguments(variant)
    leaves = cases.map_tensors(lambda tensor: tensor.clone().requires_grad_(), arguments)
    tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
    once = []
    for _ in range(2):
        outputs = cases.public(operator)(**leaves)
        torch.autograd.backward([output.square().sum() for output in cases.outputs_of(outputs)])
        once = once or [tensor.grad.clone() for tensor in tensors]
    for tensor, first in zip(tensors, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_can_be_kept(backend_name, poison, variant):
    operator, arguments = _arguments(variant)
    leaves = cases.map_tensors(lambda tensor: tensor.clone().requires_grad_(), arguments)
    tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
    loss = sum(output.square().sum() for output in cases.outputs_of(cases.public(operator)(**leaves)))
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_an_argument_changed_in_place_is_noticed(backend_name):
    """What the backward pass needs and somebody overwrote is an error, not a wrong gradient."""
    arguments = cases.double_attention()
    h = arguments["h"].requires_grad_() * 1
    z = cases.public("double_attention")(**{**arguments, "h": h})
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_on_any_number_of_threads(native_backend, variant, dtype, threads):
    """32 channels: enough work that the kernels do use all threads."""
    operator, arguments = _arguments(variant, channels=32, size=(11, 13), dtype=dtype)
    alone = evaluate(operator, cases.public(operator), arguments)
    torch.set_num_threads(threads)
    try:
        together = [evaluate(operator, cases.public(operator), arguments) for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert all(same_bits(alone, one) for one in together)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_on_every_run(backend_name, variant):
    operator, arguments = _arguments(variant, batch=3, channels=13, size=(11, 13), dtype=torch.float32)
    first = evaluate(operator, cases.public(operator), arguments)
    for _ in range(3):
        assert same_bits(first, evaluate(operator, cases.public(operator), arguments))


@pytest.mark.parametrize("variant", VARIANTS)
def test_lazily_negated_views(backend_name, variant):
    """A view whose numbers are stored with the other sign: whoever reads the memory must know."""
    operator, arguments = _arguments(variant)
    negated = cases.map_tensors(lambda tensor: torch._neg_view(-tensor), arguments)
    assert all(tensor.is_neg() for tensor in negated.values() if isinstance(tensor, Tensor))
    actual = cases.outputs_of(cases.public(operator)(**negated))
    expected = cases.outputs_of(cases.public(operator)(**arguments))
    torch.testing.assert_close(actual, expected)
