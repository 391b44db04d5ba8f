"""How `fastsam._native` is compiled: used by setup.py alone, and never installed."""
