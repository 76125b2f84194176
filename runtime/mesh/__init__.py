"""Meshes as generated code meets them: virtual (threads) and distributed (processes)."""
