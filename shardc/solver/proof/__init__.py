"""Certificates: how a bound is proved, and checked by code that shares nothing with the search."""
