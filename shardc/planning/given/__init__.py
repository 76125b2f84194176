"""Decisions of a plan as text: what a file of a plan says of every operator and value, and how it is read back."""
