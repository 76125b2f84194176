"""Cost network, exact solve, certificate, minimal conflicts. Start reading at `problem.py`, then `solve.py`."""
