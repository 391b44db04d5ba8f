"""`lstm_gates`: the gate arithmetic of a ConvLSTM cell."""

from torch import Tensor

from fastsam.ops._check import real_number
from fastsam.ops._gates.operator import Call, Operator
from fastsam.ops._gates.state_norm import call_with_norms
from fastsam.ops._gates.update import Update
from fastsam.ops.lstm_gates import eager


def lstm_gates(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    *,
    recurrent: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    recurrent_norm: tuple[Tensor, Tensor] | None = None,
    state_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The state update of a ConvLSTM cell (SA-ConvLSTM paper, equation 1) from its convolutions.

        i, f, g, o = N(gates; norm) + N(recurrent; recurrent_norm)
        c_new = N(sigmoid(f + forget_bias) c + sigmoid(i) tanh(g); state_norm)        h = sigmoid(o) tanh(c_new)

    N is the identity where its norm is None. Otherwise it normalises over all channels and positions of a sample,
    N(x) = (x - mean) / sqrt(variance + eps) * weight + bias with the biased variance: GroupNorm(1, channels) or
    LayerNorm((channels, H, W)). The norm of the state is that of CMS-LSTM.

    Args:
        gates: (B, 4C, H, W), order i, f, g, o: the convolution of the input, or the sum of both.
        c: cell state, (B, C, H, W).
        forget_bias: added to f.
        recurrent: the convolution of the hidden state, (B, 4C, H, W); None where gates holds all.
        norm: weight and bias that normalise gates, each (4C,) or (4C, H, W); None for none.
        recurrent_norm: weight and bias that normalise recurrent, of the same shape as those of norm; None for none.
        state_norm: weight and bias that normalise the new cell state, both (C,) or both (C, H, W); None for none.
        eps: added to the variances, positive.

    Returns:
        h and c_new, both (B, C, H, W), contiguous.

    Raises:
        TypeError: an argument is of the wrong type, not floating-point, or of another dtype than c.
        ValueError: a shape, device or number does not fit, or there is a recurrent_norm without recurrent.
        RuntimeError: a back end is forced that cannot serve the call.
    """
    norms = {"norm": norm, "recurrent_norm": recurrent_norm, "state_norm": state_norm}
    return call_with_norms(OPERATOR, eager.lstm_gates, "tanh", (gates, c, forget_bias), recurrent, norms, eps)


def _call(
    gates: Tensor,
    c: Tensor,
    forget_bias: float = 0.0,
    recurrent: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    recurrent_norm_weight: Tensor | None = None,
    recurrent_norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gate: bool = False,
) -> Call:
    real_number("lstm_gates", "forget_bias", forget_bias)
    norms = norm_weight, norm_bias, recurrent_norm_weight, recurrent_norm_bias
    return Call(Update("lstm", "gate" if gate else "hidden", forget_bias), eps, gates, c, recurrent, *norms)


OPERATOR = Operator(
    "lstm_gates",
    "4C",
    "gates",
    "c",
    (
        "Tensor gates",
        "Tensor c",
        "float forget_bias=0.0",
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
"""With `gate` its first output is sigmoid(o), for a norm between the new state and the output."""
