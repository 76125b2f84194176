"""The collectives of generated code."""
