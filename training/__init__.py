"""Training, evaluation and pictures for the forecasters of ``fastsam``: ``python -m training --help``.

A thin layer over PyTorch Lightning. Nothing in ``fastsam`` imports it.
"""
