"""What the code of a model reads and changes beside its arguments and its state: guarded, replayed, or refused."""
