"""What `lstm_gates`, `memory_gates` and `norm_gate` share: the kernels' three kinds of `Update`, in every back end.

The kernels sum one or two terms, each normalised or not, and make a new state and an output of the sum and the state. A
norm between the new state and the output is a second call of them, of the kind "product".
"""
