"""Gradient accumulation: `accumulate(model)` around several backwards reduces their gradients over the mesh once.

with shardc.accumulate(model):
    for batch in batches:
        (loss(model(batch)) / len(batches)).backward()
optimizer.step()                                           p.grad is the sum, as without the block
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from shardc.api import engine_of
from shardc.errors import ShardcError
from shardc.runtime.execute.accumulation import GradientSums


@contextmanager
def accumulate(model: nn.Module) -> Generator[None]:
    """In here, gradients of the parameters of sharded models stay on the ranks as addends; at its end they are reduced
    over the mesh once. Values are those of the same loop without it.

    `model` is a sharded model, or a module with sharded ones in it. Whoever reads or sets the gradient of a parameter
    in here gets it whole: then it is reduced there, so under torch.distributed every rank must do it. A block within
    another one does nothing. Where an exception leaves it, what was added up in it is dropped, and nothing is sent.

    A device holds the addends until the end: of a parameter that is stored split and gathered, all of its gradient.
    `model.plan` says how much. Raises ShardcError where nothing of the model is sharded, and InfeasibleError at the
    first call whose memory does not fit.
    """
    engines = [engine for module in model.modules() if (engine := engine_of(module)) is not None]
    if not engines:
        raise ShardcError(f"nothing of {type(model).__name__} is sharded: call shard(model) before accumulate(model)")
    outer = [engine for engine in engines if engine.sums is None]
    sums = GradientSums()
    for engine in outer:
        engine.sums = sums
    try:
        yield
    except BaseException:
        sums.drop()
        raise
    finally:
        for engine in outer:
            engine.sums = None
    sums.deliver()
