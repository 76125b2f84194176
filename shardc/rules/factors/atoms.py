"""Atoms: the indivisible pieces into which views cut dims. One walk over the program finds them.

Dims that an operator ties together share a piece of a union-find. Where a view merges or splits dims, their pieces are
split. In the end, every dim of every value is a list of leaves, the atoms.

A `Ref` names a piece of one dim of one base value, by the dim's slot and the path of halves to the piece. A view holds
refs of its base, so it is always known which dims of the base its dims come from.
"""

from __future__ import annotations

from collections.abc import Sequence

Ref = tuple[int, tuple[int, ...]]


class Atoms:
    """Union-find over pieces of dims, each with a size and, once split, a major and a minor half."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._halves: list[tuple[int, int] | None] = []

    def new(self, size: int) -> Ref:
        """A fresh dim of `size` elements."""
        return self._piece(size), ()

    def _piece(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._halves.append(None)
        return len(self._parent) - 1

    def _find(self, piece: int) -> int:
        while self._parent[piece] != piece:
            self._parent[piece] = self._parent[self._parent[piece]]
            piece = self._parent[piece]
        return piece

    def _at(self, ref: Ref) -> int:
        slot, path = ref
        parent = self._parent
        piece = parent[slot]
        if parent[piece] != piece:
            piece = self._find(slot)
        for half in path:
            halves = self._halves[piece]
            assert halves is not None
            piece = parent[halves[half]]
            if parent[piece] != piece:
                piece = self._find(halves[half])
        return piece

    def piece(self, ref: Ref) -> int:
        """The number of the piece that a ref names. Tied dims have the same number."""
        return self._at(ref)

    def size(self, ref: Ref) -> int:
        """Elements of the piece that a ref names."""
        return self._size[self._at(ref)]

    def leaves(self, refs: Sequence[Ref]) -> list[Ref]:
        """The refs, each replaced by the leaves below it."""
        return [leaf for ref in refs for leaf in self._gathered(ref, self._at(ref))]

    def _gathered(self, ref: Ref, piece: int) -> list[Ref]:
        halves = self._halves[piece]
        if halves is None:
            return [ref]
        slot, path = ref
        major, minor = (self._gathered((slot, (*path, half)), self._find(halves[half])) for half in (0, 1))
        return major + minor

    def sizes(self, ref: Ref) -> tuple[int, ...]:
        """The sizes of the leaves below a ref, major to minor."""
        return self._sizes(self._at(ref))

    def _sizes(self, piece: int) -> tuple[int, ...]:
        halves = self._halves[piece]
        if halves is None:
            return (self._size[piece],)
        return self._sizes(self._find(halves[0])) + self._sizes(self._find(halves[1]))

    def split(self, ref: Ref, minor: int) -> None:
        """Split a leaf into (size/minor, minor)."""
        piece = self._at(ref)
        self._halves[piece] = (self._piece(self._size[piece] // minor), self._piece(minor))

    def unify(self, one: Sequence[Ref], other: Sequence[Ref]) -> bool:
        """Make two dims of equal size consist of the same atoms. False if they have no common refinement."""
        if len(one) == len(other) == 1 and self._joined(self._at(one[0]), self._at(other[0])):
            return True
        while True:
            a, b = self.leaves(one)[::-1], self.leaves(other)[::-1]
            for x, y in zip(a, b, strict=False):
                px, py = self._at(x), self._at(y)
                if px == py:
                    continue
                sx, sy = self._size[px], self._size[py]
                if sx == sy:
                    self._parent[py] = px
                    continue
                big, small = (x, sy) if sx > sy else (y, sx)
                if self.size(big) % small:
                    return False
                self.split(big, small)
                break
            else:
                return len(a) == len(b)

    def _joined(self, one: int, other: int) -> bool:
        """Make two pieces one, if neither has to be split any further for that; else False."""
        if one == other:
            return True
        if self._size[one] != self._size[other]:
            return False
        halves, others = self._halves[one], self._halves[other]
        if halves and others:  # minor half first, in the order of `unify`
            if not all(self._joined(self._find(halves[k]), self._find(others[k])) for k in (1, 0)):
                return False
        elif others:
            one, other = other, one
        self._parent[other] = one
        return True

    def regroup(self, refs: Sequence[Ref], shape: Sequence[int]) -> list[list[Ref]] | None:
        """The pieces of a value, as dims of a view with `shape`. None if a dim would cut across a piece."""
        dims: list[list[Ref]] = []
        rest = self.leaves(refs)
        for size in reversed([int(s) for s in shape]):
            dim: list[Ref] = []
            covered = 1
            while covered < size:
                if not rest or size % covered:
                    return None
                ref = rest.pop()
                piece, need = self._at(ref), size // covered
                if self._halves[piece] is None and self._size[piece] > need:
                    if self._size[piece] % need:
                        return None
                    self.split(ref, need)
                if self._halves[piece]:  # a piece that occurs twice may have been split at its first occurrence
                    rest += self._gathered(ref, piece)
                    continue
                dim.append(ref)
                covered *= self._size[piece]
            if covered != size:
                return None
            dims.append(dim[::-1])
        return dims[::-1]
