"""Operator rules as data, one file a family."""
