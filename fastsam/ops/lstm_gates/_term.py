"""What the forms of `lstm_gates` share: the terms whose sum the gates are."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.ops._dispatch import arithmetic


class Term(NamedTuple):
    """A map that enters the gates, or the gradients of one.

    x: (B, 4C, H, W). weight, bias: of the norm that it goes through, both (4C,) or both (4C, H, W); None without norm.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None


def terms_of(
    gates: Tensor,
    recurrent: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    recurrent_norm_weight: Tensor | None,
    recurrent_norm_bias: Tensor | None,
) -> list[Term]:
    """The one or two terms of a call."""
    first = Term(gates, norm_weight, norm_bias)
    return [first] if recurrent is None else [first, Term(recurrent, recurrent_norm_weight, recurrent_norm_bias)]


def new_statistics(gates: Tensor, count: int) -> Tensor:
    """Room for what the backward pass needs of `count` normalised terms, (count, B, 2), float32 for half types.

    These are the mean of each sample and its 1 / sqrt(variance + eps).
    """
    return torch.empty((count, gates.shape[0], 2), dtype=arithmetic(gates.dtype), device=gates.device)
