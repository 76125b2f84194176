"""Everything private to torch and transformers that capture uses: by whom it patches, each use with its reason."""
