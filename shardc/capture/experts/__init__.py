"""Experts that a model writes out, as the one operator. Start at `written.py`."""
