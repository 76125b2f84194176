"""Operator rules as data, one family a file. Importing this package registers them all."""

# the custom operators must exist before their rules name them
import shardc.constrain  # pyright: ignore[reportUnusedImport]
import shardc.runtime.attention  # noqa: F401  # pyright: ignore[reportUnusedImport]
from shardc.rules import (  # noqa: F401
    attention,  # pyright: ignore[reportUnusedImport]
    contraction,  # pyright: ignore[reportUnusedImport]
    factory,  # pyright: ignore[reportUnusedImport]
    index,  # pyright: ignore[reportUnusedImport]
    normalization,  # pyright: ignore[reportUnusedImport]
    pointwise,  # pyright: ignore[reportUnusedImport]
    reduction,  # pyright: ignore[reportUnusedImport]
    shape,  # pyright: ignore[reportUnusedImport]
    window,  # pyright: ignore[reportUnusedImport]
)
