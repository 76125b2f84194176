"""The collectives of generated code, one a module; `collective.py` says what each of them tells about itself."""
