"""`save_checkpoint`: a copy now, the writing beside the steps that follow."""

from __future__ import annotations

import atexit
import sys
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save

from shardc.runtime.checkpoint.files import begin, partial
from shardc.runtime.checkpoint.state import (
    RANKS,
    RNG,
    TENSORS,
    Optimizers,
    RandomStates,
    Stateful,
    checked,
    collected,
    listed,
    same,
    taken_apart,
)
from shardc.runtime.checkpoint.storage import CheckpointWriter, SavePlanning
from shardc.runtime.errors import ShardcError
from shardc.runtime.mesh.agreement import Note, agree
from shardc.runtime.mesh.exchange import from_all, object_group, own_rank

_pending: list[Future[Path]] = []
"""The checkpoint that is being written."""


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    step: int,
    keep: int | None = None,
    **state: Stateful,
) -> Future[Path]:
    """Save a run after `step` steps as `folder/step-{step}`. Under torchrun every rank must call it, and all must see
    the same folder.

    `optimizer` is one, or a list. `state` is whatever else has `state_dict` and `load_state_dict`: `scheduler=`,
    `data=` (a sampler or loader), `scaler=`, `ema=`. Random states, and the plan of a sharded model, are saved besides.

    It returns when all is copied, so that the next step may change it, and writes in the background with
    torch.distributed.checkpoint. The future gives the folder once it is complete; wait for it (`.result()`) before the
    process group is destroyed. Until then it has another name, and the last complete checkpoint stays. `keep` removes
    all but the last so many.

    Raises ShardcError where something cannot be saved; the same from the future, and from the next call, where writing
    failed. RankError where ranks save different steps, or one does not come.
    """
    folder = Path(folder)
    settled()
    rank, ranks = own_rank()
    if ranks > 1:
        agree(Note(f"saving a checkpoint after step {step}"))
    problem, saved, rests = "", dict[str, Any](), dict[str, Any]()
    try:
        if keep is not None and keep < 1:
            raise ShardcError(f"keep={keep} would remove what was just saved: keep at least 1")
        optimizers = listed(optimizer)
        checked(model, optimizers, state)
        saved = collected(model, optimizers)
        for name, one in {**state, RNG: RandomStates()}.items():
            tensors, rests[name] = taken_apart(name, one)
            saved[name] = {TENSORS: tensors}
        if rank == 0:
            _write_plan(model, begin(folder, step))
    except (ShardcError, OSError) as error:
        problem = str(error)
    brought = from_all((problem, rests), "what a checkpoint holds")
    problems = [f"rank {at}: {one}" if ranks > 1 else one for at, (one, _) in enumerate(brought) if one]
    if problems:
        raise ShardcError(f"nothing was saved after step {step}: {'; '.join(problems)}")
    for name in rests:
        each = [others[name] for _, others in brought]
        alike = all(same(each[0], other) for other in each[1:])
        saved[name][RANKS] = (each[0],) if alike else tuple(each)
    future = _written(saved, CheckpointWriter(partial(folder, step), step, ranks, keep), step)
    _pending[:] = [future]
    return future


def _write_plan(model: nn.Module, folder: Path) -> None:
    """The plan of the last call of a sharded model. The runtime knows no plans, but that they can be saved."""
    compiled = getattr(vars(model).get("_shardc"), "last", None)
    if compiled is not None:
        compiled.plan.save(folder / "plan.json")


def _written(saved: dict[str, Any], writer: CheckpointWriter, step: int) -> Future[Path]:
    """The future of a save that starts now."""
    group = object_group()
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    saving: Any = async_save(
        saved, storage_writer=writer, planner=SavePlanning(), process_group=group, no_dist=group is None
    )
    future: Future[Path] = Future()
    future.set_running_or_notify_cancel()

    def done(saving: Any) -> None:
        error = saving.exception()
        if error is None:
            future.set_result(writer.place or Path(writer.path).with_name(f"step-{step}"))
        else:
            future.set_exception(ShardcError(f"the checkpoint after step {step} was not saved: {reason(error)}"))

    saving.add_done_callback(done)
    return future


def settled() -> None:
    """Wait for the checkpoint that is being written. Raises what its future raises."""
    if _pending:
        _pending.pop().result()


@atexit.register
def _tell_at_the_end() -> None:
    """A failure that nobody asked for is not lost."""
    error = _pending[0].exception() if _pending else None
    if error is not None:
        print(f"shardc: {error}", file=sys.stderr)


def reason(error: BaseException) -> str:
    """What went wrong on which ranks, of an error of torch.distributed.checkpoint."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    named: dict[str, list[int]] = {}
    for rank, (failure, _) in error.failures.items():
        named.setdefault(f"{type(failure).__name__}: {failure}", []).append(rank)
    return "; ".join(f"{text} (rank {', '.join(map(str, ranks))})" for text, ranks in named.items())
