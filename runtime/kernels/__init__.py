"""Bodies that run in an operator's place on a rank's part of the tensors."""
