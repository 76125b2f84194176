"""Attention in a trace, however the model writes it: as one operator."""
