"""`data_sampler`: which rows of a data set a rank brings."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import Dataset, DistributedSampler

from shardc.errors import ShardcError
from shardc.runtime import DistributedMesh, local_mesh
from shardc.runtime.mesh.batch import axes_of, part_number
from shardc.runtime.mesh.distributed import started


def data_sampler(dataset: Dataset[Any], model: nn.Module, **options: Any) -> DistributedSampler[Any]:
    """The sampler that gives each rank of a sharded model its rows of a data set, for `DataLoader(sampler=...)`.

    Ranks that differ in the axes of `data=` get different rows; others get the same. Without `data=`, and in one
    process, every rank gets all rows: the batch of the loader is then the global one. `options` are those of
    `DistributedSampler` (`shuffle`, `seed`, `drop_last`); call `set_epoch` as with that.

    Raises ShardcError for a model that is not sharded.
    """
    engine = vars(model).get("_shardc")
    if engine is None:
        raise ShardcError(
            'data_sampler: the model is not sharded; shard(model, mesh="dp=2", data="dp") says who gets what'
        )
    mesh, data = engine.request.mesh, engine.request.options.data
    parts, own = 1, 0
    if data is not None and started():
        real = local_mesh(mesh.sizes)
        assert isinstance(real, DistributedMesh)
        axes = axes_of(data, real)
        parts, own = mesh.ways(axes), part_number(real, axes, real.rank)
    return DistributedSampler(dataset, parts, own, **options)
