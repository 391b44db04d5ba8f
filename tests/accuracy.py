"""How far results are from the exact ones, and how far they may be."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT64_TOLERANCE = 1e-10
FLOOR_IN_EPSILONS = {torch.float32: 4, torch.float16: 0.5, torch.bfloat16: 0.5}
"""What rounding of a few terms makes in float32; half types are rounded once, from float32."""

Results = dict[str, Tensor]


def seeds(dtype: torch.dtype, channels: int) -> range:
    """Seeds of the draws that `relative_errors` wants: one in float64, enough numbers in all in float32."""
    return range(1 if dtype == torch.float64 else max(6, 128 // channels))


def relative_errors(actual: Sequence[Results], exact: Sequence[Results]) -> dict[str, float]:
    """Norm of the difference over the norm of the exact result, name by name, over several draws at once.

    One draw of a few numbers says little about rounding: whether plain PyTorch or the code under test happens to round
    them better is chance. Hence the draws.

    A gradient (a name that starts so) may vanish by mathematics: that of the scores where there is one position, or
    where every row of the softmax is saturated. What a computation leaves of it is rounding of terms that cancel, as
    large as the rounding of the other gradients: it is measured against the largest of them.
    """
    scales = {name: _norm([draw[name] for draw in exact]) for name in exact[0]}
    largest = max((scale for name, scale in scales.items() if name.startswith("gradient")), default=0.0)
    ratios = {}
    for name, scale in scales.items():
        if name.startswith("gradient") and scale < 1e-6 * largest:
            scale = largest
        difference = _norm([mine[name].double() - right[name] for mine, right in zip(actual, exact, strict=True)])
        ratios[name] = difference / scale if scale > 0 else difference
    return ratios


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def assert_same_shapes(actual: Results, exact: Results) -> None:
    """Check that two results have the same names and shapes, which a difference of tensors would broadcast over."""
    shapes = {name: tuple(value.shape) for name, value in actual.items()}
    assert shapes == {name: tuple(value.shape) for name, value in exact.items()}


def assert_accurate(actual: Sequence[Results], exact: Sequence[Results], plain: Sequence[Results] | None) -> None:
    """Check float64 results (`plain` None) to 1e-10, and narrower ones against those of plain PyTorch in their dtype.

    They may err twice as much as plain PyTorch, and by some epsilons where that happens to be (nearly) exact: a sum
    of one term, say. No other order of the same operations can promise that.
    """
    for mine, right in zip(actual, exact, strict=True):
        assert_same_shapes(mine, right)
    limits = None if plain is None else relative_errors(plain, exact)
    for name, error in relative_errors(actual, exact).items():
        dtype = actual[0][name].dtype
        floor = FLOAT64_TOLERANCE if limits is None else FLOOR_IN_EPSILONS[dtype] * torch.finfo(dtype).eps
        allowed = floor + (0 if limits is None else 2 * limits[name])
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
