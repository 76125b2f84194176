"""Lower bounds by message passing. Start at `bound.py`; `triplets.py` makes them tighter, the rest faster."""
