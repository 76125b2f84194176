"""Operator rules as data, one family a file. Importing this package registers them all."""

# the custom operators must exist before their rules name them
import shardc.constrain  # pyright: ignore[reportUnusedImport]
import shardc.runtime.attention  # pyright: ignore[reportUnusedImport]
import shardc.runtime.checks  # noqa: F401  # pyright: ignore[reportUnusedImport]
from shardc.rules import (
    attention,
    bags,
    contraction,
    factory,
    fourier,
    index,
    linear,
    lists,
    matrices,
    normalization,
    pointwise,
    pools,
    randomness,
    reduction,
    sampling,
    scan,
    shape,
    window,
)

FAMILIES = (
    attention, bags, contraction, factory, fourier, index, linear, lists, matrices, normalization, pointwise,
    pools, randomness, reduction, sampling, scan, shape, window,
)  # fmt: skip
