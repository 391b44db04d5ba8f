"""The operators: pure, differentiable functions of tensors, one subpackage each."""

from fastsam.ops.double_attention import double_attention
from fastsam.ops.lstm_gates import lstm_gates
from fastsam.ops.self_attention import self_attention
from fastsam.ops.separable_gates import separable_gates

__all__ = ["double_attention", "lstm_gates", "self_attention", "separable_gates"]
