"""The mesh on which a model gets its values."""

from __future__ import annotations

from torch import nn

from shardc.distribution import distribute_if_started
from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.runtime import DistributedMesh, local_mesh
from shardc.runtime.mesh.distributed import started


def mesh_of(model: nn.Module, mesh: str | Mesh | None) -> DistributedMesh | None:
    """The mesh of processes that a model is sharded for, None where there is one process.

    Raises ShardcError where there are several, and neither the model nor `mesh` says which."""
    if not started():
        return None
    engine = vars(model).get("_shardc")
    asked = Mesh.parse(mesh) if mesh is not None else None if engine is None else engine.request.mesh
    if asked is None:
        if any(one.is_meta for one in model.parameters()):
            raise ShardcError('no mesh: shard the model first, or name one, like mesh="dp=2,tp=2"')
        return None
    distribute_if_started(model, asked)
    real = local_mesh(asked.sizes)
    assert isinstance(real, DistributedMesh)
    return real
