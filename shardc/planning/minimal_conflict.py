"""Why no layout is legal: a minimal set of requests that contradict each other, found by z3.

    w: (tp, -)  and  w: (-, tp)     contradict each other: an axis splits one dim of a value

The model has layouts and no costs. Tied values form one group and share their split. Per group, dim `d` and axis `a`:

* `split[d, a]`: axis `a` splits dim `d`; an axis splits at most one dim of a value;
* `major[d, a, b]`: where both split `d`, `a` stands before `b`;
* the axes that split `d` must divide its size or have no more ranks than it has elements, for every member of the
  group. What holds for a set of axes holds for its subsets, so it suffices to forbid the minimal bad sets.

A request fixes some dims of a value: `(a, b)` says that exactly `a` and `b` split it, `a` major; `()` that it stays
whole; None leaves it open. Each request is one assumption literal. z3's unsatisfiable core is then thinned by
deletion, so that removing any one request of the answer makes the rest feasible.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import z3

from shardc.errors import ConstraintError
from shardc.runtime.mesh.orders import axis_of


@dataclass(frozen=True)
class LayoutRequest:
    """One request for the layout of one value; `label` says it in the user's words."""

    label: str
    value: str
    dims: tuple[tuple[str, ...] | None, ...]


def minimal_conflict(
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mapping[str, int],
    requests: Sequence[LayoutRequest],
    ties: Sequence[tuple[str, str]] = (),
) -> list[LayoutRequest] | None:
    """A minimal set of the requests that cannot be met together, in their order; None if all can.

    `shapes` are those of the values, `mesh` the sizes of its axes (also as they are written where they fold a
    dim), `ties` pairs of values that share their split.
    Raises ConstraintError for a request or a tie that names no value or no axis, or has another number of dims.
    """
    _check_names(shapes, mesh, requests, ties)
    model = _Legality(shapes, mesh, ties)
    literals = [model.add(request, i) for i, request in enumerate(requests)]
    core = model.conflict(literals, list(range(len(requests))))
    if core is None:
        return None
    for i in list(core):
        smaller = model.conflict(literals, [j for j in core if j != i]) if i in core else None
        if smaller is not None:
            core = smaller
    return [requests[i] for i in core]


class _Legality:
    """The solver with the rules of layouts. A group of tied values is added when a request names one of them."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], mesh: Mapping[str, int], ties: Sequence[tuple[str, str]]
    ) -> None:
        self.mesh = dict(mesh)
        self.solver = z3.Solver()
        self.members: dict[str, set[str]] = {value: {value} for value in shapes}
        for a, b in ties:
            if self.members[a] is not self.members[b]:
                self.members[a] |= self.members[b]
                for value in self.members[b]:
                    self.members[value] = self.members[a]
        self.shapes = shapes
        self.known: set[str] = set()

    def split(self, group: str, dim: int, axis: str) -> z3.BoolRef:
        return z3.Bool(f"split {group} {dim} {axis}")

    def major(self, group: str, dim: int, first: str, second: str) -> z3.BoolRef:
        """`first` before `second`, as one boolean per unordered pair."""
        a, b = sorted((first, second))
        boolean = z3.Bool(f"major {group} {dim} {a} {b}")
        return boolean if first == a else z3.Not(boolean)  # pyright: ignore[reportReturnType]

    def add(self, request: LayoutRequest, number: int) -> z3.BoolRef:
        """The literal that stands for the request."""
        group = min(self.members[request.value])
        self._add_group(group)
        literal = z3.Bool(f"request {number}")
        for dim, axes in enumerate(request.dims):
            if axes is None:
                continue
            facts = [self.split(group, dim, a) if a in axes else z3.Not(self.split(group, dim, a)) for a in self.mesh]
            facts += [self.major(group, dim, a, b) for a, b in itertools.combinations(axes, 2)]
            self.solver.add(*(z3.Implies(literal, fact) for fact in facts))
        return literal

    def _add_group(self, group: str) -> None:
        if group in self.known:
            return
        self.known.add(group)
        rank = len(self.shapes[group])
        for a, b in itertools.combinations(self.mesh, 2):
            if axis_of(a) == axis_of(b):  # one axis, in two orders
                for d, e in itertools.product(range(rank), repeat=2):
                    self.solver.add(z3.Or(z3.Not(self.split(group, d, a)), z3.Not(self.split(group, e, b))))
        for axis in self.mesh:
            for d, e in itertools.combinations(range(rank), 2):
                self.solver.add(z3.Or(z3.Not(self.split(group, d, axis)), z3.Not(self.split(group, e, axis))))
        for dim in range(rank):
            sizes = {self.shapes[member][dim] for member in self.members[group]}
            for axes in _bad_sets(self.mesh, sizes):
                self.solver.add(z3.Or(*(z3.Not(self.split(group, dim, axis)) for axis in axes)))

    def conflict(self, literals: Sequence[z3.BoolRef], subset: Sequence[int]) -> list[int] | None:
        """The requests of `subset` that are in z3's core; None if all of them are feasible together."""
        outcome = self.solver.check(*(literals[i] for i in subset))
        if outcome == z3.sat:
            return None
        if outcome != z3.unsat:
            raise RuntimeError(f"z3 gave up: {self.solver.reason_unknown()}")
        names = {str(literal) for literal in self.solver.unsat_core()}
        return [i for i in subset if str(literals[i]) in names]


def _bad_sets(mesh: Mapping[str, int], sizes: set[int]) -> list[tuple[str, ...]]:
    """The minimal sets of axes with more ranks than one of the sizes has elements."""
    bad: list[tuple[str, ...]] = []
    for count in range(1, len(mesh) + 1):
        for axes in itertools.combinations(mesh, count):
            product = math.prod(mesh[axis] for axis in axes)
            if any(size % product and size < product for size in sizes) and not any(set(b) <= set(axes) for b in bad):
                bad.append(axes)
    return bad


def _check_names(
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mapping[str, int],
    requests: Sequence[LayoutRequest],
    ties: Sequence[tuple[str, str]],
) -> None:
    """Raise ConstraintError for a mistake in one request or tie, which is no conflict of several."""
    for a, b in ties:
        if a not in shapes or b not in shapes:
            raise ConstraintError(f"tie {a!r} = {b!r}: no such value; tie values of the program")
        if len(shapes[a]) != len(shapes[b]):
            raise ConstraintError(f"tie {a!r} = {b!r}: {len(shapes[a])} and {len(shapes[b])} dims cannot share a split")
    for request in requests:
        if request.value not in shapes:
            raise ConstraintError(f"{request.label}: no value is named {request.value!r}; name one of the program")
        rank = len(shapes[request.value])
        if len(request.dims) != rank:
            raise ConstraintError(
                f"{request.label}: {len(request.dims)} dims given, {request.value!r} has {rank}; give one entry per dim"
            )
        for axes in request.dims:
            unknown = sorted(set(axes or ()) - set(mesh))
            if unknown:
                raise ConstraintError(f"{request.label}: no mesh axis {unknown[0]!r}; there are {', '.join(mesh)}")
            if axes is not None and len(set(axes)) < len(axes):
                raise ConstraintError(f"{request.label}: an axis splits a dim once, got {axes}; name each axis once")
