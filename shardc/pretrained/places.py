"""Where the values of a model's tensors go: into what a rank stores of each.

up.weight f32[256, 64] on the meta device, dp=2,tp=2   ->   a DTensor, rows 64 to 128 on rank 1
up.weight, a DTensor that a plan placed                ->   the part that this rank holds, in place
up.weight on a virtual mesh                            ->   the whole tensor

A tensor without values becomes another object once they are there; it takes the place of the old one wherever a dict,
a list or a set holds that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import is_lazy

from shardc.errors import ShardcError
from shardc.runtime import DistributedMesh, RankError, Slot
from shardc.runtime.execute.slots import Cuts, cut, cuts_of, valid_shape
from shardc.runtime.mesh.distributed import from_local
from shardc.runtime.mesh.parameters import swap_in_place

Part = Callable[[tuple[slice, ...]], Tensor]
"""Gives a part of a whole tensor."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state dict, as they stand in it. A tensor that has several names has all of them.

    Raises ShardcError for a parameter that has no shape yet."""
    named = {name: one for name, one in model.state_dict(keep_vars=True).items() if isinstance(one, Tensor)}
    lazy = next((name for name, one in model.named_parameters() if is_lazy(one)), None)
    if lazy is not None:
        raise ShardcError(f"{lazy} has no shape before the first call (nn.Lazy...): name its sizes")
    return named


class Destination:
    """What stores the values of one tensor on this rank. `fill` writes them; `made` is the tensor that then stands for
    the one that had none (None where that is filled in place)."""

    def __init__(self, tensor: Tensor, mesh: DistributedMesh | None) -> None:
        self.tensor, self._mesh = tensor, mesh
        self.made: Tensor | None = None
        self.cuts: Cuts = ()

    def fill(self, part: Part) -> None:
        """Write the values, of which `part` gives any piece."""
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(self.tensor, DTensor):
                self._fill_dtensor(self.tensor, part)
            elif not self.tensor.is_meta:
                self.tensor.data.copy_(part(()))
            elif self._mesh is None:
                self._make(torch.empty_like(self.tensor, device=torch.get_default_device()), part, ())
            else:
                cuts = resting_cuts(self.tensor.shape, self._mesh.axes) if self._is_parameter else ()
                self._make_dtensor(self.tensor, cuts, part, self._mesh)

    @property
    def _is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)

    def _make(self, local: Tensor, part: Part, cuts: Cuts) -> None:
        self.cuts = cuts
        local.copy_(part(()))
        self.made = self._like(local)

    def _like(self, made: Tensor) -> Tensor:
        if not self._is_parameter:
            return made.requires_grad_(self.tensor.requires_grad)
        return nn.Parameter(made, requires_grad=self.tensor.requires_grad)

    def _make_dtensor(self, tensor: Tensor, cuts: Cuts, part: Part, mesh: DistributedMesh) -> None:
        where = mesh.coordinates(mesh.rank)
        shape = valid_shape(tensor.shape, cuts, where, mesh.axes)
        local = torch.empty(shape, dtype=tensor.dtype, device=mesh.device(mesh.rank))
        _copy(local, part, tensor.shape, cuts, where, mesh.axes)
        if not self._is_parameter:
            self._make(local, lambda _: local, ())
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.made = self._like(from_local(local, Slot("parameter", "", 0, tuple(tensor.shape), dtype, cuts), mesh))

    def _fill_dtensor(self, tensor: DTensor, part: Part) -> None:
        mesh, local = tensor.device_mesh, tensor._local_tensor
        if local.is_meta:
            local = tensor._local_tensor = torch.empty_like(local, device=mesh.device_type)
        axes = {str(at): size for at, size in enumerate(mesh.shape)}
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            return
        try:
            cuts = cuts_of(tensor.placements, tensor.shape, axes)
        except RankError:  # DTensor has placements that cuts do not express
            whole = part(()).to(local.device, local.dtype)
            local.copy_(distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None).to_local())
            return
        _copy(local, part, tensor.shape, cuts, dict(zip(axes, coordinate, strict=True)), axes)


def resting_cuts(shape: Sequence[int], axes: Mapping[str, int]) -> Cuts:
    """How a parameter lies that has values, but no plan yet: dim 0 over all axes that split it evenly, or else over
    the largest axis; where it is shorter than that, whole. So it is gathered without a copy when a plan moves it."""
    if not shape:
        return ()
    cuts: list[tuple[int, int, str]] = []
    rows = shape[0]
    for axis, size in axes.items():
        if size > 1 and rows and rows % size == 0:
            cuts.append((0, 1, axis))
            rows //= size
    largest = max(axes, key=axes.__getitem__, default=None)
    if not cuts and largest is not None and rows >= axes[largest] > 1:
        chunk = -(-rows // axes[largest])
        return ((0, 1, largest),) if chunk * (axes[largest] - 1) < rows else ()
    return tuple(cuts)


def _copy(
    local: Tensor,
    part: Part,
    shape: Sequence[int],
    cuts: Cuts,
    coordinates: Mapping[str, int],
    axes: Mapping[str, int],
) -> None:
    """Copy into `local` what the rank at `coordinates` holds of a whole tensor."""
    runs = [_runs(dim, size, cuts, coordinates, axes) for dim, size in enumerate(shape)]
    for pieces in itertools.product(*runs):
        into, out_of = tuple(here for here, _ in pieces), tuple(there for _, there in pieces)
        local[into].copy_(part(out_of))


def _runs(
    dim: int, size: int, cuts: Cuts, coordinates: Mapping[str, int], axes: Mapping[str, int]
) -> list[tuple[slice, slice]]:
    """The pieces of a dim that a rank holds: where each lies on the rank, and in the whole dim."""
    own = tuple((0, outer, axis) for at, outer, axis in cuts if at == dim)
    if not own:
        return [(slice(0, size), slice(0, size))]
    held = cut(torch.arange(1, size + 1), own, coordinates, axes)
    held = held[held > 0] - 1  # zeros are padding
    if not held.numel():
        return []
    starts = [0, *((held.diff() != 1).nonzero().flatten() + 1).tolist(), held.numel()]
    return [
        (slice(begin, end), slice(int(held[begin]), int(held[end - 1]) + 1))
        for begin, end in itertools.pairwise(starts)
    ]


def put(names: Mapping[int, str], places: Iterable[Destination]) -> None:
    """Put the tensors that now have values in place of those that had none, wherever these are held.

    Raises ShardcError where a tuple holds one. `names` are by the id of the old tensor."""
    made = [place for place in places if place.made is not None]
    old = [place.tensor for place in made]  # in no tuple: a tuple would go on holding them
    swap_in_place([names[id(tensor)] for tensor in old], old, [place.made for place in made if place.made is not None])
