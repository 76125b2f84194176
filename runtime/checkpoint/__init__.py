"""Checkpoints of a run: written aside and renamed when complete, read on any mesh and by any number of ranks."""
