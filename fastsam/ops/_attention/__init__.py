"""What the attention operators share: one template serves one source (`self_attention`) or two (`double_attention`).

A source is a map that is attended to: it gives the keys and the values, while the queries always come from the first
source, the hidden state.
"""

import importlib
from typing import Any, NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """One map that is attended to, and its weights.

    x: (B, C, H, W). score (D, C) and score_bias (D,): query map. key (D, C): key map, or None when the keys are x
    itself (then D = C). value (Cz, C): value map.
    """

    x: Tensor
    score: Tensor
    score_bias: Tensor
    value: Tensor
    key: Tensor | None


class Context(NamedTuple):
    """What the backward pass needs of one source besides its inputs; all of it is O(N).

    B and H, W are those of the windows where a map is cut into windows.

    r: (B, C, H, W), the source averaged with its attention weights. lse: (B, N), log of the sum of exponentials of
    each query's scores. shift: (B, C), finite, what was taken from every column of the source before: r and lse are
    those of x - shift. All in the dtype of the arithmetic, float32 for half types, and contiguous.

    Attention does not depend on the shift but for r, which loses it too, while a mean that stays in the columns would
    cost the gradients digits. The forward pass chooses it, the mean over the positions or near it; the backward pass
    takes any, so one back end can use the contexts of another.
    """

    r: Tensor
    lse: Tensor
    shift: Tensor


class SourceGradients(NamedTuple):
    """Gradients of one source's weights; `key` is None where the source has no key map."""

    score: Tensor
    score_bias: Tensor
    value: Tensor
    key: Tensor | None


def implementation(backend: str) -> Any:
    """The module with `forward` and `backward` of a back end."""
    # They import the types of this module, and only the back end triton imports Triton.
    module = {"eager": "eager", "cpu": "native", "cuda": "native", "triton": "triton"}[backend]
    return importlib.import_module(f"fastsam.ops._attention.{module}")
