"""What the Triton kernels of the operators share: language (tiles), launch (calls), configurations (tile sizes).

Nothing here is imported before the back end `triton` is asked for, so that fastsam works without Triton.
"""
