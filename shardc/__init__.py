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
    from shardc.pretrained.load import load_pretrained
    from shardc.pretrained.materialize import materialize
    from shardc.pretrained.recording import deferred_init
    from shardc.pretrained.save import save_pretrained
    from shardc.rules.custom import rule
    from shardc.runtime.checkpoint.load import load_checkpoint
    from shardc.runtime.checkpoint.save import save_checkpoint
    from shardc.runtime.mesh.watch import watch
    from shardc.search.search import search_mesh
    from shardc.training.progress import progress
    from shardc.training.sampler import data_sampler

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
    "data_sampler",
    "deferred_init",
    "distribute",
    "load_checkpoint",
    "load_pretrained",
    "materialize",
    "progress",
    "rule",
    "save_checkpoint",
    "save_pretrained",
    "search_mesh",
    "shard",
    "watch",
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
    "data_sampler": "shardc.training.sampler",
    "deferred_init": "shardc.pretrained.recording",
    "distribute": "shardc.distribution",
    "load_checkpoint": "shardc.runtime.checkpoint.load",
    "load_pretrained": "shardc.pretrained.load",
    "materialize": "shardc.pretrained.materialize",
    "progress": "shardc.training.progress",
    "rule": "shardc.rules.custom",
    "save_checkpoint": "shardc.runtime.checkpoint.save",
    "save_pretrained": "shardc.pretrained.save",
    "search_mesh": "shardc.search.search",
    "shard": "shardc.api",
    "watch": "shardc.runtime.mesh.watch",
}
"""Where each public name lives. Generated code imports shardc.runtime, which must not load the compiler."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shardc' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
