"""torch.compile over the Triton kernels: the registered operators in one graph, also for new batch sizes."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import fastsam


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    torch._dynamo.reset()
    with fastsam.backend("triton"):
        yield
    torch._dynamo.reset()


def _step(cell: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Two steps of a cell, and the gradients of everything."""
    x = x.clone().requires_grad_()
    output, state = cell(x, None)
    output, state = cell(x, state)
    gradients = torch.autograd.grad(output.square().sum() + state[0].sum(), [x, *cell.parameters()])
    return [output.detach(), *gradients]


@pytest.mark.parametrize("name", ["convlstm", "base", "sa_convlstm"])
def test_one_graph(name):
    torch.manual_seed(0)
    cell = fastsam.modules.CELLS[name](3, 4, kernel_size=3)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5)
    for actual, expected in zip(_step(compiled, x), _step(cell, x), strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for actual, expected in zip(_step(compiled, x), _step(cell, x), strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_new_batch_size_does_not_compile_again():
    torch.manual_seed(0)
    sam = fastsam.SAM(4, 2, 3)
    compiled = torch.compile(sam, fullgraph=True, backend="aot_eager")

    def outputs(module: torch.nn.Module, batch: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        maps = [torch.randn(batch, 4, 3, 5, generator=generator) for _ in range(2)]
        for x in maps:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return list(module(*maps))

    outputs(compiled, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for actual, expected in zip(outputs(compiled, 3), outputs(sam, 3), strict=True):
            assert torch.equal(actual, expected)
