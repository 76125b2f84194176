"""Models get their values: from files of weights, or drawn as one device draws them; and they are written to files."""
