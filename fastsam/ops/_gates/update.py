"""What a call of the gate kernels computes, and the terms that it computes it from."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.ops._dispatch import arithmetic

_GATES = {"lstm": 4, "memory": 3, "product": 1}
_FORMS = {"lstm": ("hidden", "gate"), "memory": ("hidden", "gate"), "product": ("identity", "tanh", "sigmoid")}
_FIELDS = {
    (kind, form): (number, forms.index(form)) for number, (kind, forms) in enumerate(_FORMS.items()) for form in forms
}


class Update(NamedTuple):
    """What becomes of the gates a, rows of C channels each, and of a state c (B, C, H, W); s is the sigmoid:

        lstm     a = (i, f, g, o)  c_new = s(f + constant) c + s(i) tanh(g)  h = s(o) tanh(c_new)
        memory   a = (i, g, o)     c_new = (1 - s(i)) c + s(i) tanh(g)       h = s(o) c_new
        product  a = (a)           c_new = a                                 h = constant act(a) c

    kind: "lstm", "memory" or "product". form: of lstm and memory "hidden" for h as above, or "gate" for h = s(o); of
    product the act, "identity", "tanh" or "sigmoid". keeps_state: whether c_new is wanted; False with product only.
    """

    kind: str
    form: str
    constant: float = 0.0
    keeps_state: bool = True

    @property
    def gates(self) -> int:
        """How many gates there are."""
        return _GATES[self.kind]

    @property
    def fields(self) -> tuple[int, int]:
        """The numbers of kind and form: `Update` and `Form` of csrc/include/fastsam/params.h."""
        return _FIELDS[self.kind, self.form]


class Term(NamedTuple):
    """A map that enters the gates, or the gradients of one.

    x: (B, G C, H, W) for G gates. weight, bias: of the norm that it goes through, both (G C,) or both (G C, H, W); None
    without norm.
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
