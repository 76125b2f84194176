"""Exact rewrites and searches that close a network: `presolve.py`, `eliminate.py`, then `search.py`, which uses all."""
