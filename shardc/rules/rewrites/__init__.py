"""Operators rewritten into others, before layouts are chosen. Start at `decompositions.py`."""
