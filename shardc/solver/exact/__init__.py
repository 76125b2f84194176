"""Exact rewrites and searches that close a network. Start at `presolve.py`, then `eliminate.py`."""
