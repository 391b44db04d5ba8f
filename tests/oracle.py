"""The equations of "Self-Attention ConvLSTM for Spatiotemporal Prediction" (Lin et al., AAAI 2020), written naively.

Nothing here calls fastsam. Every function materialises what the equations name and works in the dtype of its
arguments, so that the same text is the float64 reference and the plain PyTorch form in single precision.
Parameters come as the mapping of a module's own names ("query.weight", "query.bias", ...); what a module leaves out
(biases, memory attention, all attention, the depthwise filters) is absent from the mapping.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]


def project(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """The 1x1 convolution called `name`: W x_i + b at every position i."""
    return F.conv2d(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """alpha[i, j], eq. 2-3 and 5-6: the softmax over j of e[i, j] = q_i . k_j, of shape (B, N, N)."""
    energy = torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2))
    return torch.softmax(energy, dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Z_i = sum_j alpha[i, j] v_j, eq. 4 and 7."""
    alpha = attention_weights(query, key)
    return torch.bmm(value.flatten(2), alpha.transpose(1, 2)).reshape(value.shape)


def self_attention_module(parameters: Parameters, x: Tensor, scale: float = 1.0) -> Tensor:
    """Section 3.1: x + W_f Z."""
    query = scale * project(parameters, "query", x)
    z = attend(query, project(parameters, "key", x), project(parameters, "value", x))
    return x + project(parameters, "output", z)


def aggregate(parameters: Parameters, h: Tensor, m: Tensor, scale: float = 1.0) -> Tensor:
    """Feature aggregation of section 3.2: Z = W_z [Z_h; Z_m], or W_z Z_h where there is no memory attention."""
    query = scale * project(parameters, "query", h)
    z = attend(query, project(parameters, "key", h), project(parameters, "value", h))
    if "memory_key.weight" in parameters:
        z_m = attend(query, project(parameters, "memory_key", m), project(parameters, "memory_value", m))
        z = torch.cat([z, z_m], dim=1)
    return project(parameters, "fusion", z)


def sam(parameters: Parameters, h: Tensor, m: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The self-attention memory module, eq. 2-9: (h_hat, m_new)."""
    z = aggregate(parameters, h, m, scale) if "query.weight" in parameters else None
    return separable_gates(
        z, h, m, parameters.get("depthwise.weight"), parameters["pointwise.weight"], parameters.get("pointwise.bias")
    )


def separable_gates(
    z: Tensor | None, h: Tensor, m: Tensor, depthwise: Tensor | None, pointwise: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Memory updating and output, eq. 8-9, with the depthwise separable convolution of the paper: (h_hat, m_new)."""
    u = h if z is None else torch.cat([z, h], dim=1)
    if depthwise is not None:
        u = F.conv2d(u, depthwise, padding=depthwise.shape[-1] // 2, groups=u.shape[1])
    i, g, o = F.conv2d(u, pointwise, bias).chunk(3, dim=1)
    m_new = (1 - torch.sigmoid(i)) * m + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * m_new, m_new


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
    """The cell update of ConvLSTM, eq. 1, with layer norms before the sum and of the new state: (h, c_new)."""
    gates = normalise(gates, norm, eps)
    if recurrent is not None:
        gates = gates + normalise(recurrent, recurrent_norm, eps)
    i, f, g, o = gates.chunk(4, dim=1)
    c_new = torch.sigmoid(f + forget_bias) * c + torch.sigmoid(i) * torch.tanh(g)
    c_new = normalise(c_new, state_norm, eps)
    return torch.sigmoid(o) * torch.tanh(c_new), c_new


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
    """Memory updating and output, eq. 8-9, with layer norms before the sum and of the new memory: (h_hat, m_new)."""
    gates = normalise(gates, norm, eps)
    if recurrent is not None:
        gates = gates + normalise(recurrent, recurrent_norm, eps)
    i, g, o = gates.chunk(3, dim=1)
    m_new = (1 - torch.sigmoid(i)) * m + torch.sigmoid(i) * torch.tanh(g)
    m_new = normalise(m_new, state_norm, eps)
    return torch.sigmoid(o) * m_new, m_new


def norm_gate(
    x: Tensor,
    y: Tensor,
    activation: str = "sigmoid",
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """scale activation(N(x)) y."""
    gate = normalise(x, norm, eps)
    if activation == "sigmoid":
        gate = torch.sigmoid(gate)
    if activation == "tanh":
        gate = torch.tanh(gate)
    return scale * gate * y


def normalise(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """Layer norm with a weight and bias for each channel, or for each channel and position; the identity for None."""
    if norm is None:
        return x
    weight, bias = norm
    if weight.ndim == 1:
        return torch.group_norm(x, 1, weight, bias, eps)  # F.group_norm refuses a map of one number
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def matrix(weight: Tensor, x: Tensor) -> Tensor:
    """W x_i at every position of a map."""
    return F.conv2d(x, weight[:, :, None, None])


def attention_source(h: Tensor, x: Tensor, score: Tensor, score_bias: Tensor, key: Tensor | None) -> Tensor:
    """R_i = sum_j softmax_j(e[i, j]) x_j with e[i, j] = (score h_i + score_bias) . x_j, or . (key x_j)."""
    query = matrix(score, h) + score_bias[:, None, None]
    return attend(query, x if key is None else matrix(key, x), x)


def self_attention(
    x: Tensor, score: Tensor, score_bias: Tensor, value: Tensor, value_bias: Tensor, *, key: Tensor | None = None
) -> Tensor:
    """z = value R + value_bias."""
    return matrix(value, attention_source(x, x, score, score_bias, key)) + value_bias[:, None, None]


def double_attention(
    h: Tensor,
    m: Tensor,
    score_h: Tensor,
    score_m: Tensor,
    score_bias_h: Tensor,
    score_bias_m: Tensor,
    value_h: Tensor,
    value_m: Tensor,
    value_bias: Tensor,
    *,
    key_h: Tensor | None = None,
    key_m: Tensor | None = None,
) -> Tensor:
    """z = value_h R_h + value_m R_m + value_bias, both sources asked by queries from h."""
    z_h = matrix(value_h, attention_source(h, h, score_h, score_bias_h, key_h))
    z_m = matrix(value_m, attention_source(h, m, score_m, score_bias_m, key_m))
    return z_h + z_m + value_bias[:, None, None]
