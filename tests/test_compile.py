"""torch.compile and torch.export of a step of SAM and of the cells: whole graphs, right, and compiled once."""

from collections.abc import Callable, Iterator

import pytest
import torch
from extension import require_native
from torch import Tensor, nn

import fastsam


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "auto"])
def compiled_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """`auto` is native code behind the registered operators, `eager` is traced into."""
    if request.param == "auto":
        require_native()
    with fastsam.backend(request.param):
        yield request.param


def _sam(keys: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    return fastsam.SAM(8, keys, **{"kernel_size": 3, **options}, dtype=torch.float64)


def _maps(batch: int, height: int = 5, width: int = 6, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 8, height, width, generator=generator, dtype=torch.float64) for _ in range(2)]


def _results(step: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients of the inputs, gradients of the parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = step(*inputs)
    loss = outputs[0].square().sum() + outputs[1].sum()
    return [*outputs, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]


def _assert_same(step: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, inputs: list[Tensor]) -> None:
    for actual, expected in zip(_results(step, module, inputs), _results(module, module, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel_size", [3, None])
@pytest.mark.parametrize("keys", [3, 8], ids=["projected", "folded"])
def test_sam_compiles_whole_and_once(compiled_backend, keys, kernel_size):
    sam = _sam(keys, kernel_size=kernel_size)
    step = torch.compile(sam, fullgraph=True, backend="aot_eager")
    _assert_same(step, sam, _maps(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        _assert_same(step, sam, _maps(2, seed=2))


def test_sam_with_inductor(native_backend):
    sam = _sam()
    step = torch.compile(sam, fullgraph=True)
    _assert_same(step, sam, _maps(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        _assert_same(step, sam, _maps(2, seed=2))


def test_any_batch_size_with_one_compilation(compiled_backend):
    sam = _sam()
    step = torch.compile(sam, fullgraph=True, backend="aot_eager")
    inputs = _maps(4)
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        step(*inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (2, 4, 7):
                for actual, expected in zip(step(*_maps(batch)), sam(*_maps(batch)), strict=True):
                    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_outputs_fed_back_as_inputs(compiled_backend):
    """The recurrent loop around a compiled step: compiled once for all steps, gradients through all of them."""
    sam = _sam()
    step = torch.compile(sam, fullgraph=True, backend="aot_eager")

    def loop(one: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        h, m = (x.requires_grad_() for x in _maps(2))
        start = h
        weights = sam.fold()
        for _ in range(3):
            h, m = one(h, m, weights)
        return [h, m, *torch.autograd.grad(h.square().sum() + m.sum(), [start, *sam.parameters()])]

    expected = loop(sam)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            for actual, reference in zip(loop(step), expected, strict=True):
                torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{"use_attention": False}, {"use_memory_attention": False}, {"bias": False}], ids=str
)
def test_options_compile_whole(compiled_backend, options):
    sam = _sam(**options)
    with torch.no_grad():
        compiled = torch.compile(sam, fullgraph=True, backend="aot_eager")(*_maps(2))
        for actual, expected in zip(compiled, sam(*_maps(2)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell_class", [fastsam.ConvLSTMCell, fastsam.BaseCell, fastsam.SAConvLSTMCell])
def test_cells_compile_whole(compiled_backend, cell_class):
    torch.manual_seed(0)
    cell = cell_class(8, 8, 3, layer_norm=True, dtype=torch.float64)
    step = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = _maps(2)[0]
    results = []
    for one in (cell, step):
        output, state = one(x, None)
        output, state = one(x, state)
        loss = output.square().sum() + sum(part.sum() for part in state)
        results.append([output, *state, *torch.autograd.grad(loss, list(cell.parameters()))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_change_of_back_end_is_noticed(compiled_backend):
    """Code compiled under one back end does not answer for another."""
    sam = _sam()
    step = torch.compile(sam, fullgraph=True, backend="aot_eager")
    inputs = _maps(2)
    with torch.no_grad():
        expected = sam(*inputs)
        for name in ("auto", "eager", "auto"):
            with fastsam.backend(name):
                for actual, reference in zip(step(*inputs), expected, strict=True):
                    torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export(compiled_backend, strict):
    """torch.export of a step, for any batch size."""
    sam = _sam()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        sam, tuple(_maps(3)), dynamic_shapes={"h": {0: batch}, "m": {0: batch}}, strict=strict
    )
    step = program.module()
    for size in (3, 5):
        with torch.no_grad():
            for actual, expected in zip(step(*_maps(size)), sam(*_maps(size)), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_exported_program_survives_saving(compiled_backend, tmp_path):
    sam = _sam()
    torch.export.save(torch.export.export(sam, tuple(_maps(2))), tmp_path / "sam.pt2")
    step = torch.export.load(tmp_path / "sam.pt2").module()
    with torch.no_grad():
        for actual, expected in zip(step(*_maps(2)), sam(*_maps(2)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_bad_shapes_are_refused_while_compiling(compiled_backend):
    step = torch.compile(_sam(), backend="aot_eager")
    h, m = _maps(2)
    with pytest.raises(Exception, match=r"m must have shape"):
        step(h, m[:, :, 1:])
