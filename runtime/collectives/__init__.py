"""The collectives of generated code, one per module. `collective.py` defines the facts that each one provides."""
