"""Self-attention and the self-attention memory module (SAM) of "Self-Attention ConvLSTM for Spatiotemporal Prediction".

Notation: a map (B, C, H, W) has N = H * W positions; x_i is the column of C channels at position i. Equation numbers
are the paper's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.modules import _check
from fastsam.modules._projections import _at, _attention_rows, _autocast_off, _bias, _fold_scores, _fold_values, _matrix
from fastsam.ops import memory_gates, self_attention, separable_gates
from fastsam.ops._attention import Source
from fastsam.ops._attention.gates import aggregate, attention_gates


class SelfAttentionWeights(NamedTuple):
    """Operands of `fastsam.ops.self_attention`; `key` is None in the folded form."""

    score: Tensor
    score_bias: Tensor
    value: Tensor
    value_bias: Tensor
    key: Tensor | None


class SAMWeights(NamedTuple):
    """Operands of `fastsam.ops.double_attention`; the keys are None in the folded form."""

    score_h: Tensor
    score_m: Tensor
    score_bias_h: Tensor
    score_bias_m: Tensor
    value_h: Tensor
    value_m: Tensor
    value_bias: Tensor
    key_h: Tensor | None
    key_m: Tensor | None


class AttentionMaps(NamedTuple):
    """Rows of attention of some query points: over the hidden state, and over the memory where it is attended."""

    h: Tensor
    m: Tensor | None


class SelfAttention(nn.Module):
    """Self-attention with a shortcut, section 3.1: the position i of the output is x_i + W_f Z_i.

    q = scale (W_q x + b_q), k = W_k x + b_k, v = W_v x + b_v, and then

        e = q^T k                                   (2)
        alpha = softmax of e over the keys          (3)
        Z_i = sum_j alpha_ij v_j                    (4)

    The attention is computed without ever holding the N x N matrix. `query`, `key`, `value` and `output` are 1x1
    convolutions.

    Args:
        channels: C, channels of the input and of the output.
        attention_channels: D, channels of query and key.
        scale: factor of the scores; the paper has none, 1 / sqrt(D) is another custom.
        bias: whether the convolutions have biases.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        channels: int,
        attention_channels: int = 16,
        *,
        scale: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = _check.positive_int("SelfAttention", "channels", channels)
        self.attention_channels = _check.positive_int("SelfAttention", "attention_channels", attention_channels)
        self.scale = _check.real_number("SelfAttention", "scale", scale)
        placement = _check.placement("SelfAttention", device, dtype)
        options = {"bias": _check.flag("SelfAttention", "bias", bias), **placement}
        self.query = nn.Conv2d(channels, attention_channels, 1, **options)
        self.key = nn.Conv2d(channels, attention_channels, 1, **options)
        self.value = nn.Conv2d(channels, channels, 1, **options)
        self.output = nn.Conv2d(channels, channels, 1, **options)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"

    def fold(self) -> SelfAttentionWeights:
        """The projections composed with each other, differentiably: compute them once for all steps of a sequence.

        The output projection goes into the values, W_f (W_v x + b_v) + b_f, because the attention weights of a
        position sum to 1.
        """
        with _autocast_off(self.query.weight):
            score, score_bias, key = _fold_scores(self.query, self.key, self.scale)
            value, value_bias = _fold_values(_matrix(self.output), self.value)
            return SelfAttentionWeights(score, score_bias, value, value_bias + _bias(self.output), key)

    def forward(self, x: Tensor, weights: SelfAttentionWeights | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, C, H, W).
            weights: what `fold` returned, to share it between calls; None folds here.

        Returns:
            x + W_f Z, of the shape of x.

        Raises:
            TypeError, ValueError: x is not a map of C channels of the dtype and on the device of the parameters;
                weights of another module.
        """
        self._check(x)
        weights = self.fold() if weights is None else weights
        return x + _attend(x, _check.folded_weights("SelfAttention", weights, SelfAttentionWeights))

    def attention_maps(self, x: Tensor, points: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """The rows alpha_i of equation 3 for the asked positions i, in O(P N) memory.

        Args:
            x: (B, C, H, W).
            points: P query points, integers (P, 2) as (row, column).

        Returns:
            (B, P, H, W): over the key positions each map sums to 1.

        Raises:
            TypeError, ValueError: as in `forward`; points that are no integers, of another shape, or off the map.
        """
        self._check(x)
        points = _check.query_points("SelfAttention", points, *x.shape[2:])
        return _attention_rows(_at(points, x), x, self.query, self.key, self.scale)

    def _check(self, x: Any) -> None:
        _check.tensor("SelfAttention", "x", x, "B", self.channels, "H", "W")
        _check.same_kind("SelfAttention", "x", x, self.query.weight)


class SAM(nn.Module):
    """The self-attention memory module, section 3.2: it aggregates features, updates the memory, and gates the output.

    From the hidden state h and the memory m of the step before, with q = scale (W_q h + b_q), k_h = W_k h + b_k,
    v_h = W_v h + b_v, k_m = W_mk m + b_mk and v_m = W_mv m + b_mv:

        e_h = q^T k_h, e_m = q^T k_m                    (2, 5)
        alpha_h, alpha_m = softmax over the keys        (3, 6)
        Z_h = v_h alpha_h^T, Z_m = v_m alpha_m^T        (4, 7)
        Z = W_z [Z_h; Z_m] + b_z
        i, g, o = W_p (W_d * [Z; h]) + b_p
        m' = (1 - sigmoid(i)) m + sigmoid(i) tanh(g)    (8)
        h^ = sigmoid(o) m'                              (9)

    W_d is depthwise, one k x k filter a channel that the three gates share, W_p pointwise: together they are the
    depthwise separable convolution that the paper puts in the place of those of equations 8 and 9. No N x N matrix is
    ever held in memory.

    Submodules, all `torch.nn.Conv2d`: `query`, `key`, `value`, `memory_key`, `memory_value`, `fusion` (W_z),
    `depthwise` (no bias), `pointwise` (gate order i, g, o); with dense_gates, `gates` in the place of the latter two.
    Except for `gates` they are not called, their weights and biases are read: forward hooks on them have no effect.

    Args:
        channels: C, channels of the hidden state and of the memory.
        attention_channels: D, channels of query and keys.
        kernel_size: k, odd; None drops the depthwise filters, the gates then are 1x1.
        value_channels: channels of the values v_h and v_m; None makes them C, as in the paper.
        fusion_channels: channels of Z; None makes them C, as in the paper.
        dense_gates: one dense k x k convolution of [Z; h] to the three gates in the place of the separable one: many
            times its arithmetic.
        scale: factor of the scores; the paper has none.
        bias: whether the convolutions, other than the depthwise one, have biases.
        use_attention: False gates on h alone, Table 1 "w/o SA, w Mem"; there are no attention submodules then, and
            attention_channels, value_channels, fusion_channels, scale and use_memory_attention have no effect.
        use_memory_attention: False attends to h only, Table 1 "w/o Z_m"; `fusion` then takes Z_h alone, and
            `memory_key` and `memory_value` do not exist.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not of the kind or in the range given above.
    """

    def __init__(
        self,
        channels: int,
        attention_channels: int = 16,
        kernel_size: int | None = 5,
        *,
        value_channels: int | None = None,
        fusion_channels: int | None = None,
        dense_gates: bool = False,
        scale: float = 1.0,
        bias: bool = True,
        use_attention: bool = True,
        use_memory_attention: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = _check.positive_int("SAM", "channels", channels)
        self.attention_channels = _check.positive_int("SAM", "attention_channels", attention_channels)
        self.kernel_size = None if kernel_size is None else _check.odd_kernel("SAM", "kernel_size", kernel_size)
        values = channels if value_channels is None else value_channels
        self.value_channels = _check.positive_int("SAM", "value_channels", values)
        fused = channels if fusion_channels is None else fusion_channels
        self.fusion_channels = _check.positive_int("SAM", "fusion_channels", fused)
        self.dense_gates = _check.flag("SAM", "dense_gates", dense_gates)
        if dense_gates and kernel_size is None:
            raise ValueError("SAM: kernel_size must be an odd integer with dense_gates, got None")
        self.scale = _check.real_number("SAM", "scale", scale)
        self.use_attention = _check.flag("SAM", "use_attention", use_attention)
        self.use_memory_attention = _check.flag("SAM", "use_memory_attention", use_memory_attention) and use_attention
        placement = _check.placement("SAM", device, dtype)
        options = {"bias": _check.flag("SAM", "bias", bias), **placement}
        if use_attention:
            self.query = nn.Conv2d(channels, attention_channels, 1, **options)
            self.key = nn.Conv2d(channels, attention_channels, 1, **options)
            self.value = nn.Conv2d(channels, values, 1, **options)
            self.fusion = nn.Conv2d(2 * values if self.use_memory_attention else values, fused, 1, **options)
        if self.use_memory_attention:
            self.memory_key = nn.Conv2d(channels, attention_channels, 1, **options)
            self.memory_value = nn.Conv2d(channels, values, 1, **options)
        self._make_gates(fused + channels if use_attention else channels, options, placement)

    def _make_gates(self, gated: int, options: dict[str, Any], placement: dict[str, Any]) -> None:
        """The convolutions from [Z; h], or h alone, to the gates."""
        gates = 3 * self.channels
        if self.kernel_size is not None:
            window: dict[str, Any] = {"kernel_size": self.kernel_size, "padding": self.kernel_size // 2}
            if self.dense_gates:
                self.gates = nn.Conv2d(gated, gates, **window, **options)
                return
            self.depthwise = nn.Conv2d(gated, gated, groups=gated, bias=False, **window, **placement)
        self.pointwise = nn.Conv2d(gated, gates, 1, **options)

    @classmethod
    def from_module(cls, module: nn.Module | Mapping[str, Tensor]) -> "SAM":
        """A SAM that computes what a published one does, with copies of its parameters on its device, in its dtype.

        It is recognised by the names and shapes of its parameters: `self_attention_memory_module` (or `SA_Attn_Mem`) of
        hyona-yu/SA-convlstm and its forks, `SA_Memory_Module` of johnjaejunlee95/SA_ConvLSTM, `SelfAttentionMemory` of
        tsugumi-sys/SA-ConvLSTM-Pytorch and `SAAttnMem` of jerrywn121/TianChi_AIEarth. Of the third the convolutions
        after the attentions are multiplied into the values; all other parameters are those of the original, the gates'
        in the order i, g, o.

        Args:
            module: the module, of which is checked on small random maps that it computes what its names tell; or its
                state_dict, where it cannot be run.

        Returns:
            The SAM; called with (h, m) it returns (h, m), also where the original returns more.

        Raises:
            TypeError, ValueError: the module is not recognised, a parameter does not fit the others, the module cannot
                be run, or it computes something else.
        """
        from fastsam.convert.published import check_sam, published_sam  # which builds on this package

        options, state_dict = published_sam(module)
        sam = cls(**options, device="meta")  # parameters to be replaced: no memory, no random numbers
        sam.load_state_dict(state_dict, assign=True)
        if isinstance(module, nn.Module):
            check_sam(module, sam)
        return sam

    def extra_repr(self) -> str:
        return f"scale={self.scale}" if self.use_attention else ""

    def fold(self) -> SAMWeights | SelfAttentionWeights | None:
        """The projections composed with each other, differentiably: compute them once for all steps of a sequence.

        The fusion goes into the values, Z = W_z [W_v h; W_mv m] ..., because the attention weights of a position sum to
        1. None without attention.
        """
        if not self.use_attention:
            return None
        with _autocast_off(self.query.weight):
            score_h, score_bias_h, key_h = _fold_scores(self.query, self.key, self.scale)
            if not self.use_memory_attention:
                value, value_bias = _fold_values(_matrix(self.fusion), self.value)
                return SelfAttentionWeights(score_h, score_bias_h, value, value_bias + _bias(self.fusion), key_h)
            score_m, score_bias_m, key_m = _fold_scores(self.query, self.memory_key, self.scale)
            fusion_h, fusion_m = _matrix(self.fusion).split(self.value_channels, dim=1)
            value_h, value_bias_h = _fold_values(fusion_h, self.value)
            value_m, value_bias_m = _fold_values(fusion_m, self.memory_value)
            value_bias = value_bias_h + value_bias_m + _bias(self.fusion)
        return SAMWeights(score_h, score_m, score_bias_h, score_bias_m, value_h, value_m, value_bias, key_h, key_m)

    def forward(
        self, h: Tensor, m: Tensor | None = None, weights: SAMWeights | SelfAttentionWeights | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            h: hidden state (B, C, H, W).
            m: memory of the step before, of the shape of h; None starts from zeros.
            weights: what `fold` returned, to share it between steps; None folds here.

        Returns:
            The output h^ and the updated memory m', both of the shape of h.

        Raises:
            TypeError, ValueError: h or m is not a map of C channels of the dtype and on the device of the parameters,
                or they differ in shape; weights of another module, or any without attention.
        """
        m = self._checked_memory(h, m)
        weights = self.fold() if weights is None else weights
        if not self.use_attention:
            _check.no_weights("SAM", weights)
            return self._update(None, h, m)
        sources, value_bias = self._sources(h, m, weights)
        if self.kernel_size is None:
            return attention_gates(sources, value_bias, m, self.pointwise.weight, self.pointwise.bias)
        return self._update(aggregate(sources, value_bias), h, m)

    def _update(self, z: Tensor | None, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Equations 8 and 9."""
        if self.dense_gates:
            return memory_gates(self.gates(h if z is None else torch.cat([z, h], dim=1)), m)
        depthwise = None if self.kernel_size is None else self.depthwise.weight
        return separable_gates(z, h, m, depthwise, self.pointwise.weight, self.pointwise.bias)

    def attention_maps(self, h: Tensor, m: Tensor | None, points: Tensor | Sequence[Sequence[int]]) -> AttentionMaps:
        """The rows alpha_h;i and alpha_m;i of equations 3 and 6 for the asked positions i, in O(P N) memory.

        Args:
            h: hidden state (B, C, H, W).
            m: memory, of the shape of h; None stands for zeros.
            points: P query points, integers (P, 2) as (row, column).

        Returns:
            (maps_h, maps_m), each (B, P, H, W): over the key positions each map sums to 1. maps_m is None without
            memory attention.

        Raises:
            TypeError, ValueError: as in `forward`; points that are no integers, of another shape, or off the map; a
                module without attention.
        """
        if not self.use_attention:
            raise ValueError("SAM: attention_maps needs attention, this module has use_attention=False")
        m = self._checked_memory(h, m)
        points = _check.query_points("SAM", points, *h.shape[2:])
        asked = _at(points, h)
        maps_h = _attention_rows(asked, h, self.query, self.key, self.scale)
        if not self.use_memory_attention:
            return AttentionMaps(maps_h, None)
        return AttentionMaps(maps_h, _attention_rows(asked, m, self.query, self.memory_key, self.scale))

    def _sources(
        self, h: Tensor, m: Tensor, weights: SAMWeights | SelfAttentionWeights | None
    ) -> tuple[list[Source], Tensor]:
        """The maps that are attended to with their weights, and the value bias."""
        if not self.use_memory_attention:
            score, score_bias, value, value_bias, key = _check.folded_weights("SAM", weights, SelfAttentionWeights)
            return [Source(h, score, score_bias, value, key)], value_bias
        of = _check.folded_weights("SAM", weights, SAMWeights)
        source_h = Source(h, of.score_h, of.score_bias_h, of.value_h, of.key_h)
        return [source_h, Source(m, of.score_m, of.score_bias_m, of.value_m, of.key_m)], of.value_bias

    def _checked_memory(self, h: Any, m: Any) -> Tensor:
        """The memory to start from, after the checks of both inputs."""
        _check.tensor("SAM", "h", h, "B", self.channels, "H", "W")
        weight = (self.gates if self.dense_gates else self.pointwise).weight
        _check.same_kind("SAM", "h", h, weight)
        if m is None:
            return torch.zeros_like(h)
        _check.tensor("SAM", "m", m, *h.shape)
        _check.same_kind("SAM", "m", m, weight)
        return m


def _attend(x: Tensor, weights: SelfAttentionWeights) -> Tensor:
    *operands, key = weights
    return self_attention(x, *operands, key=key)
