"""`SAM` and `SelfAttention` are the paper's equations: outputs, every gradient, state_dict."""

import random
from collections.abc import Callable
from typing import Any

import accuracy
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsam

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def _random_shapes(count: int) -> list[tuple[int, int, int, int, int, int]]:
    generator = random.Random(2020)

    def draw() -> tuple[int, int, int, int, int, int]:
        batch, channels, keys = generator.randint(1, 3), generator.randint(1, 40), generator.randint(1, 24)
        height, width, kernel = generator.randint(1, 11), generator.randint(1, 13), generator.choice([1, 3, 5, 7])
        return batch, channels, keys, height, width, kernel

    return [draw() for _ in range(count)]


# (B, C, D, H, W, k); first the awkward ones: one position, one channel, maps smaller than the kernel, primes, C no
# multiple of 8, D on both sides of C / 2 and at it (folded and projected keys).
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 8, 16, 1, 1, 5),
    (2, 13, 3, 1, 17, 3),
    (1, 64, 16, 7, 7, 5),
    (3, 16, 8, 2, 3, 7),
    (2, 16, 7, 8, 8, 5),
    (1, 37, 31, 11, 5, 3),
    (2, 65, 17, 3, 13, 5),
    *_random_shapes(12),
]


def _redraw(module: nn.Module, seed: int) -> None:
    """Weights that make scores of order one and gates that are neither open nor closed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        values = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        if name.startswith(("query", "key", "memory_key")):
            values *= parameter.shape[0] ** -0.25
        with torch.no_grad():
            parameter.copy_(values)


def _maps(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def _sam(shape: tuple[int, ...], dtype: torch.dtype, seed: int, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    batch, channels, keys, height, width, kernel = shape
    sam = fastsam.SAM(channels, keys, kernel, **options)
    _redraw(sam, seed)
    return sam.to(dtype), _maps((batch, channels, height, width), dtype, seed)


def _evaluate(
    function: Callable[..., Any], parameters: dict[str, Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients by name, of `function(parameters, *inputs)` in the given dtype."""
    parameters = {name: value.detach().to(dtype).requires_grad_() for name, value in parameters.items()}
    inputs = [value.detach().to(dtype).requires_grad_() for value in inputs]
    outputs = function(parameters, *inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(output.shape, generator=generator).to(dtype) for output in outputs]
    gradients = torch.autograd.grad(outputs, [*parameters.values(), *inputs], upstream)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    names = [*parameters, *(f"input {index}" for index in range(len(inputs)))]
    return named | {f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}


def _module_call(module: nn.Module) -> Callable[..., Any]:
    return lambda parameters, *inputs: torch.func.functional_call(module, parameters, inputs)


def _comparable(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradients of the key biases: they are exactly zero, and rounding in the naive form."""
    return {name: value for name, value in results.items() if not name.endswith("key.bias")}


def _assert_equals_oracle(
    draws: list[tuple[nn.Module, list[Tensor]]], naive: Callable[..., Any], dtype: torch.dtype
) -> None:
    """Compare in float64 and, with what plain PyTorch achieves, in float32."""
    actual, exact, plain = [], [], []
    for module, inputs in draws:
        parameters = dict(module.named_parameters())
        actual.append(_comparable(_evaluate(_module_call(module), parameters, inputs, dtype)))
        exact.append(_comparable(_evaluate(naive, parameters, inputs, torch.float64)))
        if dtype == torch.float32:
            plain.append(_comparable(_evaluate(naive, parameters, inputs, dtype)))
    accuracy.assert_accurate(actual, exact, plain or None)


def _scores_to(module: nn.Module, inputs: list[Tensor], largest: float) -> None:
    """Scale the query so that the largest score of all is `largest` in absolute value."""
    parameters, (h, m) = dict(module.named_parameters()), inputs
    query = module.scale * oracle.project(parameters, "query", h)
    scores = [
        torch.bmm(query.flatten(2).mT, oracle.project(parameters, name, x).flatten(2)).abs().max()
        for name, x in (("key", h), ("memory_key", m))
        if f"{name}.weight" in parameters
    ]
    with torch.no_grad():
        for parameter in module.query.parameters():
            parameter *= largest / max(scores)


def _naive_sam(scale: float = 1.0) -> Callable[..., Any]:
    return lambda parameters, h, m: oracle.sam(parameters, h, m, scale)


def test_oracle_is_the_equations_index_by_index():
    """Equations 2-9 with one loop for every index, at a size where that ends."""
    channels, keys, height, width, kernel = 2, 3, 2, 3, 3
    sam, (h, m) = _sam((1, channels, keys, height, width, kernel), torch.float64, 0)
    p = {name: value.detach() for name, value in sam.named_parameters()}
    positions = [(row, column) for row in range(height) for column in range(width)]

    def at(x: Tensor, position: tuple[int, int]) -> Tensor:
        return x[0, :, position[0], position[1]]

    def project(name: str, column: Tensor) -> Tensor:
        return p[f"{name}.weight"][:, :, 0, 0] @ column + p[f"{name}.bias"]

    z = {}
    for i in positions:
        query = project("query", at(h, i))
        aggregated = []
        for source, key, value in ((h, "key", "value"), (m, "memory_key", "memory_value")):
            energy = {j: float(query @ project(key, at(source, j))) for j in positions}  # eq. 2, 5
            total = sum(torch.tensor(e).double().exp() for e in energy.values())
            alpha = {j: torch.tensor(energy[j]).double().exp() / total for j in positions}  # eq. 3, 6
            aggregated.append(sum(alpha[j] * project(value, at(source, j)) for j in positions))  # eq. 4, 7
        z[i] = project("fusion", torch.cat(aggregated))
    h_hat, m_new = oracle.sam(p, h, m)
    for row, column in positions:
        u = torch.zeros(2 * channels, dtype=torch.float64)
        for channel in range(2 * channels):
            for down in range(kernel):
                for right in range(kernel):
                    there = (row + down - kernel // 2, column + right - kernel // 2)
                    if there in z:
                        stacked = torch.cat([z[there], at(h, there)])
                        u[channel] += p["depthwise.weight"][channel, 0, down, right] * stacked[channel]
        i, g, o = project("pointwise", u).split(channels)
        updated = (1 - i.sigmoid()) * at(m, (row, column)) + i.sigmoid() * g.tanh()  # eq. 8
        torch.testing.assert_close(at(m_new, (row, column)), updated)
        torch.testing.assert_close(at(h_hat, (row, column)), o.sigmoid() * updated)  # eq. 9


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_sam(backend_name, shape, dtype):
    draws = [_sam(shape, dtype, seed) for seed in accuracy.seeds(dtype, shape[1])]
    _assert_equals_oracle(draws, _naive_sam(), dtype)


@DTYPES
@pytest.mark.parametrize("keys", [4, 16], ids=["projected", "folded"])
def test_sam_with_scores_of_a_thousand(backend_name, keys, dtype):
    """Errors over many draws together: of one draw they hang on the rounding of one or two nearly tied scores."""
    draws = [_sam((2, 16, keys, 9, 7, 3), dtype, seed) for seed in range(60)]
    for module, inputs in draws:
        _scores_to(module, inputs, 1e3)
    _assert_equals_oracle(draws, _naive_sam(), dtype)


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.25},
        {"bias": False},
        {"use_memory_attention": False},
        {"use_attention": False},
        {"use_attention": False, "bias": False},
        {"scale": -2.0, "bias": False, "use_memory_attention": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 16, 5, 5, 6, 3), (2, 6, 5, 5, 6, 5), (1, 9, 4, 6, 5, None)], ids=str)
def test_sam_options(backend_name, shape, options, dtype):
    draws = [_sam(shape, dtype, seed, **options) for seed in accuracy.seeds(dtype, shape[1])]
    _assert_equals_oracle(draws, _naive_sam(options.get("scale", 1.0)), dtype)


@pytest.mark.parametrize("keys", [3, 12], ids=["projected", "folded"])
@pytest.mark.parametrize("options", [{}, {"use_memory_attention": False}], ids=str)
def test_key_biases_get_exact_zeros(backend_name, keys, options):
    """They cancel in the softmax; None instead of zeros would stop data-parallel training."""
    sam, inputs = _sam((2, 12, keys, 4, 5, 3), torch.float32, 3, **options)
    torch.autograd.backward(list(sam(*inputs)), [torch.randn_like(inputs[0])] * 2)
    for name, parameter in sam.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != name.endswith("key.bias"), name


def test_no_memory_is_a_memory_of_zeros(backend_name):
    sam, (h, m) = _sam((2, 6, 4, 4, 5, 3), torch.float64, 1)
    for without, zeros in zip(sam(h), sam(h, torch.zeros_like(m)), strict=True):
        assert torch.equal(without, zeros)


@pytest.mark.parametrize("keys", [2, 8], ids=["projected", "folded"])
def test_weights_folded_once_for_a_sequence(backend_name, keys):
    """Three steps: the same results and gradients with weights folded once, folded at every step, and naively."""
    sam, (h, m) = _sam((2, 8, keys, 4, 5, 3), torch.float64, 2)
    parameters = dict(sam.named_parameters())
    steps = {
        "once": lambda weights=sam.fold(): lambda h, m: sam(h, m, weights),  # noqa: B008
        "each": lambda: lambda h, m: sam(h, m),
        "naive": lambda: lambda h, m: oracle.sam(parameters, h, m),
    }
    results = {}
    for name, make in steps.items():
        step, state = make(), (h, m)
        for _ in range(3):
            state = step(*state)
        loss = state[0].square().sum() + state[1].sum()
        wanted = [value for key, value in parameters.items() if not key.endswith("key.bias")]
        results[name] = [*state, *torch.autograd.grad(loss, wanted)]
    for name in ("once", "each"):
        for actual, expected in zip(results[name], results["naive"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("keys", [2, 8], ids=["projected", "folded"])
def test_channels_last_module_and_maps(backend_name, keys):
    sam, inputs = _sam((2, 8, keys, 4, 5, 3), torch.float64, 4)
    expected = sam(*inputs)
    sam = sam.to(memory_format=torch.channels_last)
    actual = sam(*(x.to(memory_format=torch.channels_last) for x in inputs))
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keys", [3, 12], ids=["projected", "folded"])
def test_attention_maps_are_rows_of_alpha(backend_name, keys):
    sam, (h, m) = _sam((2, 12, keys, 4, 5, 3), torch.float64, 6, scale=0.5)
    points = torch.tensor([[0, 0], [3, 4], [1, 2], [3, 4]])
    parameters = dict(sam.named_parameters())
    query = 0.5 * oracle.project(parameters, "query", h)
    for maps, name, x in zip(sam.attention_maps(h, m, points), ("key", "memory_key"), (h, m), strict=True):
        alpha = oracle.attention_weights(query, oracle.project(parameters, name, x))
        expected = alpha[:, points[:, 0] * 5 + points[:, 1]].reshape(2, 4, 4, 5)
        torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-12)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"bias": False}], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 8, 16, 1, 1), (2, 13, 3, 1, 17), (2, 16, 8, 5, 7), (1, 37, 31, 11, 5)], ids=str
)
def test_self_attention(backend_name, shape, options, dtype):
    batch, channels, keys, height, width = shape
    draws = []
    for seed in accuracy.seeds(dtype, shape[1]):
        module = fastsam.SelfAttention(channels, keys, **options)
        _redraw(module, seed)
        draws.append((module.to(dtype), _maps((batch, channels, height, width), dtype, seed)[:1]))

    def naive(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return oracle.self_attention_module(parameters, x, options.get("scale", 1.0))

    _assert_equals_oracle(draws, naive, dtype)


class PlainSAM(nn.Module):
    """What a user of PyTorch would write from the paper, with the paper's names for its parts."""

    def __init__(self, channels: int, attention_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, attention_channels, 1)
        self.key = nn.Conv2d(channels, attention_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.memory_key = nn.Conv2d(channels, attention_channels, 1)
        self.memory_value = nn.Conv2d(channels, channels, 1)
        self.fusion = nn.Conv2d(2 * channels, channels, 1)
        self.depthwise = nn.Conv2d(
            2 * channels, 2 * channels, kernel_size, padding=kernel_size // 2, groups=2 * channels, bias=False
        )
        self.pointwise = nn.Conv2d(2 * channels, 3 * channels, 1)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(h).flatten(2).transpose(1, 2)
        z = []
        for x, key, value in ((h, self.key, self.value), (m, self.memory_key, self.memory_value)):
            alpha = F.softmax(query @ key(x).flatten(2), dim=-1)
            z.append((alpha @ value(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape))
        gates = self.pointwise(self.depthwise(torch.cat([self.fusion(torch.cat(z, dim=1)), h], dim=1)))
        i, g, o = gates.chunk(3, dim=1)
        m = (1 - i.sigmoid()) * m + i.sigmoid() * g.tanh()
        return o.sigmoid() * m, m


@pytest.mark.parametrize("keys", [3, 12], ids=["projected", "folded"])
def test_state_dict_round_trip_with_plain_pytorch(backend_name, keys, tmp_path):
    fast, inputs = _sam((2, 12, keys, 4, 5, 5), torch.float32, 9)
    plain = PlainSAM(12, keys, 5)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    plain.load_state_dict(torch.load(tmp_path / "fast.pt", weights_only=True), strict=True)
    for actual, expected in zip(fast(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    back = fastsam.SAM(12, keys, 5)
    back.load_state_dict(plain.state_dict(), strict=True)
    for actual, expected in zip(back(*inputs), fast(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_plain_pytorch_weights_train_on(backend_name):
    """A few steps of the same optimiser from the same weights end at the same weights."""
    plain = PlainSAM(8, 4, 3).double()
    fast = fastsam.SAM(8, 4, 3, dtype=torch.float64)
    fast.load_state_dict(plain.state_dict())
    h, m = _maps((2, 8, 4, 5), torch.float64, 10)
    for module in (plain, fast):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            h_hat, m_new = module(*module(h, m))
            (h_hat.square().mean() + (m_new - 1).square().mean()).backward()
            optimizer.step()
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)
