"""A mesh whose ranks are processes: torch.distributed's device mesh and functional collectives."""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from shardc.runtime.collectives.c10d import Group
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.errors import RankError
from shardc.runtime.execute.slots import Slot, placements, valid_shape
from shardc.runtime.mesh.agreement import meeting, running, with_others
from shardc.runtime.mesh.mesh import Context, Result, RuntimeMesh, Turn
from shardc.runtime.mesh.virtual import VirtualMesh

CALLED = "__called__"
"""A global of a generated module: what it computes, for people who read what ranks do."""


def _let_workers_end() -> None:
    """Give gloo's threads time to release the tensors of the last collective.

    They may release them after its result was read. If the interpreter ends meanwhile, the process aborts
    (pytorch/pytorch#190489), even after destroy_process_group.
    """
    time.sleep(0.1)


class DistributedMesh(RuntimeMesh):
    """One rank per process of the default process group, which must be initialised and as large as the mesh.

    `device_type` is "cpu" (gloo) or "cuda" (nccl, the device of LOCAL_RANK). `device_mesh` is torch's DeviceMesh. The
    groups of the axes get the timeout of the default group. RankError unless the group has one process per rank.
    """

    def __init__(self, axes: Mapping[str, int], device_type: str) -> None:
        super().__init__(axes)
        if not dist.is_initialized():
            raise RankError("torch.distributed is not initialised: call init_process_group, or start with torchrun")
        world = dist.get_world_size()
        if world != self.size:
            names = ", ".join(f"{name}={size}" for name, size in self.axes.items())
            raise RankError(
                f"the mesh {names} has {self.size} ranks, but torch.distributed runs {world} processes: "
                "start one process per rank"
            )
        self.rank: int = dist.get_rank()
        self.ranks = (self.rank,)
        if device_type == "cuda":
            self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self._device)
        else:
            self._device = torch.device(device_type)
            atexit.unregister(_let_workers_end)
            atexit.register(_let_workers_end)
        self.device_mesh: DeviceMesh = init_device_mesh(
            device_type, tuple(self.axes.values()), mesh_dim_names=tuple(self.axes)
        )
        self._groups: dict[str, dist.ProcessGroup] = {axis: self.device_mesh.get_group(axis) for axis in self.axes}
        position, gloo = self.coordinates(self.rank), self._device.type == "cpu"
        self._ranks_of = {
            axis: Group(group.group_name, self.axes[axis], position[axis], gloo) for axis, group in self._groups.items()
        }
        self._adopt_timeout()

    def _adopt_timeout(self) -> None:
        """Give the groups the timeout of the default group; torch's own default for new ones is 10 to 30 minutes."""
        device = torch.device(self._device.type)
        default: Any = dist.group.WORLD
        timeout = default._get_backend(device).options._timeout
        for group in self._groups.values():
            dist.distributed_c10d._set_pg_timeout(timeout, group)  # pyright: ignore[reportPrivateUsage]

    def device(self, rank: int) -> torch.device:
        """The device of this process."""
        return self._device

    def run(
        self,
        function: Callable[..., Result],
        arguments: Callable[[int], tuple[Any, ...]],
        *,
        random: bool = False,
        turn: Turn = (0, 1),
    ) -> list[Result]:
        """See `RuntimeMesh.run`. Returns one result, that of this process.

        If another process dies, the run ends with an error within the group's timeout.
        """
        named = getattr(function, "__globals__", {}).get(CALLED, getattr(function, "__module__", "a function"))
        with running(f"{getattr(function, '__name__', 'run')} of {named}"):
            try:
                state = self._broadcast(torch.get_rng_state()) if random else None
                context = Context(self, self.rank, state, turn)
                result = context.call(function, arguments)
            except RankError as error:
                raise with_others(error) from error
        if context.generator is not None:
            torch.set_rng_state(context.generator.get_state())
        return [result]

    def _broadcast(self, state: Tensor) -> Tensor:
        state = state.to(self._device)
        with meeting("the broadcast of rank 0's random state"):
            dist.broadcast(state, 0)
        return state.cpu()

    def agreed(self, source: str) -> str:
        """See `RuntimeMesh.agreed`. Every rank must call it."""
        box = [source]
        with meeting("the broadcast of rank 0's program"):
            dist.broadcast_object_list(box, 0)
        return box[0]

    def begin(
        self, context: Context, collective: AnyCollective, axis: str, operand: Tensor, op: str
    ) -> Callable[[], Tensor]:
        """See `RuntimeMesh.begin`. Gloo's threads, or NCCL's stream, run the collective."""
        return collective.c10d(operand, self._ranks_of[axis], op)


def started() -> int:
    """The number of processes of this run, 0 where there is neither torch.distributed nor torchrun."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 0


def local_mesh(axes: Mapping[str, int]) -> VirtualMesh | DistributedMesh:
    """The mesh for this process: distributed under torchrun, else virtual.

    It is a DistributedMesh if RANK and WORLD_SIZE are set, or torch.distributed is initialised. The process group is
    initialised if necessary: with CUDA, nccl on the device of LOCAL_RANK; else gloo.
    """
    if not started():
        return VirtualMesh(axes)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            _initialise("nccl")
        else:
            _initialise("gloo")
    # process groups are scarce, so all programs on the same axes share one mesh
    world, identity = dist.group.WORLD, tuple(axes.items())
    if _MESHES.get(identity, (None, None))[0] is not world:
        _MESHES[identity] = world, DistributedMesh(axes, "cuda" if "nccl" in dist.get_backend() else "cpu")
    return _MESHES[identity][1]


def _initialise(backend: str) -> None:
    """`init_process_group`. Where torchrun started the processes again it has kept the store, in which torch 2.13 would
    find the addresses of those that have ended."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        dist.init_process_group(backend)
        return
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


_MESHES: dict[tuple[tuple[str, int], ...], tuple[object, DistributedMesh]] = {}


def from_local(local: Tensor, slot: Slot, mesh: DistributedMesh) -> DTensor:
    """The DTensor of the slot's global shape whose part on this rank is `local` without its padding."""
    valid = valid_shape(slot.shape, slot.cuts, mesh.coordinates(mesh.rank), mesh.axes)
    if valid != tuple(local.shape):
        local = local[tuple(slice(size) for size in valid)].contiguous()
    strides = tuple(math.prod(slot.shape[dim + 1 :]) for dim in range(len(slot.shape)))
    return DTensor.from_local(
        local,
        mesh.device_mesh,
        placements(slot.cuts, slot.shape, mesh.axes),
        run_check=False,
        shape=torch.Size(slot.shape),
        stride=strides,
    )
