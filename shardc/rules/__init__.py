"""Operator rules as data, one family a file. Importing this package registers them all."""

# importing these registers the custom operators, which rules name
import shardc.ir.constrain  # pyright: ignore[reportUnusedImport]
import shardc.runtime.kernels.attention  # pyright: ignore[reportUnusedImport]
import shardc.runtime.kernels.checks  # pyright: ignore[reportUnusedImport]
import shardc.runtime.kernels.mixture.fused  # noqa: F401  # pyright: ignore[reportUnusedImport]
from shardc.rules.families import (
    attention,
    contraction,
    experts,
    factories,
    fourier,
    index,
    lists,
    matrices,
    normalization,
    pointwise,
    pools,
    reduction,
    sampling,
    scan,
    shape,
    window,
)
from shardc.rules.rewrites import bags, factorisations, randomness

FAMILIES = (
    attention, bags, contraction, experts, factories, factorisations, fourier, index, lists, matrices,
    normalization, pointwise, pools, randomness, reduction, sampling, scan, shape, window,
)  # fmt: skip
