"""Everything private to torch and transformers that tracing leans on, each with its reason."""
