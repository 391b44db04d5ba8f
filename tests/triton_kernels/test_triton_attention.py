"""`double_attention` and `self_attention` on Triton, interpreted where there is no card, against the float64 forms."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import accuracy
import cases
import checks
import numpy
import oracle
import pytest
import torch
from checks import assert_accurate, evaluate
from on_device import DEVICE, make, moved
from torch import Tensor

import fastsam

pytest.importorskip("triton")

from triton.runtime import interpreter

from fastsam.ops._attention import Source, eager, triton_backward, triton_tiles, triton_weights
from fastsam.ops._attention import triton as attention
from fastsam.ops._triton.configurations import Configuration, DoesNotFitError, forced

pytestmark = pytest.mark.usefixtures("triton_backend")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
VARIANTS = [variant for variant in cases.VARIANTS if "attention" in variant]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
KERNELS = {
    "attention_forward": triton_tiles.forward,
    "attention_query_gradients": triton_tiles.query_gradients,
    "attention_column_gradients": triton_tiles.column_gradients,
}

# Operator, batch, (height, width), channels, channels of keys, channels of z, dtypes. Tiles: see `small_tiles`.
SHAPES = [
    ("self_attention", 2, (1, 1), 1, None, 1, ["float32"]),
    ("self_attention", 1, (8, 8), 16, 16, 16, ["float32"]),
    ("self_attention", 2, (5, 7), 17, None, 3, DTYPES),
    ("double_attention", 1, (1, 1), 3, 2, 3, ["float32"]),
    ("double_attention", 1, (4, 8), 16, None, 16, ["bfloat16"]),
    ("double_attention", 2, (7, 5), 20, 3, 18, DTYPES),
]
EACH_SHAPE = pytest.mark.parametrize(
    ("operator", "batch", "size", "channels", "keys", "out", "dtype"),
    [(*shape, DTYPES[dtype]) for *shape, dtypes in SHAPES for dtype in dtypes],
)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 32 rows and 16 columns, so that small maps have several, and 16 channels of a weight matrix at a time.

    Programs are few all the same: the interpreter takes long for each.
    """
    with _tiles(32, 16, 16):
        yield


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by fused multiply-adds in the order of their depth, as on a card, where nothing is changed.

    In the interpreter, BLAS has another order for every shape; there dR . x and delta would not cancel.
    """
    if DEVICE.type == "cuda":
        return

    def create_dot(builder: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
        left, right, total = a.data.T.astype(numpy.float64), b.data.astype(numpy.float64), c.data
        for column, row in zip(left, right, strict=True):
            total = (numpy.multiply.outer(column, row) + total).astype(numpy.float32)
        return interpreter.TensorHandle(total, c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _tiles(rows: int, columns: int, chunk: int) -> ExitStack:
    """Tiles of these sizes; `chunk` channels of a weight matrix, and of its gradient, at a time."""
    common = {"CHUNK": chunk, "num_warps": 4, "num_stages": 1}
    queries = {"BLOCK_QUERIES": rows, "BLOCK_COLUMNS": columns, **common}
    of_parts = {"SCORE_TILE": chunk, "VALUE_TILE": chunk, "CHANNEL_TILE": 2 * chunk, "BLOCK_POSITIONS": 32}
    columns_first = {"BLOCK_COLUMNS": rows, "BLOCK_QUERIES": columns, **common, **of_parts}
    stack = ExitStack()
    stack.enter_context(forced("attention_forward", queries))
    stack.enter_context(forced("attention_query_gradients", queries))
    stack.enter_context(forced("attention_column_gradients", columns_first))
    return stack


def _draws(operator: str, count: int = 2, largest: float | None = None, **options: Any) -> list[cases.Arguments]:
    """Arguments of several seeds; `largest` is that of the scores."""
    draws = [make(operator, seed=seed, **options) for seed in range(count)]
    return draws if largest is None else [cases.scale_scores(operator, draw, largest) for draw in draws]


def _arguments(variant: str, **options: Any) -> tuple[str, cases.Arguments]:
    operator, defaults = cases.VARIANTS[variant]
    return operator, make(operator, **{**defaults, "dtype": torch.float32, **options})


def _sources(operator: str, arguments: cases.Arguments) -> list[Source]:
    if operator == "self_attention":
        names = ["x", "score", "score_bias", "value", "key"]
        return [Source(*(arguments.get(name) for name in names))]
    return [
        Source(arguments[end], *(arguments.get(f"{name}_{end}") for name in ("score", "score_bias", "value", "key")))
        for end in "hm"
    ]


@EACH_SHAPE
def test_shapes(poison, small_tiles, operator, batch, size, channels, keys, out, dtype):
    options = {"batch": batch, "channels": channels, "size": size, "keys": keys, "out": out, "dtype": dtype}
    assert_accurate(operator, _draws(operator, 4 if channels < 8 else 2, **options))


@pytest.mark.parametrize("keys", [None, 40])
def test_256_channels(poison, keys):
    """Weight matrices in chunks; the key map too where it has more than 32 channels."""
    arguments = make("self_attention", batch=1, channels=256, size=(5, 4), keys=keys, out=256, dtype=torch.float32)
    with _tiles(32, 32, 64):
        assert_accurate("self_attention", arguments)


@pytest.mark.parametrize(("channels", "keys"), [(257, 16), (8, 300)])
def test_more_channels_than_there_are_tiles_for(channels, keys):
    arguments = make("double_attention", batch=1, channels=channels, size=(2, 2), keys=keys, dtype=torch.float32)
    message = (
        r"fastsam\.double_attention: .* up to 256 channels, these maps have "
        rf"{channels} and the queries {keys}; .*backend\(\"eager\"\)"
    )
    with pytest.raises(DoesNotFitError, match=message):
        fastsam.ops.double_attention(**arguments)


def test_a_key_map_in_chunks(poison, small_tiles, monkeypatch):
    monkeypatch.setattr(triton_tiles, "KEY_BYTES", 16 * 16 * 2)
    monkeypatch.setattr(triton_tiles, "_constants", triton_tiles._constants.__wrapped__)  # not those of other tests
    options = {"batch": 1, "channels": 35, "size": (5, 9), "keys": 3, "dtype": torch.bfloat16}
    assert_accurate("self_attention", _draws("self_attention", **options))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_candidate(poison, kernel, dtype):
    """Also the further ones, which only tuning would choose, make the numbers of the default one."""
    arguments = make("self_attention", batch=1, channels=5, size=(3, 11), keys=2, dtype=dtype)
    default = evaluate("self_attention", fastsam.ops.self_attention, arguments).tensors()
    sizes = triton_tiles.Sizes.of(_sources("self_attention", arguments), 5)
    _, *others = KERNELS[kernel](sizes)
    assert others
    for candidate in others:
        with forced(kernel, candidate):
            actual = evaluate("self_attention", fastsam.ops.self_attention, arguments).tensors()
        ratios = accuracy.relative_errors([actual], [default])
        assert max(ratios.values()) <= 8 * torch.finfo(dtype).eps, candidate


def test_default_tiles_hold_whatever_the_sizes_are():
    """Each kind of arithmetic has candidates for all channels; tiles are powers of two, 16 at least."""
    for kind, channels, depth in itertools.product(("half", "tf32", "ieee"), (1, 64, 65, 200, 256), (1, 16, 256)):
        itemsize = 2 if kind == "half" else 4
        sizes = triton_tiles.Sizes(kind, itemsize, channels, min(depth, channels), channels, 2, True, "ieee")
        assert 16 <= sizes.constants()["KEY_CHUNK"] <= sizes.constants()["CHANNELS"]
        for candidates in KERNELS.values():
            for candidate in candidates(sizes):
                _check_tiles(candidate)


def _check_tiles(candidate: Configuration) -> None:
    for name, size in candidate.items():
        if name not in ("num_warps", "num_stages"):
            assert size >= 16 and size & (size - 1) == 0, (name, size)


@EACH_VARIANT
def test_weights_gradients_in_several_parts(poison, small_tiles, monkeypatch, variant):
    """3 entries of 2 blocks of positions in 4 parts: one that begins inside of an entry, and one of nothing."""
    monkeypatch.setattr(attention, "POSITIONS_OF_PART", 16)
    monkeypatch.setattr(attention, "MOST_PARTS", 4)
    operator, options = cases.VARIANTS[variant]
    assert_accurate(operator, _draws(operator, batch=3, **{**options, "size": (4, 9), "dtype": torch.float32}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["self_attention", "double_attention-keys"])
def test_maps_with_a_mean(small_tiles, variant, dtype):
    operator, options = cases.VARIANTS[variant]
    draws = _draws(operator, 4, **{**options, "batch": 1, "channels": 12, "size": (6, 7)})
    for index, arguments in enumerate(draws):
        arguments |= {name: arguments[name] + 10 for name in ("h", "m", "x") if name in arguments}
        scaled = cases.scale_scores(operator, arguments, 3.0)
        draws[index] = cases.map_tensors(lambda tensor: tensor.to(dtype), scaled)
    assert_accurate(operator, draws)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 24), (torch.bfloat16, 8)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("operator", "keys"), [("self_attention", 8), ("double_attention", None)])
def test_scores_of_a_thousand(poison, small_tiles, ordered_products, operator, keys, dtype, count):
    """Errors over many draws together: of one draw they hang on the rounding of one or two nearly tied scores."""
    options = {"batch": 1, "channels": 16, "size": (4, 9), "keys": keys, "dtype": dtype}
    assert_accurate(operator, _draws(operator, count, 1e3, **options))


@EACH_DTYPE
def test_saturated_rows_leave_no_gradient_of_the_scores(poison, small_tiles, ordered_products, dtype):
    """Each position takes all of its own softmax: P is one-hot to the last bit, and dR . x - delta cancels."""
    one, zeros = torch.eye(20, dtype=dtype), torch.zeros(20, dtype=dtype)
    arguments = {"x": one.view(1, 20, 4, 5), "score": 1e3 * one, "score_bias": zeros, "value": one, "value_bias": zeros}
    arguments = moved(arguments)
    x = arguments["x"]
    result = evaluate("self_attention", fastsam.ops.self_attention, arguments)
    (dz,) = checks.upstream_for([x])
    torch.testing.assert_close(result.outputs["z"], x, rtol=0, atol=torch.finfo(dtype).eps)
    assert torch.equal(result.gradients["x"], dz)
    assert not result.gradients["score"].any() and not result.gradients["score_bias"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["self_attention", "double_attention-keys"])
def test_contexts(poison, small_tiles, variant, dtype):
    """r and lse are those of the source less the shift, which is near the mean; more positions than are sampled."""
    operator, options = cases.VARIANTS[variant]
    arguments = make(operator, **{**options, "size": (9, 17), "batch": 1})
    arguments |= {name: arguments[name] + 2 for name in ("h", "m", "x") if name in arguments}
    arguments = cases.map_tensors(lambda tensor: tensor.to(dtype), cases.scale_scores(operator, arguments, 3.0))
    sources = _sources(operator, arguments)
    _, contexts = attention.forward(sources, arguments["value_bias"], save=True)
    for source, context in zip(sources, contexts, strict=True):
        assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in context)
        x, shift = source.x.double(), context.shift.double()
        assert ((shift - x.mean((2, 3))).abs() < 0.5 * x.std((2, 3))).all()
        x, key = x - shift[:, :, None, None], None if source.key is None else source.key.double()
        query = oracle.matrix(source.score.double(), sources[0].x.double()) + source.score_bias.double()[:, None, None]
        keys = x if key is None else oracle.matrix(key, x)
        lse = (query.flatten(2).transpose(1, 2) @ keys.flatten(2)).logsumexp(2)
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(context.lse.double(), lse, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(context.r.double(), oracle.attend(query, keys, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("first", "second"), [(eager, attention), (attention, eager)], ids=["from", "to"])
@pytest.mark.parametrize("variant", ["self_attention-keys", "double_attention"])
def test_contexts_of_another_back_end(poison, small_tiles, variant, first, second):
    operator, arguments = _arguments(variant, size=(9, 17), batch=1)
    sources, bias = _sources(operator, arguments), arguments["value_bias"]
    z, contexts = first.forward(sources, bias, save=True)
    actual = second.backward(z, sources, contexts)
    doubled = [Source(*(None if tensor is None else tensor.double() for tensor in source)) for source in sources]
    exact = eager.backward(z.double(), doubled, eager.forward(doubled, bias.double(), save=True)[1])
    plain = eager.backward(z, sources, eager.forward(sources, bias, save=True)[1])
    accuracy.assert_accurate(*([_named(gradients)] for gradients in (actual, exact, plain)))


def _named(gradients: Any) -> dict[str, Tensor]:
    maps, weights, dvalue_bias = gradients
    tensors = [*maps, *(tensor for of in weights for tensor in of if tensor is not None), dvalue_bias]
    return {f"gradient {index}": tensor for index, tensor in enumerate(tensors)}


def _spoiled(variant: str, value: float) -> Iterator[tuple[str, str, cases.Arguments]]:
    operator, arguments = _arguments(variant, size=(3, 7), batch=2)
    for name, argument in arguments.items():
        spoiled = argument.clone()
        spoiled[tuple(length // 2 for length in argument.shape)] = value
        yield operator, name, {**arguments, name: spoiled}


def _assert_same_kinds_of_number(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, reference in expected.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual[name]), kind(reference)), f"{name}: {kind.__name__}"


@pytest.mark.parametrize("variant", ["self_attention", "double_attention-keys"])
def test_nan_spreads_as_in_eager(small_tiles, variant):
    for operator, name, arguments in _spoiled(variant, float("nan")):
        actual = evaluate(operator, cases.public(operator), arguments)
        expected = evaluate(operator, cases.eager(operator), arguments)
        assert any(output.isnan().any() for output in actual.outputs.values()), f"NaN in {name} is lost"
        _assert_same_kinds_of_number(actual.tensors(), expected.tensors())


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("variant", ["self_attention-keys", "double_attention"])
def test_infinity_spreads_as_in_eager(small_tiles, variant, value):
    for operator, _, arguments in _spoiled(variant, value):
        actual = cases.public(operator)(**arguments)
        _assert_same_kinds_of_number({"z": actual}, {"z": cases.eager(operator)(**arguments)})


@EACH_VARIANT
def test_nan_from_upstream_spreads_as_in_eager(small_tiles, variant):
    def upstream(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[1, 1, 2, 3] = float("nan")
        return spoiled

    operator, arguments = _arguments(variant, size=(3, 7), batch=2)
    actual = evaluate(operator, cases.public(operator), arguments, upstream=upstream)
    expected = evaluate(operator, cases.eager(operator), arguments, upstream=upstream)
    _assert_same_kinds_of_number(actual.gradients, expected.gradients)


def test_a_tile_of_scores_that_are_minus_infinity(small_tiles):
    """The first 32 columns have scores of -inf, the others the same finite one."""
    x = torch.randn(1, 3, 10, 16, generator=torch.Generator().manual_seed(3))
    x[:, 0], x[0, 0, :2] = 0.5, -2.0
    arguments = {"x": x, "score": torch.zeros(1, 3), "score_bias": torch.full((1,), 3e38), "value": torch.eye(3)}
    arguments |= {"value_bias": torch.zeros(3), "key": torch.tensor([[1.0, 0.0, 0.0]])}
    arguments = moved(arguments)
    z, x = fastsam.ops.self_attention(**arguments), arguments["x"]
    torch.testing.assert_close(z, x[:, :, 2:].mean((2, 3), keepdim=True).expand_as(z))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(small_tiles, layout):
    """Strides change no bit: of maps, weights, and of the gradient from upstream."""
    operator, arguments = _arguments("double_attention-keys", size=(3, 7), batch=2)
    change = cases.LAYOUTS[layout]
    changed = cases.map_tensors(change, arguments)
    contiguous = cases.map_tensors(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), changed)
    actual = evaluate(operator, cases.public(operator), changed, upstream=change)
    expected = evaluate(operator, cases.public(operator), contiguous, upstream=lambda dz: change(dz).contiguous())
    assert checks.same_bits(actual, expected)
    assert actual.outputs["z"].is_contiguous()


def test_same_bits_on_every_run(poison, small_tiles):
    operator, arguments = _arguments("double_attention-keys", size=(5, 7), batch=2, dtype=torch.bfloat16)
    first, second = (evaluate(operator, cases.public(operator), arguments) for _ in range(2))
    assert checks.same_bits(first, second)


@EACH_VARIANT
def test_no_samples(variant):
    operator, arguments = _arguments(variant)
    arguments |= {name: arguments[name][:0] for name in ("x", "h", "m") if name in arguments}
    result = evaluate(operator, cases.public(operator), arguments)
    assert result.outputs["z"].shape[0] == 0
    for name, gradient in result.gradients.items():
        assert gradient.shape == arguments[name].shape and not gradient.any()


@EACH_VARIANT
def test_launches(variant):
    """One forward, whether or not a backward pass follows, and three backward."""
    operator, arguments = _arguments(variant)
    sources = _sources(operator, arguments)
    with mock.patch.object(attention, "run", wraps=attention.run) as run:
        z, contexts = attention.forward(sources, arguments["value_bias"], save=True)
        assert run.call_count == 1
        again, none = attention.forward(sources, arguments["value_bias"], save=False, window=(4, 3))
        assert run.call_count == 2 and not none and torch.equal(z, again)
        attention.backward(z, sources, contexts)
        assert run.call_count == 5


def test_windows(small_tiles):
    """Cut by the operator; the kernels refuse them."""
    arguments = make("self_attention", batch=1, channels=4, size=(4, 6), dtype=torch.float32)
    expected = cases.map_tensors(lambda tensor: tensor.double(), arguments)
    with fastsam.backend("eager"):
        z = fastsam.ops.self_attention(**expected, window=(2, 3))
    torch.testing.assert_close(fastsam.ops.self_attention(**arguments, window=(2, 3)).double(), z, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"window must be the whole map \(4, 6\), got \(2, 3\)"):
        attention.forward(_sources("self_attention", arguments), arguments["value_bias"], save=False, window=(2, 3))


def test_batches_of_all_sizes_run_the_same_machine_code():
    """Numbers that come with the batch are not specialised, or each new batch size would be compiled for."""
    for kernel, names in (
        (triton_backward.attention_query_gradients, {"B"}),
        (triton_backward.attention_column_gradients, {"B", "splits"}),
        (triton_weights.attention_sum_parts, {"splits", "key_count"}),
    ):
        options = getattr(kernel, "kwargs", None) or vars(kernel)  # of an interpreted, of a compiled kernel
        assert names <= set(kernel.arg_names) and names <= set(options["do_not_specialize"])
