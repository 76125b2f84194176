"""How tensors enter and leave a generated module: from the user's tensors to a rank's, and back.

| | virtual mesh | torch.distributed |
| --- | --- | --- |
| state, inputs | global tensor, cut per rank | DTensor: its local part; global tensor: cut on every rank |
| output without cuts | the value of rank 0 | the plain local value |
| output with cuts | pasted to the global tensor | DTensor (`ShardedOutput`) |
| gradient | pasted to the global tensor | DTensor for a DTensor; for a plain tensor gathered, whole on every rank |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from shardc.runtime.errors import RankError
from shardc.runtime.execute.sharded_output import sharded_output
from shardc.runtime.execute.slots import Slot, cut, local_shapes, padded, paste, placements
from shardc.runtime.mesh.distributed import DistributedMesh, from_local
from shardc.runtime.mesh.mesh import RuntimeMesh
from shardc.runtime.mesh.orders import BLOCKS, axis_of, order_of


class Boundary(ABC):
    """How tensors cross into the ranks of one mesh and out again."""

    def __init__(self, mesh: RuntimeMesh) -> None:
        self.mesh = mesh

    def enter(self, slot: Slot, value: Tensor, rank: int) -> Tensor:
        """The part of the user's `value` that `rank` works on: a tensor of the slot's local shape."""
        value = value.detach()
        if not slot.cuts:
            return value.contiguous()
        return cut(value, slot.cuts, self.mesh.coordinates(rank), self.mesh.axes)

    def enter_tangent(self, slot: Slot, tangent: Tensor | None, rank: int) -> Tensor:
        """The rank's part of a tangent (the gradient of an output); zeros where there is none."""
        if tangent is None:
            tangent = torch.zeros(slot.shape, dtype=getattr(torch, slot.dtype), device=self.mesh.device(rank))
        return self.enter(slot, tangent, rank)

    @abstractmethod
    def leave(self, slot: Slot, parts: Sequence[Tensor]) -> Tensor:
        """The user's tensor, of the slot's global shape, from the values of the local ranks."""

    def join(self, slot: Slot, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """The user's tensor from the values of the local ranks in every micro-batch, each a part of the slot's dim."""
        micro = slot.of_microbatch
        return torch.cat([self.leave(micro, of_one) for of_one in parts], slot.batch[0])

    def hand_over(self, gradient: Tensor | None, kind: type[Tensor]) -> Tensor | None:
        """A gradient from `leave`, in the form that autograd expects for a user's tensor of type `kind`."""
        return gradient

    def store(self, target: Tensor, value: Tensor) -> None:
        """Copy a new value from `leave` into the user's buffer, in place."""
        target.copy_(value)


class _Virtual(Boundary):
    def leave(self, slot: Slot, parts: Sequence[Tensor]) -> Tensor:
        if not slot.cuts:
            return parts[0].detach()
        return paste(parts, slot.shape, slot.cuts, self.mesh.axes)


class _Distributed(Boundary):
    mesh: DistributedMesh

    def __init__(self, mesh: RuntimeMesh) -> None:
        super().__init__(mesh)
        self._entered: dict[Slot, Any] = {}  # as what kind of DTensor a slot's value came that was local as it was
        self._left: dict[Slot, tuple[torch.Size, torch.dtype, Any]] = {}  # which part became which kind of DTensor

    def enter(self, slot: Slot, value: Tensor, rank: int) -> Tensor:
        # DTensor takes as long for its part of a parameter, and to become one, as a small operator
        if isinstance(value, DTensor) and value._spec is self._entered.get(slot):
            local = value._local_tensor  # pyright: ignore[reportPrivateUsage]
            if type(local) is Tensor:  # and not what a collective under way will be
                return local.detach().contiguous()
        return self._enter(slot, value, rank)

    def _enter(self, slot: Slot, value: Tensor, rank: int) -> Tensor:
        if isinstance(value, DTensor) and any(order_of(axis) != BLOCKS for _, _, axis in slot.cuts):
            value = value.full_tensor()  # DTensor has no placement that is folded
        if not isinstance(value, DTensor):
            return super().enter(slot, value.to(self.mesh.device(rank)), rank)
        expected = placements(slot.cuts, slot.shape, self.mesh.axes)
        if value.device_mesh != self.mesh.device_mesh:
            raise RankError(
                f"{slot} is a DTensor on the mesh {value.device_mesh}, but the module runs on {self.mesh.device_mesh}: "
                "distribute it on that mesh"
            )
        lies, shape = (
            _same(value.placements, expected, self.mesh),
            local_shapes(slot.shape, slot.cuts, self.mesh.axes)[-1],
        )
        spec = value._spec  # pyright: ignore[reportPrivateUsage]
        if not lies:
            value = value.redistribute(self.mesh.device_mesh, expected)
        local = value.to_local().detach()
        if lies and local.shape == shape:
            self._entered[slot] = spec
        for dim, size in enumerate(shape):
            local = padded(local, dim, size)
        return local.contiguous()

    def leave(self, slot: Slot, parts: Sequence[Tensor]) -> Tensor:
        # A parameter is a DTensor even where it is whole, and autograd wants a gradient of the same type.
        if not slot.cuts and slot.role != "gradient":
            return parts[0].detach()
        value = self._dtensor(parts[0].detach(), slot)
        return sharded_output(value) if slot.role == "output" else value

    def _dtensor(self, local: Tensor, slot: Slot) -> DTensor:
        shape, dtype, spec = self._left.get(slot, (None, None, None))
        if local.shape == shape and local.dtype is dtype:
            return DTensor(local, spec, requires_grad=False)  # pyright: ignore
        value = from_local(local, slot, self.mesh)
        made = value._local_tensor  # pyright: ignore[reportPrivateUsage]
        if made.shape == local.shape and made.device == local.device:
            self._left[slot] = local.shape, local.dtype, value._spec  # pyright: ignore[reportPrivateUsage]
        return value

    def join(self, slot: Slot, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        (dim, count), micro = slot.batch, slot.of_microbatch
        if not slot.cuts:
            return super().join(slot, parts)
        # what a rank has of every micro-batch are blocks of the whole: DTensor stores that where it has a placement
        cuts = tuple((d, outer * count if d == dim else outer, axis) for d, outer, axis in slot.cuts)
        even = micro.shape[dim] % math.prod(self.mesh.axes[axis_of(axis)] for d, _, axis in slot.cuts if d == dim) == 0
        try:
            if even:
                whole = replace(slot, cuts=cuts, batch=())
                return self.leave(whole, [torch.cat([of_one[0] for of_one in parts], dim)])
        except RankError:
            pass
        made = [from_local(of_one[0].detach(), micro, self.mesh).full_tensor() for of_one in parts]
        return torch.cat(made, dim)

    def hand_over(self, gradient: Tensor | None, kind: type[Tensor]) -> Tensor | None:
        if isinstance(gradient, DTensor) and not issubclass(kind, DTensor):
            return gradient.full_tensor()
        return gradient

    def store(self, target: Tensor, value: Tensor) -> None:
        if isinstance(value, DTensor) and not isinstance(target, DTensor):
            value = value.full_tensor()
        elif isinstance(target, DTensor) and not isinstance(value, DTensor):
            target = target.to_local()  # without cuts: whole on every rank
        target.copy_(value)


def _same(one: Sequence[Placement], other: Sequence[Placement], mesh: RuntimeMesh) -> bool:
    """Whether two placements store the same on every rank. On an axis of one rank, all placements do."""
    return all(a == b for a, b, ranks in zip(one, other, mesh.axes.values(), strict=True) if ranks > 1)


def boundary(mesh: RuntimeMesh) -> Boundary:
    """The boundary of a virtual or of a distributed mesh."""
    return _Distributed(mesh) if isinstance(mesh, DistributedMesh) else _Virtual(mesh)
