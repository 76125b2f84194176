"""shardc: a compiler that shards PyTorch programs over a mesh of devices. Names load on first use, see `__all__`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardc.accumulation import accumulate
    from shardc.api import compile, shard
    from shardc.distribution import distribute
    from shardc.errors import ShardcError
    from shardc.ir.constrain import constrain
    from shardc.ir.layout import B, Layout, P, S
    from shardc.ir.mesh import Mesh
    from shardc.rules.custom import rule
    from shardc.search import search_mesh

__all__ = [
    "B",
    "Layout",
    "Mesh",
    "P",
    "S",
    "ShardcError",
    "accumulate",
    "compile",
    "constrain",
    "distribute",
    "rule",
    "search_mesh",
    "shard",
]

_HOME = {
    "B": "shardc.ir.layout",
    "Layout": "shardc.ir.layout",
    "Mesh": "shardc.ir.mesh",
    "P": "shardc.ir.layout",
    "S": "shardc.ir.layout",
    "ShardcError": "shardc.errors",
    "accumulate": "shardc.accumulation",
    "compile": "shardc.api",
    "constrain": "shardc.ir.constrain",
    "distribute": "shardc.distribution",
    "rule": "shardc.rules.custom",
    "search_mesh": "shardc.search",
    "shard": "shardc.api",
}
"""Where each public name lives. Generated code imports shardc.runtime, which must not load the compiler."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shardc' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
