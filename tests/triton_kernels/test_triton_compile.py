"""torch.compile over the Triton kernels: the registered operators in one graph, also for new batch sizes."""

from collections.abc import Iterator

import pytest
import torch
from on_device import DEVICE
from torch import Tensor, nn

pytest.importorskip("triton")

import fastsam

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _step(cell: nn.Module, x: Tensor) -> list[Tensor]:
    """Two steps of a cell, and the gradients of everything."""
    x = x.clone().requires_grad_()
    output, state = cell(x, None)
    output, state = cell(x, state)
    gradients = torch.autograd.grad(output.square().sum() + state[0].sum(), [x, *cell.parameters()])
    return [output.detach(), *gradients]


@pytest.mark.parametrize(("name", "norms"), [("convlstm", False), ("base", False), ("sa_convlstm", True)])
def test_one_graph(name, norms):
    torch.manual_seed(0)
    cell = fastsam.modules.CELLS[name](3, 4, kernel_size=3, layer_norm=norms).to(DEVICE)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    expected = _step(cell, x)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            for actual, wanted in zip(_step(compiled, x), expected, strict=True):
                torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(("kernel_size", "backend"), [(3, "inductor"), (None, "aot_eager")])
def test_a_sam(kernel_size, backend):
    """Also with 1x1 gates, which are one registered operator with the attention."""
    torch.manual_seed(0)
    sam = fastsam.SAM(3, 2, kernel_size).to(DEVICE)
    maps = [torch.randn(2, 3, 4, 5, device=DEVICE) for _ in range(2)]

    def results(module: nn.Module) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in maps]
        outputs = module(*leaves)
        return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [*leaves, *sam.parameters()])]

    compiled = torch.compile(sam, fullgraph=True, backend=backend)
    for actual, expected in zip(results(compiled), results(sam), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_new_batch_size_does_not_compile_again():
    torch.manual_seed(0)
    sam = fastsam.SAM(4, 2, 3).to(DEVICE)
    compiled = torch.compile(sam, fullgraph=True, backend="aot_eager")

    def results(module: nn.Module, batch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(batch)
        maps = [torch.randn(batch, 4, 3, 5, generator=generator).to(DEVICE).requires_grad_() for _ in range(2)]
        for x in maps:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        outputs = module(*maps)
        loss = outputs[0].square().sum() + outputs[1].sum()
        return [*outputs, *torch.autograd.grad(loss, [*maps, *sam.parameters()])]

    results(compiled, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual, expected = results(compiled, 3), results(sam, 3)
    assert all(map(torch.equal, actual[:2], expected[:2]))
    for gradient, right in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient, right)
