"""Propagate: what the user annotated spreads through the factors of every operator, until nothing changes.

GSPMD (Xu et al. 2021, §3.5) with Shardy's factors. Order: constraints in the order in which they were given;
elementwise operators before all others; a factor takes the longest axes that its operands and results agree on as
prefixes. Closed dims never change.

    %x = input         f32[32@dp, 512]     # annotated
    %w = parameter     f32[512, 64@tp]     # annotated
    %h = mm(%x, %w)    f32[32, 64]         ->   f32[32@dp, 64@tp]
    %y = relu(%h)      f32[32, 64]         ->   f32[32@dp, 64@tp]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from shardc.errors import ConstraintError, InfeasibleError, LayoutError
from shardc.ir.constrain import Dim, parse, spec_text
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, value_of, where
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Accepts
from shardc.rules.factors.atoms import Ref
from shardc.rules.factors.factored import Factored, Key, Op, Value

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Constraint:
    """One demand of the user on one value: the axes of every dim (None: open), and where the user made it."""

    key: Key
    value: Value
    dims: tuple[Dim, ...]
    label: str


@dataclass
class Propagated:
    """Per base value and leaf: the axes, and whether the user fixed them. `conflicts` are told in the plan."""

    axes: dict[Key, list[Axes]]
    fixed: dict[Key, list[bool]]
    conflicts: list[str] = field(default_factory=list[str])

    def accepts(self) -> dict[Key, Accepts]:
        """What the solver may choose: the leaves that the user fixed as they are."""

        def fixed_only(axes: list[Axes], fixed: list[bool]) -> Accepts:
            return lambda s: not s.partial and all(not f or h == a for h, a, f in zip(s.axes, axes, fixed, strict=True))

        return {key: fixed_only(axes, self.fixed[key]) for key, axes in self.axes.items() if any(self.fixed[key])}

    def wishes(self) -> dict[Key, tuple[Accepts, ...]]:
        """How every value should lie: all leaves as propagated; where its producer cannot make that (a random mask is
        drawn whole), leaves as propagated or whole. The user's own demands are in `accepts`."""

        def like(axes: list[Axes], or_whole: bool) -> Accepts:
            def test(splits: Splits) -> bool:
                pending = {axis for axis, _ in splits.partial}
                # an axis that still holds partial sums will split the value where it is reduced
                wanted = [tuple(a for a in held if a not in pending) for held in axes]
                pairs = zip(splits.axes, wanted, strict=True)
                return all(have == want or (or_whole and not have) for have, want in pairs)

            return test

        return {key: (like(axes, False), like(axes, True)) for key, axes in self.axes.items()}


def collect(
    factored: Factored, mesh: Mesh, parameters: Sequence[tuple[Port, tuple[Dim, ...], str]]
) -> list[Constraint]:
    """The user's constraints: `parameters` by name, and every `constrain` in the code. Raises what does not fit."""
    program = factored.program
    nodes = {port: node for port, node in zip(program.inputs, program.placeholders, strict=True)}
    found = [
        Constraint((nodes[port], 0), factored.values[nodes[port]], dims, label) for port, dims, label in parameters
    ]
    for op in factored.ops:
        if op.node.target is torch.ops.shardc.constrain.default:
            label = f"constrain(..., {op.node.args[1]}) at {where(op.node)}"
            found.append(Constraint(op.results[0].key, op.results[0].value, parse(str(op.node.args[1])), label))
    for constraint in found:
        _check(constraint, mesh)
    _refuse_contradictions(found, mesh)
    return found


def _check(constraint: Constraint, mesh: Mesh) -> None:
    shape = tuple(int(n) for n in _tensor(constraint.key).shape)
    if len(constraint.dims) != len(shape):
        raise LayoutError(
            f"{constraint.label}: {len(constraint.dims)} entr{'y' if len(constraint.dims) == 1 else 'ies'} "
            f"for a tensor of shape {shape}; give one per dim"
        )
    seen: dict[str, int] = {}
    for dim, axes in enumerate(constraint.dims):
        for axis in axes or ():
            if axis not in mesh.names:
                raise LayoutError(
                    f"{constraint.label}: mesh {mesh} has no axis {axis!r}; it has {', '.join(mesh.names)}"
                )
            if axis in seen:
                raise LayoutError(
                    f"{constraint.label}: axis {axis!r} splits dim {seen[axis]} and dim {dim}; it can split one"
                )
            seen[axis] = dim
        if axes and not mesh.splits(shape[dim], axes):
            raise InfeasibleError(
                f"{constraint.label}: dim {dim} has {shape[dim]} elements, fewer than the {mesh.ways(axes)} ranks of "
                f"{'x'.join(axes)}; choose another dim or another mesh"
            )


def _tensor(key: Key) -> torch.Tensor:
    value = value_of(key[0])
    return value[key[1]] if isinstance(value, (tuple, list)) else value


def _refuse_contradictions(constraints: list[Constraint], mesh: Mesh) -> None:
    if len({c.key for c in constraints}) == len(constraints):
        return  # no value has two
    from shardc.solver.minimal_conflict import Request, minimal_conflict  # z3 takes a while to import

    names = {c.key: f"{c.key[0].name}.{c.key[1]}" for c in constraints}
    shapes = {names[c.key]: tuple(int(n) for n in _tensor(c.key).shape) for c in constraints}
    requests = [Request(c.label, names[c.key], c.dims) for c in constraints]
    core = minimal_conflict(shapes, mesh.sizes, requests)
    if core:
        lines = "\n".join(f"  - {request.label}: {spec_text(request.dims)}" for request in core)
        raise InfeasibleError(f"these constraints contradict each other; drop or change any one of them:\n{lines}")


def propagate(factored: Factored, mesh: Mesh, constraints: list[Constraint]) -> Propagated:
    """Seed the leaves with the constraints, then let factors carry them to a fixed point."""
    state = Propagated(
        {key: [()] * len(value.form.base) for key, value in factored.base.items()},
        {key: [False] * len(value.form.base) for key, value in factored.base.items()},
    )
    origin: dict[tuple[Key, int], str] = {}
    for constraint in constraints:
        _seed(factored, mesh, constraint, state, origin)
    if not constraints:
        return state
    places = {op.node: _places(op) for op in factored.ops}
    elementwise = [op for op in factored.ops if len({op.rule.results[0], *op.rule.operands}) == 1]
    for ops in (elementwise, factored.ops):
        while any([_spread(mesh, op, places[op.node], state, origin) for op in (*ops, *reversed(ops))]):
            pass
    return state


def _seed(
    factored: Factored, mesh: Mesh, constraint: Constraint, state: Propagated, origin: dict[tuple[Key, int], str]
) -> None:
    for leaf, held in demanded_leaves(factored, mesh, constraint):
        state.axes[constraint.key][leaf] = held
        state.fixed[constraint.key][leaf] = True
        origin[constraint.key, leaf] = constraint.label


def demanded_leaves(factored: Factored, mesh: Mesh, constraint: Constraint) -> Iterator[tuple[int, Axes]]:
    """The leaves of its value that a constraint fixes, with their axes. Raises InfeasibleError for one too small."""
    position = {ref: i for i, ref in enumerate(factored.leaves(factored.base[constraint.key]))}
    for dim, axes in zip(constraint.value.dims, constraint.dims, strict=True):
        if axes is not None:
            leaves = factored.atoms.leaves(dim)
            for ref, held in zip(leaves, _deal(factored, mesh, leaves, axes, constraint), strict=True):
                yield position[ref], held


def _deal(factored: Factored, mesh: Mesh, leaves: list[Ref], axes: Axes, constraint: Constraint) -> list[Axes]:
    """Deal a dim's axes to its atoms, major first: an atom takes axes until it is wholly split."""
    active = [a for a in axes if mesh.sizes[a] > 1]
    held: list[Axes] = [() for _ in leaves]
    atom = 0
    for axis in active:
        while atom < len(leaves) - 1 and factored.atoms.size(leaves[atom]) == mesh.ways(held[atom]):
            atom += 1
        size = factored.atoms.size(leaves[atom])
        if not mesh.splits(size, (*held[atom], axis)):
            pieces = " x ".join(str(factored.atoms.size(ref)) for ref in leaves)
            raise InfeasibleError(
                f"{constraint.label}: the model uses this dim as {pieces}, and its piece of {size} has fewer elements "
                f"than axis {axis!r} has ranks ({mesh.sizes[axis]}); use a smaller axis, or split another dim"
            )
        held[atom] += (axis,)
    return held


def _spread(
    mesh: Mesh, op: Op, places: list[list[tuple[Key, int]]], state: Propagated, origin: dict[tuple[Key, int], str]
) -> bool:
    """Let one operator's factors carry axes between its operands and results; True when something changed."""
    changed = False
    for index, factor in enumerate(op.factors):
        if factor.whole:
            continue
        here = places[index]
        if not here:
            continue
        longest = max(here, key=lambda place: len(state.axes[place[0]][place[1]]))
        best = state.axes[longest[0]][longest[1]]
        for key, leaf in here:
            held = state.axes[key][leaf]
            if held and held != best[: len(held)]:
                _report(state, origin, op, (key, leaf), longest)
            elif (
                len(held) < len(best)
                and not state.fixed[key][leaf]
                and _free(state, mesh, key, leaf, best, factor.size)
            ):
                state.axes[key][leaf] = best
                origin.setdefault((key, leaf), origin[longest])
                changed = True
    return changed


def _places(op: Op) -> list[list[tuple[Key, int]]]:
    """Per factor of an operator, the base leaves that carry it."""
    found: list[list[tuple[Key, int]]] = [[] for _ in op.factors]
    for item, carried in zip(op.items, op.kind.carried, strict=True):
        for place, factor in zip(item.value.form.places, carried, strict=True):
            if factor is not None and place is not None:
                found[factor].append((item.value.key, place))
    return found


def _free(state: Propagated, mesh: Mesh, key: Key, leaf: int, axes: Axes, size: int) -> bool:
    others = {a for i, held in enumerate(state.axes[key]) if i != leaf for a in held}
    return not others & set(axes) and mesh.splits(size, axes)


def _report(
    state: Propagated, origin: dict[tuple[Key, int], str], op: Op, one: tuple[Key, int], other: tuple[Key, int]
) -> None:
    labels = sorted({origin.get(one, "?"), origin.get(other, "?")})
    axes = sorted({"x".join(state.axes[key][leaf]) for key, leaf in (one, other)})
    text = f"{op.node.name} ({where(op.node)}) meets {' and '.join(axes)} on one factor; from: {' | '.join(labels)}"
    if text not in state.conflicts:
        state.conflicts.append(text)


def match_parameters(
    ports: Sequence[Port], constraints: dict[str, tuple[Dim, ...]], module_paths: Sequence[str]
) -> list[tuple[Port, tuple[Dim, ...], str]]:
    """Which parameters each pattern names. Raises ConstraintError, with near names, for one that matches nothing."""
    import difflib
    import fnmatch

    found: list[tuple[Port, tuple[Dim, ...], str]] = []
    for pattern, dims in constraints.items():
        matched = [port for port in ports if fnmatch.fnmatchcase(port.name, pattern)]
        if not matched and not any(fnmatch.fnmatchcase(path, pattern) for path in module_paths):
            names = [port.name for port in ports] + list(module_paths)
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ConstraintError(
                f"constraint {pattern!r} matches no parameter and no module; nearest: {', '.join(near)}"
            )
        found += [(port, dims, f"constraints[{pattern!r}] on {port.name}") for port in matched]
    return found
