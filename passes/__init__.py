"""The verbs of the compiler: one file a pass, in the order of `shardc.passes.pipeline`."""

if __name__ != "shardc.passes":
    raise ImportError("import shardc.passes, not passes: a bare import makes a second copy of every registry")
