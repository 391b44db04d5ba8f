"""The version of the package, in the one place that the build and `fastsam.__version__` both read."""

__version__ = "0.1.0"
