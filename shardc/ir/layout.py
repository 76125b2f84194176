"""Layouts: what every mesh axis does to one tensor, with the order of the axes that split one dim.

An atom may be split by an axis that does not divide it: `250@tp` on four ranks is 63 rows each, the last two of which
are padding on the last rank.
A dim is a list of atoms, major to minor; an atom may be split by mesh axes, major to minor.
Printed and parsed as `f32[(4@dp 512@tp), 4096]`: dim 0 is 4 x 512 with the 4 split by dp and the 512 by tp, dim 1 is
whole. In `f32[32@dp, 4096] +sum@tp` every tp rank holds an addend. In `f32[4096@cp~folded, 64]` rank i of n on cp holds
pieces i and 2n-1-i of 2n (see `shardc/runtime/mesh/orders.py`). An axis is used once in a layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch.distributed.tensor.placement_types import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement as DTensorPlacement

from shardc.errors import LayoutError
from shardc.ir.mesh import Mesh
from shardc.runtime.errors import RankError
from shardc.runtime.execute.slots import cuts_of, placements
from shardc.runtime.mesh.orders import FOLDED, axis_of, order_of

SHORT_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex32: "c32", torch.complex64: "c64", torch.complex128: "c128",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}  # fmt: skip
_LONG_DTYPES = {short: dtype for dtype, short in SHORT_DTYPES.items()}


@dataclass(frozen=True)
class S:
    """Placement: the axis splits dim `dim`."""

    dim: int


@dataclass(frozen=True)
class _Broadcast:
    def __repr__(self) -> str:
        return "B"


B = _Broadcast()
"""Placement: every rank of the axis holds the whole."""


@dataclass(frozen=True)
class P:
    """Placement: the ranks of the axis hold parts that `op` (sum, max, min, prod) combines."""

    op: str = "sum"


Placement = S | _Broadcast | P


@dataclass(frozen=True)
class Atom:
    """An indivisible piece of a dim: its global size and the axes that split it, major to minor."""

    size: int
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.axes:
            return str(self.size)
        return f"{self.size}@{self.axes[0]}" if len(self.axes) == 1 else f"{self.size}@({','.join(self.axes)})"


@dataclass(frozen=True)
class Layout:
    """The layout of one tensor: per dim its atoms, and per partial axis its reduction, in mesh order."""

    dims: tuple[tuple[Atom, ...], ...]
    partial: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def whole(shape: Sequence[int]) -> Layout:
        return Layout(tuple((Atom(int(size)),) for size in shape))

    @staticmethod
    def of(shape: Sequence[int], mesh: Mesh, given: Mapping[str, Placement]) -> Layout:
        """One placement an axis; axes that split the same dim do so in mesh order. Raises LayoutError."""
        axes: list[tuple[str, ...]] = [() for _ in shape]
        partial: list[tuple[str, str]] = []
        for name in given:
            if name not in mesh.names:
                raise LayoutError(f"mesh {mesh} has no axis {name!r}; it has {', '.join(mesh.names)}")
        for name in mesh.names:
            placement = given.get(name, B)
            if isinstance(placement, S):
                if not -len(shape) <= placement.dim < len(shape):
                    raise LayoutError(f"S({placement.dim}) is out of range for shape {tuple(shape)}")
                axes[placement.dim] += (name,)
            elif isinstance(placement, P):
                partial.append((name, placement.op))
        layout = Layout(tuple((Atom(int(n), a),) for n, a in zip(shape, axes, strict=True)), tuple(partial))
        layout.check(mesh)
        return layout

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    def placement(self, axis: str) -> Placement:
        """What one mesh axis does to the tensor."""
        for name, op in self.partial:
            if name == axis:
                return P(op)
        for index, dim in enumerate(self.dims):
            if any(axis in map(axis_of, atom.axes) for atom in dim):
                return S(index)
        return B

    def check(self, mesh: Mesh) -> None:
        """Raise LayoutError if an axis is unknown or used twice, or cannot deal out its atom in the order given."""
        seen: set[str] = set()
        atoms = [atom for dim in self.dims for atom in dim]
        used = [axis_of(axis) for atom in atoms for axis in atom.axes] + [name for name, _ in self.partial]
        for axis in used:
            if axis not in mesh.names:
                raise LayoutError(f"{self}: mesh {mesh} has no axis {axis!r}; it has {', '.join(mesh.names)}")
            if axis in seen:
                raise LayoutError(f"{self} uses axis {axis!r} twice; an axis splits one dim or none")
            seen.add(axis)
        for atom in atoms:
            if is_folded(atom.axes) and mesh.ways(atom.axes) > 1 and not mesh.splits(atom.size, atom.axes):
                raise LayoutError(f"{self}: {unfoldable(atom.size, atom.axes, mesh)}")

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """The shape that every rank holds, padding included."""
        shape = self._local.get(mesh)
        if shape is None:
            shape = tuple(math.prod(mesh.chunk(atom.size, atom.axes) for atom in dim) for dim in self.dims)
            self._local[mesh] = shape
        return shape

    @cached_property
    def _local(self) -> dict[Mesh, tuple[int, ...]]:
        return {}

    def simplify(self, mesh: Mesh) -> Layout:
        """The same layout with as few atoms and axes as express it: equal layouts simplify to equal objects."""
        simple = self._simple.get(mesh)
        if simple is None:
            simple = self._simple[mesh] = Layout(tuple(_merge(dim, mesh) for dim in self.dims), self.partial)
        return simple

    @cached_property
    def _simple(self) -> dict[Mesh, Layout]:
        return {}

    def cuts(self, mesh: Mesh) -> tuple[tuple[int, int, str], ...]:
        """The local slices from global to local, `(dim, outer, axis)` in order: see docs/design/runtime.md.

        Raises LayoutError where an atom before others in its dim does not divide: no slice of the whole dim gives that.
        """
        slices: list[tuple[int, int, str]] = []
        for index, dim in enumerate(self.dims):
            outer = 1
            for position, atom in enumerate(dim):
                if atom.size % mesh.ways(atom.axes) and any(later.size > 1 for later in dim[position + 1 :]):
                    raise LayoutError(f"{self}: {atom} does not divide, and stands before others in its dim")
                slices += [(index, outer, axis) for axis in atom.axes if mesh.ranks[axis] > 1]
                outer *= mesh.chunk(atom.size, atom.axes)
        return tuple(slices)

    def to_dtensor(self, mesh: Mesh) -> tuple[DTensorPlacement, ...]:
        """DTensor placements, one a mesh axis, exact. Raises LayoutError where DTensor cannot express the layout."""
        try:
            dtensor_placements = list(placements(self.simplify(mesh).cuts(mesh), self.shape, mesh.sizes))
        except (RankError, LayoutError) as error:
            raise LayoutError(f"DTensor cannot express {self} on mesh {mesh}: {error}") from error
        for axis, op in self.partial:
            dtensor_placements[mesh.names.index(axis)] = Partial(op)
        return tuple(dtensor_placements)

    @staticmethod
    def from_dtensor(given: Sequence[DTensorPlacement], shape: Sequence[int], mesh: Mesh) -> Layout:
        """The layout that DTensor placements stand for. Raises LayoutError for shards of uneven shards."""
        partial = tuple(
            (name, p.reduce_op) for name, p in zip(mesh.names, given, strict=True) if isinstance(p, Partial)
        )
        splits = tuple(Replicate() if isinstance(p, Partial) else p for p in given)
        try:
            cuts = cuts_of(splits, tuple(shape), mesh.sizes)
        except RankError as error:
            raise LayoutError(f"cannot read DTensor placements {tuple(given)}: {error}") from error
        return Layout.from_cuts(cuts, shape, mesh, partial)

    @staticmethod
    def from_cuts(
        cuts: Sequence[tuple[int, int, str]],
        shape: Sequence[int],
        mesh: Mesh,
        partial: tuple[tuple[str, str], ...] = (),
    ) -> Layout:
        """The layout that a chain of local slices leads to; inverse of `cuts`."""
        dims = [[Atom(int(size))] for size in shape]
        for dim, outer, axis in cuts:
            if mesh.ranks[axis] > 1:
                dims[dim] = _cut(dims[dim], outer, axis, mesh)
        layout = Layout(tuple(tuple(dim) for dim in dims), partial).simplify(mesh)
        layout.check(mesh)
        return layout

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        def show(dim: tuple[Atom, ...]) -> str:
            return str(dim[0]) if len(dim) == 1 else f"({' '.join(map(str, dim))})"

        tail = "".join(f" +{op}@{axis}" for axis, op in self.partial)
        return f"[{', '.join(show(dim) for dim in self.dims)}]{tail}"

    @staticmethod
    def parse(text: str) -> Layout:
        """Inverse of `str`, with or without the dtype in front. Raises LayoutError for a text that is anything else."""
        match = _LAYOUT.fullmatch(text)
        if not match:
            raise LayoutError(
                f"cannot read layout {text!r}; write it like 'f32[32@dp, 4096] +sum@tp', a dim that several axes split "
                "as 32@(dp,tp), and a dim of several pieces as (4@dp 512@tp)"
            )
        dtype, dims, partial = match.groups()
        if dtype and dtype not in _LONG_DTYPES and not isinstance(_dtype_of_torch(dtype), torch.dtype):
            raise LayoutError(f"unknown dtype {dtype!r} in {text!r}; known are {', '.join(_LONG_DTYPES)}")
        return Layout(
            tuple(_parse_dim(dim[0]) for dim in _DIM.finditer(dims)),
            tuple((axis, op) for op, axis in _PARTIAL.findall(partial)),
        )


def is_folded(axes: Sequence[str]) -> bool:
    """Whether one of the axes deals out its dim folded."""
    return any(order_of(axis) == FOLDED for axis in axes)


def unfoldable(size: int, axes: Sequence[str], mesh: Mesh) -> str:
    """Why axes cannot split a dim of `size`, one of them folded."""
    if is_folded(axes[:-1]):
        return f"of {' and '.join(axes)}, only the last may deal out the dim folded"
    pieces = 2 * mesh.ways(tuple(axes))
    return f"{axes[-1]} cuts the dim into {pieces} pieces of one size, and {pieces} does not divide {size}"


@lru_cache(maxsize=1 << 14)
def is_storable(layout: Layout, mesh: Mesh) -> bool:
    """Whether a DTensor can store a tensor so: one chunk of every dim, axes in an order that DTensor has."""
    if any(len(dim) > 1 for dim in layout.simplify(mesh).dims):
        return False
    try:
        layout.to_dtensor(mesh)
    except LayoutError:
        return False
    return True


@lru_cache(maxsize=1 << 14)
def is_sliceable(layout: Layout, mesh: Mesh) -> bool:
    """Whether local slices of the global tensor give the layout."""
    try:
        layout.cuts(mesh)
    except LayoutError:
        return False
    return True


def describe(value: torch.Tensor, layout: Layout) -> str:
    """`f32[32@dp, 512]`: dtype and layout."""
    return f"{SHORT_DTYPES.get(value.dtype, str(value.dtype))}{layout}"


def parse_typed(text: str) -> tuple[torch.dtype, Layout]:
    """Inverse of `describe`."""
    name = text.strip().partition("[")[0]
    if name not in _LONG_DTYPES:
        raise LayoutError(f"unknown dtype {name!r} in {text!r}; known are {', '.join(_LONG_DTYPES)}")
    return _LONG_DTYPES[name], Layout.parse(text)


def _merge(dim: tuple[Atom, ...], mesh: Mesh) -> tuple[Atom, ...]:
    merged: list[Atom] = []
    for given in dim:
        atom = Atom(given.size, tuple(axis for axis in given.axes if mesh.ranks[axis] > 1))
        if atom.size == 1 and not atom.axes and len(dim) > 1:
            continue
        last = merged[-1] if merged else None
        if last and not atom.axes and last.size % mesh.ways(last.axes) == 0:
            merged[-1] = Atom(last.size * atom.size, last.axes)
        elif last and last.size == mesh.ways(last.axes):
            merged[-1] = Atom(last.size * atom.size, last.axes + atom.axes)
        else:
            merged.append(atom)
    return tuple(merged) or (Atom(1),)


def _cut(dim: list[Atom], outer: int, axis: str, mesh: Mesh) -> list[Atom]:
    """Split `dim`, seen locally as (outer, rest), over `axis` in its part `rest`."""
    done: list[Atom] = []
    left = outer
    for position, atom in enumerate(dim):
        local = mesh.chunk(atom.size, atom.axes)
        if left == 1:
            return [*done, *_append_axis(dim[position:], axis)]
        if local <= left and left % local == 0:
            done.append(atom)
            left //= local
            continue
        if local % left:
            break
        major, minor = Atom(atom.size // (local // left), atom.axes), Atom(local // left)
        return [*done, major, *_append_axis([minor, *dim[position + 1 :]], axis)]
    raise LayoutError(f"a block of {outer} does not fit the atoms {[str(a) for a in dim]}")


def _append_axis(rest: list[Atom], axis: str) -> list[Atom]:
    return [Atom(rest[0].size, (*rest[0].axes, axis)), *rest[1:]]


def _dtype_of_torch(name: str) -> object:
    """What `torch.name` is, for a dtype that has no short name."""
    return getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None


_AXIS = r"[^\W\d]\w*"
_SPLIT = rf"{_AXIS}(?:~{FOLDED})?"
_AXES = rf"@(?:{_SPLIT}|\(\s*{_SPLIT}(?:\s*,\s*{_SPLIT})*\s*\))"
_PIECE = rf"(?:0|[1-9]\d*)(?:{_AXES})?"
_ATOM = re.compile(rf"(\d+)({_AXES})?")
_DIM = re.compile(rf"(?:{_PIECE}|\(\s*(?:{_PIECE}(?:\s+{_PIECE})*)?\s*\))")
_DIMS = rf"(?:{_DIM.pattern}(?:\s*,\s*{_DIM.pattern})*)?"
_PARTIAL = re.compile(rf"\+(\w+)@({_AXIS})")
_LAYOUT = re.compile(rf"\s*([\w.]*)\[\s*({_DIMS})\s*\]((?:\s*\+\w+@{_AXIS})*)\s*")


def _parse_dim(text: str) -> tuple[Atom, ...]:
    return tuple(Atom(int(size), tuple(re.findall(_SPLIT, axes))) for size, axes in _ATOM.findall(text))
