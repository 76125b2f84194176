"""How people look at a plan: text, graphs, progress."""
