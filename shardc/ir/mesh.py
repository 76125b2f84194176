"""The mesh: named axes with sizes, `dp=2,tp=4`, the first axis slowest (ranks are row-major)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from shardc.errors import MeshError
from shardc.runtime.mesh.orders import FOLDED, in_order, order_of


@dataclass(frozen=True)
class Mesh:
    """Named axes and their sizes, in order: `Mesh((("dp", 2), ("tp", 4)))`, or `Mesh.parse("dp=2,tp=4")`."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for name, size in self.axes:
            if not name.isidentifier():
                raise MeshError(f"mesh axis {name!r} is not a name; write axes like 'dp=2,tp=4'")
            if size < 1:
                raise MeshError(f"mesh axis {name!r} has size {size}; sizes are 1 or more")
        if len(set(self.names)) != len(self.axes):
            raise MeshError(f"mesh {self} names an axis twice; every axis needs its own name")

    @staticmethod
    def parse(text: str | Mesh) -> Mesh:
        """Read `"dp=2,tp=4"`; a `Mesh` passes through. Raises MeshError with the piece that cannot be read."""
        if isinstance(text, Mesh):
            return text
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MeshError(f"cannot read {text!r} as a mesh; write axes like 'dp=2,tp=4'")
        axes: list[tuple[str, int]] = []
        for piece in text.split(","):
            name, equals, size = piece.strip().partition("=")
            if not equals or not size.strip().isdigit():
                raise MeshError(f"cannot read {piece.strip()!r} in mesh {text!r}; write axes like 'dp=2,tp=4'")
            axes.append((name.strip(), int(size)))
        return Mesh(tuple(axes))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The sizes of axes, under the names that they have in layouts: with the order in which they deal out a dim."""
        return {**self.sizes, **{in_order(name, FOLDED): size for name, size in self.axes}}

    @cached_property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(size for _, size in self.axes)

    def ways(self, axes: tuple[str, ...]) -> int:
        """Into how many parts `axes` together split a dim."""
        sizes, ways = self.ranks, 1
        for axis in axes:
            ways *= sizes[axis]
        return ways

    def chunk(self, size: int, axes: tuple[str, ...]) -> int:
        """Elements that a rank holds of a dim of `size` split over `axes`, major to minor: each axis deals out equal
        chunks, the last of which may be padded."""
        sizes = self.ranks
        for axis in axes:
            size = -(-size // sizes[axis])
        return size

    def splits(self, size: int, axes: tuple[str, ...]) -> bool:
        """Whether `axes` may split a dim of `size`: evenly, or with padding where there is something for every rank.
        Only the minor-most axis may deal it out folded, in pieces of equal size."""
        if any(order_of(axis) == FOLDED for axis in axes):
            major, last = axes[:-1], axes[-1]
            outer = self.ways(major)
            plain = all(order_of(axis) != FOLDED for axis in major)
            return plain and size % outer == 0 and self.ranks[last] > 1 and size // outer % (2 * self.ranks[last]) == 0
        return size == 0 or size >= self.ways(axes)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)
