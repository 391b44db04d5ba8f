"""Traced code keeps what a backward pass needs only where there will be one, and windows are the operator's own."""

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from torch import Tensor, nn

import fastsam

MAP = (2, 3, 4, 6)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Of a map, in windows or whole."""

    def __init__(self, window: tuple[int, int] | None) -> None:
        super().__init__()
        drawn = cases.self_attention(channels=3, size=MAP[2:], keys=2)
        self.weights = nn.ParameterDict({name: value for name, value in drawn.items() if name != "x"})
        self.window = window

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return fastsam.ops.self_attention(x, **self.weights, window=self.window)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "double_attention": lambda: fastsam.SAM(3, 2, 3, dtype=torch.float64),
    "attention_gates": lambda: fastsam.SAM(3, 2, None, dtype=torch.float64),
    "self_attention": lambda: Attention(None),
    "self_attention in windows": lambda: Attention((2, 3)),
}


def _graphs() -> tuple[list[torch.fx.GraphModule], Callable[..., torch.fx.GraphModule]]:
    """A compiler that does nothing but to note its graphs, and what it noted."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    return graphs, compiler


@pytest.mark.parametrize("name", MODULES)
def test_compiled_code_keeps_what_it_needs(backend_name, name):
    if backend_name == "eager":
        pytest.skip("compiled code goes through the eager form's own operations")
    module, operator = MODULES[name](), name.split()[0]
    inputs = torch.randn(2, *MAP, dtype=torch.float64).unbind()
    graphs, compiler = _graphs()
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    with torch.no_grad():
        quiet = compiled(*inputs)
    learning = compiled(*inputs)
    calls = [[node for node in graph.graph.nodes if operator in str(node.target)] for graph in graphs]
    assert [[call.args[-1] for call in of] for of in calls] == [[False], [True]]
    assert all(call.args[-2] == (2, 3) for of in calls for call in of) is ("windows" in name)
    for results in (quiet, learning):
        for actual, expected in zip(cases.outputs_of(results), cases.outputs_of(module(*inputs)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    cases.outputs_of(learning)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.dim() > 1)


def test_a_traced_graph_can_be_trained_however_it_was_traced(backend_name):
    module, inputs = MODULES["self_attention"](), torch.randn(2, *MAP, dtype=torch.float64).unbind()
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs)
    traced(*inputs).sum().backward()
    expected = torch.autograd.grad(module(*inputs).sum(), list(module.parameters()))
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("operator", cases.ATTENTIONS)
def test_without_keep_there_are_no_contexts_and_no_gradients(backend_name, operator):
    arguments = cases.make(operator, keys=2)
    z, *contexts = cases.registered(operator)(**arguments, keep=False)
    assert all(context.numel() == 0 for context in contexts)
    assert torch.equal(z, cases.registered(operator)(**arguments)[0])
    leaves = cases.map_tensors(lambda tensor: tensor.requires_grad_(), arguments)
    torch.library.opcheck(cases.registered(operator), (), {**arguments, "keep": False}, test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match=f"fastsam.{operator}: .*keep=False.*requires a gradient"):
        cases.registered(operator)(**leaves, keep=False)[0].sum().backward()


@pytest.mark.parametrize("window", [[3, 3], [2], []])
def test_windows_of_the_registered_operator_are_checked(backend_name, window):
    arguments = cases.self_attention(channels=3, size=(4, 6), keys=2)
    with pytest.raises((TypeError, ValueError), match="self_attention: window must"):
        cases.registered("self_attention")(**arguments, window=window)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_windows_are_exported_for_any_size(native_backend, strict):
    module, half = Attention((2, 3)), torch.export.Dim("half", min=1, max=9)
    drawn = torch.randn(2, *MAP, dtype=torch.float64)
    sizes = ({2: 2 * half}, {2: 2 * half})
    program = torch.export.export(module, tuple(drawn), dynamic_shapes=sizes, strict=strict).module()
    for height in (2, 8):
        x = torch.randn(2, 3, height, 6, dtype=torch.float64)
        torch.testing.assert_close(program(x, x), module(x, x))


def test_opcheck_of_windows(backend_name):
    arguments = cases.self_attention(channels=3, size=(4, 6), keys=2)
    leaves = cases.map_tensors(lambda tensor: tensor.requires_grad_(), arguments)
    torch.library.opcheck(cases.registered("self_attention"), (), {**leaves, "window": [2, 3]})


def test_gradients_in_windows(backend_name):
    """Of the registered operator, against finite differences."""
    arguments = cases.self_attention(batch=2, channels=2, size=(2, 4), keys=2)
    names = list(arguments)

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return cases.registered("self_attention")(**given, window=[2, 2])[0]

    assert torch.autograd.gradcheck(call, [arguments[name].requires_grad_() for name in names])
