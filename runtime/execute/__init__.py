"""How a generated module runs on a mesh: what goes in, what comes out, autograd."""
