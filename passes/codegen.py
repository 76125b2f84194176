"""Codegen: the local graph as a Python module, forward and backward, rank-agnostic. What is printed is what runs.

    %mm = mm(%x, %w)                             f32[32@dp, 512] +sum@tp
    %reduce_scatter = reduce_scatter(%mm, ...)   f32[32@dp, 512@tp]

    becomes

    def forward(x: Tensor, w: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # layers.0.mlp, model.py:41
        mlp_mm = aten.mm.default(x, w)                       # f32[32@dp, 512] +sum@tp
        mlp = reduce_scatter(mlp_mm, dim=1, axis="tp")       # f32[32@dp, 512@tp]; 1.0 MiB, 20.00 us
        return (mlp,), (x,)

`shardc/source/` writes it: a function for each kind of repeated layer, names from the user's modules, and a `del` only
where the rank could not hold a value until its function ends.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from shardc.planning.compilation import Compilation, compiler_pass
from shardc.source.module import source_of
from shardc.source.predictions import predicted


@compiler_pass
def codegen(c: Compilation) -> Compilation:
    """Write the module, when it is asked for: of a deep model it is long."""
    lowered, program, mesh = c.lowered, c.program, c.mesh
    return replace(c, code=cache(lambda: source_of(lowered.read(), program, mesh, predicted(c))))
