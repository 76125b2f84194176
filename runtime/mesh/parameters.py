"""Parameters under torch.distributed: plain ones become DTensors once, and then move in place.

| moment | a parameter |
| --- | --- |
| `shard(model)` | becomes a DTensor, whole on every rank, with rank 0's values |
| a plan | stays the object that it is; its local tensor and placements are exchanged |
| `model[2] = nn.Linear(...)` | is plain, and becomes a DTensor at the next call |

What follows a parameter when it moves: its gradient, what optimizers hold for it, and tensors that share its memory
(`p.detach()`, a state dict).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from shardc.runtime.errors import ShardcError
from shardc.runtime.execute.slots import Slot, cut, placements
from shardc.runtime.mesh.agreement import Note, agree, meeting
from shardc.runtime.mesh.distributed import DistributedMesh, from_local

# DTensor advises to flatten the mesh where a weight that two axes split is gathered: how it lies is the plan's choice
logging.getLogger("torch.distributed.tensor._redistribute").addFilter(
    lambda record: not str(record.msg).startswith("While redistributing")
)

RECORD = "_shardc_placed"
"""The attribute of a module that holds its `ParameterRecord`."""


@dataclass
class ParameterRecord:
    """Who chose how the parameters of a module lie: by name, True where it was a plan that trains or the user, False
    where it was a plan that only evaluates. A parameter without an entry waits for its first plan.

    `moves` counts the plans that moved what others had placed: programs planned before fit no longer."""

    chosen: dict[str, bool] = field(default_factory=dict[str, bool])
    moves: int = 0


def record_of(module: nn.Module) -> ParameterRecord | None:
    """The record of a module, None if nothing of it was distributed by shardc."""
    return vars(module).get(RECORD)


def binding(module: nn.Module, name: str, training: bool) -> bool:
    """Whether a plan must take the DTensor parameter of that name as it lies. A plan that trains is better founded
    than one that evaluates, and chooses anew."""
    record = record_of(module)
    return record is None or (name in record.chosen and (record.chosen[name] or not training))


def moves(module: nn.Module) -> int:
    """How often plans moved the parameters of a module after others had placed them."""
    record = record_of(module)
    return 0 if record is None else record.moves


def distribute_parameters(module: nn.Module, mesh: DistributedMesh) -> None:
    """Make every parameter of a module a DTensor, whole on every rank, and give all ranks rank 0's parameters and
    buffers. Every rank must call it. What is on the meta device or not yet initialised stays as it is.

    Raises ShardcError where a tuple holds a parameter, which would go on holding the old one.
    """
    _refuse_other_models(module)
    own = {name for name, tensor in module.named_parameters(remove_duplicate=False) if isinstance(tensor, DTensor)}
    names = [name for name, tensor in module.named_parameters() if _is_plain(tensor)]
    tensors = [module.get_parameter(name) for name in names]
    replace_parameters(names, tensors, [_whole(*pair) for pair in zip(names, tensors, strict=True)], mesh)
    if record_of(module) is None:
        setattr(module, RECORD, ParameterRecord(dict.fromkeys(own, True)))
    for tensor in module.buffers():
        if _is_plain(tensor):
            with torch.inference_mode(False), torch.no_grad():
                tensor.copy_(from_rank_0(tensor, mesh))


def settle(module: nn.Module, slots: Mapping[str, Slot], mesh: DistributedMesh, training: bool) -> None:
    """Store the parameters of a module as a program's slots say, unless a better founded choice stands.

    Plain ones become DTensors with rank 0's values. DTensors move in place. Every rank must call it.
    """
    record = vars(module).setdefault(RECORD, ParameterRecord())
    tensors = {name: tensor for name, tensor in module.named_parameters(remove_duplicate=False) if name in slots}
    plain = [name for name, tensor in module.named_parameters() if name in slots and _is_plain(tensor)]
    replace_parameters(plain, [tensors[name] for name in plain], [slots[name] for name in plain], mesh)
    movable = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor) and not binding(module, name, training) and not _lies(tensor, slots[name], mesh)
    }
    move({id(tensor): (tensor, slots[name]) for name, tensor in movable.items()}.values(), mesh)
    if training and movable:
        record.moves += 1
    for name in tensors:
        if name not in record.chosen or (training and not record.chosen[name]):
            record.chosen[name] = training


def _is_plain(tensor: Tensor) -> bool:
    return not (isinstance(tensor, DTensor) or tensor.is_meta or is_lazy(tensor)) and tensor.layout is torch.strided


def _whole(name: str, tensor: Tensor) -> Slot:
    return Slot("parameter", name, 0, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), ())


def _lies(tensor: DTensor, slot: Slot, mesh: DistributedMesh) -> bool:
    wanted = placements(slot.cuts, slot.shape, mesh.axes)
    pairs = zip(tensor.placements, wanted, mesh.axes.values(), strict=True)
    return tensor.device_mesh == mesh.device_mesh and all(one == other for one, other, ranks in pairs if ranks > 1)


def _refuse_other_models(module: nn.Module) -> None:
    """Broadcasts of tensors of other shapes would hang or mix values."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    kinds = {name: f"{tensor.dtype} {'' if is_lazy(tensor) else list(tensor.shape)}" for name, tensor in tensors}
    agree(Note(f"distributing {type(module).__name__}", kinds))


def from_rank_0(tensor: Tensor, mesh: DistributedMesh) -> Tensor:
    """A copy with the values of rank 0, on the device of this rank."""
    copied = tensor.detach().to(mesh.device(mesh.rank), copy=True, memory_format=torch.contiguous_format)
    if copied.numel():
        raw = copied.reshape(-1).view(torch.uint8)  # gloo does not know every dtype
        with meeting("the broadcast of rank 0's parameters"):
            dist.broadcast(raw, 0)
        copied = raw.view(copied.dtype).reshape(copied.shape)
    return copied


def distribute(parameter: Tensor, slot: Slot, mesh: DistributedMesh) -> nn.Parameter:
    """The full `parameter` as a DTensor parameter that stores a copy of the rank's part only, with rank 0's values.

    Every rank must call it. RankError if the shape or dtype is not the slot's, or if DTensor cannot store the cuts.
    """
    slot.check(parameter)
    with torch.inference_mode(False), torch.no_grad():
        stored = _part(from_rank_0(parameter, mesh), slot, mesh)
        return nn.Parameter(stored, requires_grad=parameter.requires_grad)


def _part(full: Tensor, slot: Slot, mesh: DistributedMesh) -> DTensor:
    local = cut(full, slot.cuts, mesh.coordinates(mesh.rank), mesh.axes)
    if local.untyped_storage().nbytes() > local.nbytes:
        local = local.clone()  # a view keeps all of `full`, and torch cannot copy a DTensor of a view with an offset
    return from_local(local, slot, mesh)


def move(tensors: Iterable[tuple[DTensor, Slot]], mesh: DistributedMesh) -> None:
    """Store every DTensor as its slot says. Each stays the object that it is; what belongs to it moves along."""
    pairs = list(tensors)
    if not pairs:
        return
    with torch.inference_mode(False), torch.no_grad():
        aliases = _aliases([tensor for tensor, _ in pairs])
        states = _states([tensor for tensor, _ in pairs])
        for tensor, slot in pairs:
            follow = [*states.get(id(tensor), ())]
            if isinstance(tensor.grad, DTensor):
                follow.append(tensor.grad)
            for one in (tensor, *follow):
                _relocate(one, slot, mesh)
            for alias in aliases.get(id(tensor), ()):
                _adopt(alias, tensor)


def _relocate(tensor: DTensor, slot: Slot, mesh: DistributedMesh) -> None:
    _adopt(tensor, _part(tensor.full_tensor().detach(), slot, mesh))


def _adopt(tensor: Any, other: Any) -> None:
    """A DTensor is these two attributes: what autograd, optimizers and hooks know of the object stays."""
    tensor._local_tensor, tensor._spec = other._local_tensor, other._spec


def _aliases(tensors: Sequence[DTensor]) -> dict[int, list[DTensor]]:
    """DTensors of the same memory and shape, by the id of the tensor that they are an alias of."""
    owner = {_memory(tensor): tensor for tensor in tensors if tensor.numel()}
    found: dict[int, list[DTensor]] = {}
    objects: list[Any] = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, DTensor)}  # a question a type, not an object
    for one in objects:
        if type(one) in kinds:
            tensor = owner.get(_memory(one))
            if tensor is not None and tensor is not one and tensor.shape == one.shape:
                found.setdefault(id(tensor), []).append(one)
    return found


def _memory(tensor: DTensor) -> int:
    local: Tensor | None = getattr(tensor, "_local_tensor", None)
    return 0 if local is None or local.is_meta else local.untyped_storage()._cdata


def _states(tensors: Sequence[DTensor]) -> dict[int, list[DTensor]]:
    """What optimizers hold for each parameter in its shape, by the id of the parameter."""
    ids = {id(tensor) for tensor in tensors}
    found: dict[int, list[DTensor]] = {}
    for holder in gc.get_referrers(*tensors):
        if isinstance(holder, dict):
            entries: dict[Any, Any] = holder
            for key, state in entries.items():
                if id(key) in ids and isinstance(state, dict):
                    held: list[Any] = list(state.values())  # pyright: ignore[reportUnknownArgumentType]
                    found.setdefault(id(key), []).extend(
                        one for one in held if isinstance(one, DTensor) and one.shape == key.shape
                    )
    return found


def replace_parameters(
    names: Sequence[str], old: Sequence[Tensor], slots: Sequence[Slot], mesh: DistributedMesh
) -> None:
    """Put DTensors in place of plain parameters, wherever these are held."""
    if old:
        holders: list[Any] = [one for one in gc.get_referrers(*old) if one is not old]
        _refuse_tuples(names, old, holders)
        new = [distribute(tensor, slot, mesh) for tensor, slot in zip(old, slots, strict=True)]
        swap_in(old, new, slots, mesh, holders)


def _refuse_tuples(
    names: Sequence[str], old: Sequence[Tensor], holders: Sequence[Any], becomes: str = "a DTensor"
) -> None:
    named = {id(tensor): name for name, tensor in zip(names, old, strict=True)}
    for holder in holders:
        if type(holder) is tuple:
            name = next((named[id(item)] for item in holder if id(item) in named), None)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            if name is not None:
                raise ShardcError(
                    f"a tuple holds the parameter {name}, which becomes {becomes} now; the tuple would go on holding "
                    "the old one. Shard the model first, and take its parameters then, or keep them in a list"
                )


def swap_in(
    old: Sequence[Tensor], new: Sequence[Tensor], slots: Sequence[Slot], mesh: DistributedMesh, holders: Sequence[Any]
) -> None:
    """For each pair (parameter, DTensor), put the DTensor wherever a dict, list or set of `holders` holds the old one.

    So modules, and optimizers created earlier, get the DTensors. What an optimizer holds for a parameter in its shape
    becomes a DTensor like it.
    """
    # torch.utils.swap_tensors would keep the object, but it refuses, since a DTensor has slots that a Parameter lacks.
    place = {id(tensor): at for at, tensor in enumerate(old)}
    holders = [holder for holder in holders if isinstance(holder, (dict, list, set))]
    for holder in holders:
        if isinstance(holder, dict):
            states: list[tuple[Any, Any]] = [(k, v) for k, v in holder.items() if id(k) in place]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            for key, state in states:
                if isinstance(state, dict):
                    _distribute_state(state, slots[place[id(key)]], mesh)  # pyright: ignore[reportUnknownArgumentType]
    _put(old, new, holders)
    for one, other in zip(old, new, strict=True):
        if one.grad is not None:
            other.grad = distribute(one.grad, slots[place[id(one)]], mesh).detach()


def swap_in_place(names: Sequence[str], old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Put each new tensor in place of the old one, which has no values, wherever a dict, list or set holds that.

    Raises ShardcError where a tuple holds an old one, which would go on holding it.
    """
    if old:
        holders: list[Any] = [one for one in gc.get_referrers(*old) if one is not old]
        _refuse_tuples(names, old, holders, becomes="one with values")
        _put(old, new, [holder for holder in holders if isinstance(holder, (dict, list, set))])


def _put(old: Sequence[Tensor], new: Sequence[Tensor], holders: Sequence[Any]) -> None:
    replaced = {id(one): other for one, other in zip(old, new, strict=True)}
    for holder in holders:
        _replace(holder, replaced)
    for one, other in zip(old, new, strict=True):
        vars(other).update(vars(one))
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(one, hooks):
                setattr(other, hooks, getattr(one, hooks))


def _distribute_state(state: MutableMapping[Any, Any], slot: Slot, mesh: DistributedMesh) -> None:
    for key, value in list(state.items()):
        if (
            isinstance(value, Tensor)
            and not isinstance(value, DTensor)
            and tuple(value.shape) == slot.shape
            and slot.shape
        ):
            like = Slot(
                slot.role, slot.name, slot.index, slot.shape, str(value.dtype).removeprefix("torch."), slot.cuts
            )
            state[key] = distribute(value, like, mesh).detach()


def _replace(holder: Any, new: Mapping[int, Tensor]) -> None:
    """Replace the old parameters in one container by the new ones, comparing by identity."""
    if isinstance(holder, set):
        for item in [item for item in holder if id(item) in new]:  # type: ignore[misc]
            holder.remove(item)
            holder.add(new[id(item)])
        return
    if isinstance(holder, list):
        places = [at for at, item in enumerate(holder) if id(item) in new]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        for at in places:
            holder[at] = new[id(holder[at])]
        return
    entries: list[tuple[Any, Any]] = list(holder.items())
    for key, value in entries:
        if id(value) in new:
            holder[key] = new[id(value)]
    if any(id(key) in new for key, _ in entries):  # in the same order
        entries = list(holder.items())
        holder.clear()
        holder.update((new.get(id(key), key), value) for key, value in entries)
