"""The operators: pure, differentiable functions of tensors, one subpackage each."""

from fastsam.ops.double_attention import double_attention
from fastsam.ops.lstm_gates import lstm_gates
from fastsam.ops.memory_gates import memory_gates
from fastsam.ops.norm_gate import norm_gate
from fastsam.ops.self_attention import self_attention
from fastsam.ops.separable_gates import separable_gates

__all__ = ["double_attention", "lstm_gates", "memory_gates", "norm_gate", "self_attention", "separable_gates"]
