"""`load_checkpoint`: the last checkpoint that is whole, on whatever mesh the model lies now."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict  # pyright: ignore
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from shardc.runtime.checkpoint.blocks import Blocks
from shardc.runtime.checkpoint.files import Manifest, complete, is_complete
from shardc.runtime.checkpoint.save import reason, settled
from shardc.runtime.checkpoint.state import (
    KINDS,
    RANKS,
    RNG,
    TENSORS,
    Optimizers,
    RandomStates,
    Stateful,
    checked,
    listed,
    model_state,
    put_together,
    tensors_of,
    touch,
)
from shardc.runtime.checkpoint.storage import CheckpointReader, LoadPlanning
from shardc.runtime.errors import ShardcError
from shardc.runtime.mesh.agreement import Note, agree
from shardc.runtime.mesh.exchange import from_all, object_group, own_rank


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizers = None, **state: Stateful
) -> int | None:
    """Load the last checkpoint of `folder` that is whole, and return after how many steps it was saved; None where the
    folder has none. Under torchrun every rank must call it, with the arguments of `save_checkpoint`.

    The mesh, the number of ranks, and whether the model is sharded at all may be others than when it was saved.
    `folder` may also be one checkpoint. What is not named is left alone; random states are set in any case. A rank
    that the run which saved did not have takes the random states of rank 0.

    A checkpoint with a file that is missing, truncated or corrupt is refused, and the one before it is taken: a warning
    says which file. Nothing is unpickled but tensors, numbers, texts and containers of them.

    Raises ShardcError, and leaves everything as it was, where no checkpoint is whole, where it is one of another
    model or optimizer, and where it lacks what is named. RankError where a rank does not come.
    """
    folder = Path(folder)
    settled()
    _, ranks = own_rank()
    if ranks > 1:
        agree(Note("loading a checkpoint", {"what is loaded": f"{type(model).__name__}, {', '.join(sorted(state))}"}))
    optimizers = listed(optimizer)
    found = _whole(folder)
    if found is None:
        return None
    problem, targets = "", dict[str, Any]()
    try:
        checked(model, optimizers, state)
        targets = found.targets(model, optimizers, state)
    except ShardcError as error:
        problem = f"{found.path.name} cannot be loaded: {error}"
    problem = next((one for one in from_all(problem, "what is loaded") if one), "")
    if problem:
        raise ShardcError(problem)
    _read(found.reader, targets)
    found.restore({**found.rest, **targets}, model, optimizers, {**state, RNG: RandomStates()})
    return found.manifest.step


class _Found:
    """A checkpoint whose files are as they were written, with what in it is no tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.read(path)
        self.reader = CheckpointReader(path, self.manifest)

    def open(self) -> None:
        """Read what is no tensor. ValueError where it is not what a checkpoint holds."""
        self.metadata: Metadata = self.reader.read_metadata()
        kinds: Any = self.metadata.state_dict_metadata  # whatever the file says
        if not (isinstance(kinds, dict) and kinds.keys() <= set(self.metadata.planner_data)):
            raise ValueError(".metadata does not say where everything belongs")
        self.paths: Mapping[str, tuple[Any, ...]] = self.metadata.planner_data  # pyright: ignore[reportAttributeAccessIssue]
        self.sizes = {key: kind for key, kind in kinds.items() if isinstance(kind, TensorStorageMetadata)}
        self.rest: dict[str, Any] = dict.fromkeys(kinds.keys() - self.sizes.keys())

    def under(self, name: str) -> dict[str, TensorStorageMetadata]:
        """The tensors whose path begins with `name`."""
        return {key: kind for key, kind in self.sizes.items() if self.paths[key][0] == name}

    def targets(
        self, model: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Stateful]
    ) -> dict[str, Any]:
        """Into which tensor, or blocks of a DTensor, each tensor is read. ShardcError where it is of something else."""
        lacking = [name for name in state if f"{name}.{RANKS}" not in self.rest]
        if lacking:
            held = sorted({path[0] for path in self.paths.values()} - {KINDS, RNG})
            raise ShardcError(f"it holds no {' and no '.join(lacking)}; it holds {', '.join(held)}")
        targets = self._model_targets(model)
        if optimizers:
            self._check_optimizers(optimizers)
            targets |= self._optimizer_targets(model)
        for name, one in state.items():
            self._own(name)
            lies = tensors_of(name, one)
            for key, kind in self.under(name).items():
                targets[key] = _like(kind, lies.get(self.paths[key][-1]))
        return targets

    def _model_targets(self, model: nn.Module) -> dict[str, Any]:
        flat: dict[str, Any] = flatten_state_dict({"model": model_state(model)})[0]
        saved = {key for key, path in self.paths.items() if path[0] == "model"}
        names = {"lacks": flat.keys() - saved, "also has": saved - flat.keys()}
        wrong = [f"it {what} {_names(some)}" for what, some in names.items() if some]
        for key, kind in self.under("model").items():
            if key in flat and tuple(flat[key].shape) != tuple(kind.size):
                name = key.removeprefix("model.")
                wrong.append(f"{name} has shape {tuple(kind.size)} in it and {tuple(flat[key].shape)} in the model")
        if wrong:
            raise ShardcError(f"it is one of another model: {'; '.join(wrong[:5])}")
        return {key: flat[key] for key in self.under("model")}

    def _check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        kinds = self.rest[KINDS][0]["optimizer"]
        given = [type(one).__name__ for one in optimizers]
        if sorted(kinds) != sorted(given):
            raise ShardcError(
                f"it was saved with {', '.join(kinds) or 'no optimizer'}, and is to be loaded into {', '.join(given)}"
            )

    def _optimizer_targets(self, model: nn.Module) -> dict[str, Any]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        targets: dict[str, Any] = {}
        for key, kind in self.under("optimizer").items():
            _, part, name, *_ = self.paths[key]
            targets[key] = _like(kind, parameters.get(name) if part == "state" else None)
        return targets

    def _own(self, name: str) -> Any:
        """This rank's entry of what is no tensor."""
        entries = self.rest[f"{name}.{RANKS}"]
        rank, ranks = own_rank()
        if len(entries) not in (1, ranks) and name != RNG:
            raise ShardcError(
                f"{name} differs from rank to rank in it, and it was saved by {len(entries)} ranks, not {ranks}. Save "
                "a position that all ranks share (of the global data), or load without it"
            )
        return entries[rank if rank < len(entries) else 0]

    def restore(
        self,
        values: Mapping[str, Any],
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        state: Mapping[str, Stateful],
    ) -> None:
        """Give everything what was read."""
        nested: Any = unflatten_state_dict(dict(values), dict(self.paths))
        set_model_state_dict(model, nested["model"])
        if optimizers:
            touch(optimizers)
            # not strict: a parameter that never got a gradient has no state
            options = StateDictOptions(strict=False)
            held: Any = {"state": {}, **nested["optimizer"]}
            set_optimizer_state_dict(model, optimizers, held, options=options)
        for name, one in state.items():
            one.load_state_dict(put_together(self._own(name), nested[name].get(TENSORS, {})))


def _whole(folder: Path) -> _Found | None:
    """The last checkpoint that is whole. ShardcError where there are some, and none is."""
    rank, ranks = own_rank()
    here = [folder] if is_complete(folder) else complete(folder)
    paths = from_all([path.name for path in here], "which checkpoints there are")[0]
    base = folder.parent if is_complete(folder) else folder
    refused: list[str] = []
    for name in paths:
        found, faults = _opened(base / name, rank, ranks)
        if found is not None:
            if refused and rank == 0:
                warnings.warn(f"{'; '.join(refused)}; {name}, the last good one, is loaded", stacklevel=3)
            return found
        refused.append(f"{base / name} is refused: {'; '.join(faults)}")
    if refused:
        raise ShardcError(f"no checkpoint is whole: {'. '.join(refused)}")
    return None


def _opened(path: Path, rank: int, ranks: int) -> tuple[_Found | None, list[str]]:
    """The checkpoint, or what is wrong with it on any rank. The ranks share the work of reading all files."""
    found, faults = None, list[str]()
    try:
        found = _Found(path)
        faults = found.manifest.faults(path, rank, ranks)
        if not faults:
            found.open()
    except ValueError as error:
        faults = [str(error)]
    every = from_all(faults, f"whether {path.name} is whole")
    faults = list(dict.fromkeys(fault for some in every for fault in some))
    if found is None or faults:
        return None, faults
    try:
        _read(found.reader, found.rest)
    except ShardcError as error:
        return None, [str(error)]
    return found, []


def _read(reader: CheckpointReader, into: dict[str, Any]) -> None:
    """Read tensors in place, and put other values in place of what stands there."""
    group = object_group()
    blocks = {
        key: Blocks.of(one, one.to_local().detach()) if isinstance(one, DTensor) else one for key, one in into.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load(blocks, storage_reader=reader, planner=LoadPlanning(), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise ShardcError(f"it cannot be read: {reason(error)}") from error
    into.update((key, one) for key, one in blocks.items() if not isinstance(one, Blocks))


def _like(kind: TensorStorageMetadata, tensor: Any) -> Any:
    """Room for a stored tensor: for one that belongs to a DTensor another that lies like it, or whole on every rank
    where it has another shape; else a plain one."""
    dtype, shape = kind.properties.dtype, kind.size
    if not isinstance(tensor, DTensor) or not shape:
        device = tensor.device if isinstance(tensor, Tensor) and shape else "cpu"
        return torch.empty(shape, dtype=dtype, device=device)
    if tensor.shape == shape:
        local, placements, stride = tensor.to_local(), tensor.placements, tensor.stride()
        local = torch.empty(local.shape, dtype=dtype, device=local.device)
    else:
        local = torch.empty(shape, dtype=dtype, device=tensor.to_local().device)
        placements, stride = [Replicate()] * tensor.device_mesh.ndim, local.stride()
    return DTensor.from_local(
        local, tensor.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _names(keys: set[str]) -> str:
    names = sorted(key.removeprefix("model.") for key in keys)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
