"""The nouns: meshes, layouts, the captured program and how it prints. Start at `program.py` and `layout.py`."""
