"""`memory_gates`: the gated update of a memory from gates that were computed elsewhere."""

from torch import Tensor

from fastsam.ops._gates.operator import Call, Operator
from fastsam.ops._gates.state_norm import call_with_norms
from fastsam.ops._gates.update import Update
from fastsam.ops.memory_gates import eager


def memory_gates(
    gates: Tensor,
    m: Tensor,
    *,
    recurrent: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    recurrent_norm: tuple[Tensor, Tensor] | None = None,
    state_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Memory updating and output with the gates of any convolutions.

        i, g, o = N(gates; norm) + N(recurrent; recurrent_norm)
        m_new = N((1 - sigmoid(i)) m + sigmoid(i) tanh(g); state_norm)        h_hat = sigmoid(o) m_new

    Without norms these are equations 8 and 9 of the SA-ConvLSTM paper, for which `separable_gates` computes the gates
    too; with them equation 4 of the CMS-LSTM paper as its published code has it. N is the identity where its norm is
    None. Otherwise it normalises over all channels and positions of a sample,
    N(x) = (x - mean) / sqrt(variance + eps) * weight + bias with the biased variance: GroupNorm(1, channels) or
    LayerNorm((channels, H, W)).

    Args:
        gates: (B, 3C, H, W), order i, g, o.
        m: memory, (B, C, H, W).
        recurrent: a second summand of the gates, (B, 3C, H, W); None where gates holds all.
        norm: weight and bias that normalise gates, each (3C,) or (3C, H, W); None for none.
        recurrent_norm: weight and bias that normalise recurrent, of the same shape as those of norm; None for none.
        state_norm: weight and bias that normalise the new memory, both (C,) or both (C, H, W); None for none.
        eps: added to the variances, positive.

    Returns:
        h_hat and m_new, both (B, C, H, W), contiguous.

    Raises:
        TypeError: an argument is of the wrong type, not floating-point, or of another dtype than m.
        ValueError: a shape, device or number does not fit, or there is a recurrent_norm without recurrent.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    norms = {"norm": norm, "recurrent_norm": recurrent_norm, "state_norm": state_norm}
    return call_with_norms(OPERATOR, eager.memory_gates, "identity", (gates, m), recurrent, norms, eps)


def _call(
    gates: Tensor,
    m: Tensor,
    recurrent: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    recurrent_norm_weight: Tensor | None = None,
    recurrent_norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gate: bool = False,
) -> Call:
    norms = norm_weight, norm_bias, recurrent_norm_weight, recurrent_norm_bias
    return Call(Update("memory", "gate" if gate else "hidden"), eps, gates, m, recurrent, *norms)


OPERATOR = Operator(
    "memory_gates",
    "3C",
    "gates",
    "m",
    (
        "Tensor gates",
        "Tensor m",
        "Tensor? recurrent=None",
        "Tensor? norm_weight=None",
        "Tensor? norm_bias=None",
        "Tensor? recurrent_norm_weight=None",
        "Tensor? recurrent_norm_bias=None",
        "float eps=1e-05",
        "bool gate=False",
    ),
    _call,
)
"""With `gate` its first output is sigmoid(o), for a norm between the new memory and the output."""
