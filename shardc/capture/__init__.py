"""From a module and example inputs to a `Program`. Start at `trace.py`."""
