"""Sharded models under torch.distributed: when their parameters become DTensors, and what ranks agree on at a call.

torchrun --nproc-per-node 4 train.py
    model = shard(MLP(), mesh="dp=2,tp=2")     parameters are DTensors from here on, with rank 0's values
    optimizer = AdamW(model.parameters())      so they are the ones that the optimizer gets
    model(x)                                   planned; the same parameters are moved to where the plan wants them
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from shardc.capture.inputs import flatten
from shardc.errors import MeshError, ShardcError
from shardc.explain.plan_file.fingerprint import fingerprint
from shardc.ir.mesh import Mesh
from shardc.ir.program import Role, value_of
from shardc.planning.compilation import Compilation
from shardc.runtime import DistributedMesh, Executable, local_mesh
from shardc.runtime.mesh import mixed
from shardc.runtime.mesh.agreement import Note, Sums, agree
from shardc.runtime.mesh.batch import Batch, axes_of, join, own_parts, part_number, placements_of
from shardc.runtime.mesh.distributed import started
from shardc.runtime.mesh.parameters import distribute_parameters, settle

LOOKS = 100
"""Of so many calls of a program, at one the ranks compare the values of their inputs."""


def check_world(mesh: Mesh) -> None:
    """Under torchrun the mesh must have as many devices as there are processes."""
    world = started()
    if world and mesh.size != world:
        relation = "larger than" if mesh.size > world else "smaller than"
        raise MeshError(
            f"mesh {mesh} has {mesh.size} devices, {relation} the {world} processes of this run; "
            f"start torchrun with --nproc-per-node {mesh.size} or name a mesh of {world} devices"
        )


def check_data(data: str | None, mesh: Mesh) -> None:
    """Raise MeshError where `data=` names an axis that the mesh does not have, or one twice."""
    names = [] if data is None else [name.strip() for name in data.split(",")]
    for name in names:
        if name not in mesh.names:
            raise MeshError(f"data={data!r}: mesh {mesh} has no axis {name!r}; it has {', '.join(mesh.names)}")
        if names.count(name) > 1:
            raise MeshError(f"data={data!r} names the axis {name!r} twice; name it once")


def distribute(model: nn.Module, mesh: str | Mesh | None = None) -> nn.Module:
    """Make the parameters of a model DTensors now, with rank 0's values; returns the model. Without torch.distributed
    it does nothing.

    `shard(model)` has done it already. It is for models whose parameters came later: of a class that `shard` decorates,
    made on the meta device, or replaced. `mesh` is that of the sharded model where none is named. Every rank must call
    it. Until the first plan every rank holds all of every parameter; a plan moves them, and they stay the same objects.

    Raises MeshError for a mesh that does not fit the run; ShardcError where there is no mesh, where a parameter is on
    the meta device, and where a tuple holds a parameter, for it would go on holding the old one.
    """
    engine = vars(model).get("_shardc")
    asked = Mesh.parse(mesh) if mesh is not None else None if engine is None else engine.request.mesh
    if asked is None:
        raise ShardcError('no mesh: shard the model first, or name one, like distribute(model, mesh="dp=2,tp=2")')
    meta = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if meta is not None:
        raise ShardcError(f"{meta} is on the meta device: this model can be planned, but has no values to distribute")
    distribute_if_started(model, asked)
    return model


def distribute_if_started(model: nn.Module, mesh: Mesh, data: str | None = None) -> None:
    """What `distribute` does, but for parameters on the meta device, which stay there."""
    if started() and next(model.parameters(), next(model.buffers(), None)) is not None:
        check_world(mesh)
        real = local_mesh(mesh.sizes)
        assert isinstance(real, DistributedMesh)
        mixed.install()
        distribute_parameters(model, real)
        # else Accelerate, and so Trainer, would wrap it in DistributedDataParallel
        vars(model)["_is_accelerate_prepared"] = True
        if data is not None:  # else Trainer multiplies the loss, which is that of all ranks
            vars(model)["accepts_loss_kwargs"] = False


def agree_on_program(c: Compilation) -> None:
    """Raise RankError on every rank unless all ranks are about to plan the same program. Every rank must call it."""
    kinds: dict[Role, list[str]] = {Role.INPUT: [], Role.PARAMETER: [], Role.BUFFER: []}
    for port, node in zip(c.program.inputs, c.program.placeholders, strict=True):
        value = value_of(node)
        kinds.setdefault(port.role, []).append(f"{port.name or port.index} {value.dtype}{list(value.shape)}")
    facts = {
        "inputs": ", ".join(kinds.pop(Role.INPUT)),
        "gradients": "recorded" if torch.is_grad_enabled() else "not recorded",
        **{f"{role.value}s": ", ".join(named) for role, named in kinds.items()},
        **{f"the option {one.name}": str(getattr(c.options, one.name)) for one in fields(c.options)},
        "versions": f"shardc {version('shardc')}, torch {torch.__version__}",
        "the program's operators, or what they read": fingerprint(c.factored).digest,
    }
    model = type(c.call.model).__name__
    agree(Note(f"the first call of a program of {model}", facts, advice=_advice(c.options.data)))


def before_call(
    model: nn.Module, executable: Executable, state: Mapping[str, Tensor], leaves: Sequence[Any], data: str | None
) -> bool:
    """What a call under torch.distributed needs: parameters that lie as the program has them, and now and then a look
    at whether all ranks bring the same inputs. True if parameters became other objects, so that `state` is stale."""
    mesh = executable.mesh
    assert isinstance(mesh, DistributedMesh)
    mixed.install()
    known = _known.setdefault(executable, _Known())
    known.calls += 1
    if known.calls % LOOKS == 1:
        axes = () if data is None else axes_of(data, mesh)
        sums = [
            Sums.of(f"input {index}", leaf.to_local() if isinstance(leaf, DTensor) else leaf)
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
            and (not isinstance(leaf, DTensor) or leaf.placements == placements_of(axes, mesh))
        ]
        part = f"part {part_number(mesh, axes, mesh.rank)}" if axes else ""
        agree(Note(f"a call of {type(model).__name__}", {"inputs": str(len(sums))}, part, sums, _advice(data)))
    if known.specs is not None and all(getattr(state[name], "_spec", None) is spec for name, spec in known.specs):
        return False
    slots = {slot.name: slot for slot in executable.inputs if slot.role == "parameter"}
    settle(model, slots, mesh, training=bool(executable.gradients))
    named = dict(model.named_parameters(remove_duplicate=False))
    known.specs = [(name, named[name]._spec) for name in slots if isinstance(named[name], DTensor)]  # type: ignore[attr-defined]
    return True


class _Known:
    """How often an executable ran, and how its parameters lay when somebody last looked."""

    def __init__(self) -> None:
        self.calls = 0
        self.specs: list[tuple[str, Any]] | None = None


_known: weakref.WeakKeyDictionary[Executable, _Known] = weakref.WeakKeyDictionary()


def _advice(data: str | None) -> str:
    if data is not None:
        return f". Ranks that differ in other axes than {data} must bring the same"
    return (
        ". A plain tensor is the global batch, the same on every rank. Where every rank brings its own part of the "
        'batch, name the axes along which it is split: shard(model, data="dp")'
    )


def with_global_batch(
    run: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mesh: Mesh,
    data: str | None,
) -> Any:
    """`run(args, kwargs)`. With `data=` under torch.distributed it runs on the batch of all ranks, and returns this
    rank's part of what has the batch in dim 0."""
    if data is None or not started():
        return run(args, kwargs)
    check_world(mesh)
    real = local_mesh(mesh.sizes)
    assert isinstance(real, DistributedMesh)
    leaves, spec = flatten((args, kwargs))
    joined, batch = join(leaves, real, axes_of(data, real))
    args, kwargs = pytree.tree_unflatten(joined, spec)
    result = run(args, kwargs)
    return result if batch is None else _own(result, batch)


def _own(result: Any, batch: Batch) -> Any:
    leaves, spec = flatten(result)
    return pytree.tree_unflatten(own_parts(leaves, batch), spec)
