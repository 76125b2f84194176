"""Generated source: names, repeated layers, what is freed where, the lines that may occur, and the header."""
