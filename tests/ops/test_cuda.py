"""The CUDA and Triton kernels on a card: accuracy, determinism, streams, capture in a graph, PyTorch's own checks."""

import cases
import pytest
import torch
from accuracy import seeds
from checks import assert_accurate, evaluate, same_bits, upstream_for
from extension import require_native

import fastsam
from fastsam import backends

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = [(2, 1, (1, 1)), (1, 3, (3, 5)), (2, 13, (7, 7)), (3, 64, (16, 16)), (1, 65, (9, 31)), (1, 256, (5, 7))]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def on_card(request):
    """Each back end for cards, and true float32 in PyTorch's own products."""
    if request.param == "cuda":
        require_native()
        assert hasattr(backends.native_module(), "cuda"), "the CUDA part is not built; python -m fastsam says why"
    else:
        reason = backends.unsupported("lstm_gates", "triton", torch.device("cuda"), torch.float32)
        if reason is not None:
            pytest.skip(reason)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with fastsam.backend(request.param):
        yield request.param
    torch.backends.cudnn.allow_tf32 = allowed


def make(name, batch=2, channels=16, size=(9, 10), **options):
    """A variant's operator and arguments, on the card; in float64 where the back end serves it."""
    operator, chosen = cases.PUBLIC_VARIANTS[name]
    if backends.selected() == "triton":
        options.setdefault("dtype", torch.float32)
    arguments = cases.make(operator, batch=batch, channels=channels, size=size, **chosen, **options)
    return operator, cases.map_tensors(lambda tensor: tensor.cuda(), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "channels", "size"), SHAPES)
@pytest.mark.parametrize("name", cases.PUBLIC_VARIANTS)
def test_accuracy(poison, on_card, name, batch, channels, size, dtype):
    if on_card == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels do not serve float64")
    draws = [make(name, batch, channels, size, dtype=dtype, seed=seed) for seed in seeds(dtype, channels)]
    try:
        assert_accurate(draws[0][0], [arguments for _, arguments in draws])
    except RuntimeError as error:
        # What a block of the attention needs beyond 128 channels, in float64 beyond 64, is more than some cards have.
        if channels <= (64 if dtype == torch.float64 else 128) or "KiB of shared memory a block" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [name for name in cases.VARIANTS if "attention" in name or "separable" in name])
def test_tf32(name):
    """Where products may be in tf32, fastsam errs at most twice as much as PyTorch does in tf32."""
    operator, arguments = make(name, 4, 64, (16, 16), dtype=torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        assert_accurate(operator, arguments)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", cases.PUBLIC_VARIANTS)
def test_layouts(name, layout):
    operator, arguments = make(name, 2, 5, (5, 7))
    assert_accurate(operator, cases.map_tensors(cases.LAYOUTS[layout], arguments))


@pytest.mark.parametrize("name", cases.PUBLIC_VARIANTS)
def test_same_bits_on_every_run_and_stream(name):
    operator, arguments = make(name, 3, 64, (16, 16), dtype=torch.float32)
    function = cases.public(operator)
    expected = evaluate(operator, function, arguments)
    assert same_bits(evaluate(operator, function, arguments), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = evaluate(operator, function, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(again, expected)


@pytest.mark.parametrize("name", cases.PUBLIC_VARIANTS)
def test_capture_in_a_graph(name):
    """Forward and backward in one CUDA graph, replayed on other numbers."""
    operator, arguments = make(name, 2, 16, (8, 8), dtype=torch.float32)
    leaves = cases.map_tensors(lambda tensor: tensor.detach().requires_grad_(), arguments)
    tensors = [value for value in leaves.values() if isinstance(value, torch.Tensor)]
    upstream = upstream_for(cases.outputs_of(cases.public(operator)(**leaves)))

    def step():
        outputs = cases.outputs_of(cases.public(operator)(**leaves))
        return [*outputs, *torch.autograd.grad(outputs, tensors, upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    _, others = make(name, 2, 16, (8, 8), dtype=torch.float32, seed=1)
    with torch.no_grad():
        for argument, value in leaves.items():
            if isinstance(value, torch.Tensor):
                value.copy_(others[argument])
    graph.replay()
    torch.cuda.synchronize()
    for mine, right in zip(captured, step(), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("name", cases.PUBLIC_VARIANTS)
def test_gradcheck(name, on_card):
    if on_card == "triton":
        pytest.skip("Triton's kernels do not serve float64, which gradcheck needs")
    operator, arguments = make(name, 1, 2, (3, 4))
    names = [argument for argument, value in arguments.items() if isinstance(value, torch.Tensor)]
    rest = {argument: value for argument, value in arguments.items() if argument not in names}

    def function(*tensors):
        return cases.public(operator)(**dict(zip(names, tensors, strict=True)), **rest)

    assert torch.autograd.gradcheck(function, [arguments[argument].requires_grad_() for argument in names])


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_opcheck(name):
    operator, arguments = make(name, 2, 4, (3, 5), dtype=torch.float32)
    arguments = cases.map_tensors(lambda tensor: tensor.requires_grad_(), arguments)
    torch.library.opcheck(cases.registered(operator), (), arguments)


@pytest.mark.parametrize("name", cases.OPERATORS)
def test_maps_of_more_than_2_to_31_numbers(name):
    """The first and the last sample are the same, with zeros between them: so are their results, to the last bit."""
    torch.cuda.empty_cache()
    operator, arguments = make(name, 1, 16, (16, 16), dtype=torch.float16)

    def with_same_ends(sample):
        samples = sample.new_zeros((2**19 + 1, *sample.shape[1:]))
        samples[0] = samples[-1] = sample[0]
        return samples

    try:
        maps = [argument for argument, value in arguments.items() if getattr(value, "ndim", 0) == 4 and len(value) == 1]
        arguments |= {argument: with_same_ends(arguments[argument]).requires_grad_() for argument in maps}
        outputs = cases.outputs_of(cases.public(operator)(**arguments))
        upstream = [with_same_ends(gradient) for gradient in upstream_for([output[:1] for output in outputs])]
        gradients = torch.autograd.grad(outputs, [arguments[argument] for argument in maps], upstream)
    except torch.OutOfMemoryError:
        pytest.skip("the card has too little memory")
    for result in (*outputs, *gradients):
        assert result.numel() > 2**31
        assert result[0].isfinite().all() and result[0].any()
        assert torch.equal(result[0], result[-1])
