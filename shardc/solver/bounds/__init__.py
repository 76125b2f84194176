"""Lower bounds by message passing. Start at `bound.py`."""
