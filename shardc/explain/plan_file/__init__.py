"""Plans as files: written, compared, cached, and read back."""
