"""shardc: a compiler that shards PyTorch programs over a mesh of devices. Names load on first use, see `__all__`."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardc.api import compile, shard
    from shardc.constrain import constrain
    from shardc.errors import ShardcError
    from shardc.layout import B, Layout, P, S
    from shardc.mesh import Mesh
    from shardc.rules.custom import rule
    from shardc.search import search_mesh

__all__ = ["B", "Layout", "Mesh", "P", "S", "ShardcError", "compile", "constrain", "rule", "search_mesh", "shard"]

_HOME = {
    "B": "shardc.layout",
    "Layout": "shardc.layout",
    "Mesh": "shardc.mesh",
    "P": "shardc.layout",
    "S": "shardc.layout",
    "ShardcError": "shardc.errors",
    "compile": "shardc.api",
    "constrain": "shardc.constrain",
    "rule": "shardc.rules.custom",
    "search_mesh": "shardc.search",
    "shard": "shardc.api",
}
"""Where each public name lives. Generated code imports shardc.runtime, which must not load the compiler."""


class _Package(ModuleType):
    """This package: importing the submodule `shardc.constrain` must not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shardc' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
