"""Seconds from named parts: links and collectives, compute, memory."""
