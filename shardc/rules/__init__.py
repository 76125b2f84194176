"""Operator rules as data, one family a file. Importing this package registers them all."""

# the custom operators must exist before their rules name them
import shardc.constrain
import shardc.runtime.attention  # noqa: F401
from shardc.rules import (  # noqa: F401
    attention,
    contraction,
    factory,
    index,
    normalization,
    pointwise,
    reduction,
    shape,
    window,
)
