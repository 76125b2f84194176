"""Constraints: what the user demands of the layouts of values, and how these demands spread to other values.

constraints={"up.weight": ("tp", None)}      tp splits dim 0 of the parameter, nothing splits dim 1
constraints={"up.weight": "f32[256@tp, 64]"} the same, as plans print it
y = shardc.constrain(y, "dp,-")              dp splits dim 0 of this value
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardc.errors import ConstraintError, InfeasibleError, LayoutError
from shardc.ir.constrain import Dim, Spec, parse, printed_layout, serialise, spec_text
from shardc.ir.layout import Layout, is_folded, unfoldable
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, tensor_of, where
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Accepts
from shardc.rules.factors.atoms import Ref
from shardc.rules.factors.factored import Factored, Key, Value
from shardc.runtime.mesh.orders import axis_of
from shardc.runtime.mesh.parameters import binding

Axes = tuple[str, ...]


class ParameterDemand(NamedTuple):
    """A demand on a parameter: the axes of every dim (None: open), `label`, which says who demands them, and the
    `layout`, if that was written as plans print it."""

    port: Port
    dims: tuple[Dim, ...]
    label: str
    layout: Layout | None = None


@dataclass(frozen=True)
class Constraint:
    """One demand on one value: the axes of every dim (None: open), `label`, which says where the user made it, and the
    `layout`, if that was written as plans print it: then it also says which piece of a dim the axes split."""

    key: Key
    value: Value
    dims: tuple[Dim, ...]
    label: str
    layout: Layout | None = None

    @property
    def text(self) -> str:
        """The demand as a person writes it."""
        return spec_text(self.dims) if self.layout is None else str(self.layout)


@dataclass
class Spread:
    """Constraints after propagation: per base value and leaf, the axes, and whether the user fixed them. `conflicts`
    are sentences that the plan prints."""

    axes: dict[Key, list[Axes]]
    fixed: dict[Key, list[bool]]
    conflicts: list[str] = field(default_factory=list[str])

    def accepts(self) -> dict[Key, Accepts]:
        """Which layouts the solver may choose: those with the leaves that the user fixed."""

        def fixed_only(axes: list[Axes], fixed: list[bool]) -> Accepts:
            return lambda s: not s.partial and all(not f or h == a for h, a, f in zip(s.axes, axes, fixed, strict=True))

        return {key: fixed_only(axes, self.fixed[key]) for key, axes in self.axes.items() if any(self.fixed[key])}

    def wishes(self) -> dict[Key, tuple[Accepts, ...]]:
        """Which layouts every value should have, best first: all leaves as propagated; then, for a producer that
        cannot make that (a random mask is drawn whole), leaves as propagated or whole. `accepts` has what the user
        fixed."""

        def like(axes: list[Axes], or_whole: bool) -> Accepts:
            def test(splits: Splits) -> bool:
                pending = {axis for axis, _ in splits.partial}
                # an axis with partial sums splits the value later, where the sums are reduced
                goal = [tuple(a for a in leaf_axes if axis_of(a) not in pending) for leaf_axes in axes]
                pairs = zip(splits.axes, goal, strict=True)
                return all(have == want or (or_whole and not have) for have, want in pairs)

            return test

        return {key: (like(axes, False), like(axes, True)) for key, axes in self.axes.items()}


def collect(factored: Factored, mesh: Mesh, demands: Sequence[ParameterDemand]) -> list[Constraint]:
    """The user's constraints: `demands` on parameters, and every `constrain` in the code.

    Raises LayoutError for a constraint with another number of dims, an unknown axis or one used twice; InfeasibleError
    for a dim that is too small, and for constraints that contradict each other.
    """
    program = factored.program
    nodes = {port: node for port, node in zip(program.inputs, program.placeholders, strict=True)}
    for one in demands:
        if any(is_folded(axes or ()) for axes in one.dims):
            raise InfeasibleError(
                f"{one.label}: a parameter is stored as a DTensor, whose shards are blocks; it cannot be folded"
            )
    constraints = [
        Constraint((nodes[one.port], 0), factored.values[nodes[one.port]], one.dims, one.label, one.layout)
        for one in demands
    ]
    for op in factored.ops:
        if op.node.target is torch.ops.shardc.constrain.default:
            text, made = str(op.node.args[1]), op.results[0]
            label = f"constrain(..., {text}) at {where(op.node)}"
            constraints.append(Constraint(made.key, made.value, parse(text), label, printed_layout(text)))
    for constraint in constraints:
        check_constraint(constraint, mesh, tuple(int(n) for n in tensor_of(constraint.key).shape))
    _refuse_contradictions(constraints, mesh)
    _refuse_other_pieces(factored, constraints, mesh)
    return constraints


def check_constraint(constraint: Constraint, mesh: Mesh, shape: tuple[int, ...]) -> None:
    """Raise LayoutError or InfeasibleError for a constraint that a tensor of `shape` cannot fulfil on the mesh."""
    if len(constraint.dims) != len(shape):
        raise LayoutError(
            f"{constraint.label}: {len(constraint.dims)} entr{'y' if len(constraint.dims) == 1 else 'ies'} "
            f"for a tensor of shape {shape}; give one per dim"
        )
    if constraint.layout is not None and constraint.layout.shape != shape:
        raise LayoutError(
            f"{constraint.label}: {constraint.layout} is a layout of shape {constraint.layout.shape}; the value has "
            f"shape {shape}"
        )
    seen: dict[str, int] = {}
    for dim, axes in enumerate(constraint.dims):
        for axis in map(axis_of, axes or ()):
            if axis not in mesh.names:
                raise LayoutError(
                    f"{constraint.label}: mesh {mesh} has no axis {axis!r}; it has {', '.join(mesh.names)}"
                )
            if axis in seen:
                raise LayoutError(
                    f"{constraint.label}: axis {axis!r} splits dim {seen[axis]} and dim {dim}; it can split one"
                )
            seen[axis] = dim
        axes = tuple([axis for axis in axes or () if mesh.ranks[axis] > 1])
        if is_folded(axes) and not mesh.splits(shape[dim], axes):
            raise InfeasibleError(f"{constraint.label}: dim {dim}: {unfoldable(shape[dim], axes, mesh)}")
        if axes and not mesh.splits(shape[dim], axes):
            raise InfeasibleError(
                f"{constraint.label}: dim {dim} has {shape[dim]} elements, fewer than the {mesh.ways(axes)} ranks of "
                f"{'x'.join(axes)}; choose another dim or another mesh"
            )


def _refuse_contradictions(constraints: list[Constraint], mesh: Mesh) -> None:
    if len({c.key for c in constraints}) == len(constraints):
        return  # no value has two
    from shardc.planning.minimal_conflict import LayoutRequest, minimal_conflict  # z3 takes a while to import

    names = {c.key: f"{c.key[0].name}.{c.key[1]}" for c in constraints}
    shapes = {names[c.key]: tuple(int(n) for n in tensor_of(c.key).shape) for c in constraints}
    requests = [LayoutRequest(c.label, names[c.key], c.dims) for c in constraints]
    used = {axis: mesh.ranks[axis] for one in requests for dim in one.dims for axis in dim or ()}
    core = minimal_conflict(shapes, {**mesh.sizes, **used}, requests)
    if core:
        raise _contradictory((request.label, spec_text(request.dims)) for request in core)


def _refuse_other_pieces(factored: Factored, constraints: list[Constraint], mesh: Mesh) -> None:
    """Refuse two constraints that split a dim by the same axes, but other pieces of it."""
    before: dict[tuple[Key, int], tuple[Axes, Constraint]] = {}
    for constraint in sorted(constraints, key=lambda one: one.layout is None):
        for leaf, axes in demanded_leaves(factored, mesh, constraint):
            first, other = before.setdefault((constraint.key, leaf), (axes, constraint))
            if first != axes:
                raise _contradictory((one.label, one.text) for one in (other, constraint))


def _contradictory(demands: Iterable[tuple[str, str]]) -> InfeasibleError:
    lines = "\n".join(f"  - {label}: {text}" for label, text in demands)
    return InfeasibleError(f"these constraints contradict each other; drop or change any one of them:\n{lines}")


def demanded_leaves(factored: Factored, mesh: Mesh, constraint: Constraint) -> Iterator[tuple[int, Axes]]:
    """The leaves of its value that a constraint fixes, with their axes. Raises InfeasibleError for a leaf that is too
    small."""
    position = {ref: i for i, ref in enumerate(factored.leaves(factored.base[constraint.key]))}
    for index, (dim, axes) in enumerate(zip(constraint.value.dims, constraint.dims, strict=True)):
        if axes is not None:
            for leaves, leaf_axes in _pieces(factored, mesh, factored.atoms.leaves(dim), axes, index, constraint):
                for ref, dealt in zip(leaves, _deal(factored, mesh, leaves, leaf_axes, constraint), strict=True):
                    yield position[ref], dealt


def _pieces(
    factored: Factored, mesh: Mesh, leaves: list[Ref], axes: Axes, dim: int, constraint: Constraint
) -> list[tuple[list[Ref], Axes]]:
    """The pieces of a dim that a constraint tells apart, as atoms, with the axes of each: all of it in one, but for a
    printed layout. Raises InfeasibleError where the atoms are larger than such a piece."""
    if constraint.layout is None:
        return [(leaves, axes)]
    printed, pieces, left = constraint.layout.simplify(mesh).dims[dim], list[tuple[list[Ref], Axes]](), list(leaves)
    for atom in printed:
        piece, size = list[Ref](), 1
        while left and size * factored.atoms.size(left[0]) <= atom.size:
            size *= factored.atoms.size(left[0])
            piece.append(left.pop(0))
        if size != atom.size:
            used, wanted = (" x ".join(map(str, sizes)) for sizes in (
                [factored.atoms.size(ref) for ref in leaves], [one.size for one in printed]))  # fmt: skip
            raise InfeasibleError(
                f"{constraint.label}: {constraint.layout} cuts dim {dim} into {wanted}, and the model uses it as "
                f"{used}; split the pieces that the model uses"
            )
        pieces.append((piece, atom.axes))
    return pieces


def _deal(factored: Factored, mesh: Mesh, leaves: list[Ref], axes: Axes, constraint: Constraint) -> list[Axes]:
    """The axes of every atom of a dim. Axes go to atoms from the major one on; an atom takes axes until each rank has
    one element of it."""
    active = [a for a in axes if mesh.ranks[a] > 1]
    dealt: list[Axes] = [() for _ in leaves]
    atom = 0
    for axis in active:
        while atom < len(leaves) - 1 and factored.atoms.size(leaves[atom]) == mesh.ways(dealt[atom]):
            atom += 1
        size = factored.atoms.size(leaves[atom])
        if is_folded((axis,)) and not mesh.splits(size, (*dealt[atom], axis)):
            raise InfeasibleError(
                f"{constraint.label}: the model uses this dim as {_factors(factored, leaves)}, and of its piece of "
                f"{size}, {unfoldable(size, (*dealt[atom], axis), mesh)}"
            )
        if not mesh.splits(size, (*dealt[atom], axis)):
            raise InfeasibleError(
                f"{constraint.label}: the model uses this dim as {_factors(factored, leaves)}, and its piece of "
                f"{size} has fewer elements than axis {axis!r} has ranks ({mesh.ranks[axis]}); "
                "use a smaller axis, or split another dim"
            )
        dealt[atom] += (axis,)
    return dealt


def _factors(factored: Factored, leaves: list[Ref]) -> str:
    return " x ".join(str(factored.atoms.size(ref)) for ref in leaves)


def parameter_demands(
    program: Program, model: nn.Module, constraints: Mapping[str, Spec], mesh: Mesh
) -> tuple[ParameterDemand, ...]:
    """The demands of `constraints` on parameters, by any of their names, each once; and for every parameter that is a
    DTensor, its stored layout. Raises ConstraintError for a pattern that matches nothing, or a spec that cannot be
    read."""
    specs = {pattern: parse(_text(pattern, spec)) for pattern, spec in constraints.items()}
    layouts = {pattern: printed_layout(_text(pattern, spec)) for pattern, spec in constraints.items()}
    paths = [path for path, _ in model.named_modules() if path]
    ports = [port for port in program.inputs if port.role is Role.PARAMETER]
    home = {port.name: port for port in ports}
    aliases = {name: home[first] for name, first in program.tied.items() if first in home}
    named = _match_parameters([*ports, *(Port(Role.PARAMETER, name) for name in aliases)], specs, layouts, paths)
    unique = {(aliases.get(one.port.name, one.port), one.dims, one.layout): one.label for one in reversed(named)}
    once = [ParameterDemand(port, dims, label, layout) for (port, dims, layout), label in reversed(unique.items())]
    return (*once, *_stored(model, ports, mesh, training=any(port.role is Role.GRADIENT for port in program.outputs)))


def module_constraints(constraints: Mapping[str, Spec], model: nn.Module) -> dict[str, Spec]:
    """The constraints whose pattern names a module: they hold for its output."""
    paths = [path for path, _ in model.named_modules() if path]
    return {pattern: spec for pattern, spec in constraints.items() if any(fnmatchcase(path, pattern) for path in paths)}


def _text(pattern: str, spec: Spec) -> str:
    try:
        return serialise(spec)
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"constraints[{pattern!r}]: cannot read {spec!r}: {error}") from error
    except LayoutError as error:
        raise LayoutError(f"constraints[{pattern!r}]: {error}") from error


def _stored(model: nn.Module, ports: list[Port], mesh: Mesh, training: bool) -> list[ParameterDemand]:
    """A parameter that is a DTensor keeps the layout in which it is stored, unless this program may choose it."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    demands: list[ParameterDemand] = []
    for port in ports:
        tensor = tensors[port.name]
        if isinstance(tensor, DTensor) and binding(model, port.name, training):
            layout = Layout.from_dtensor(tensor.placements, tensor.shape, mesh)
            dims = tuple(tuple(axis for atom in dim for axis in atom.axes) for dim in layout.dims)
            demands.append(ParameterDemand(port, dims, f"the stored layout of {port.name}"))
    return demands


def _match_parameters(
    ports: Sequence[Port],
    constraints: Mapping[str, tuple[Dim, ...]],
    layouts: Mapping[str, Layout | None],
    module_paths: Sequence[str],
) -> list[ParameterDemand]:
    """Which parameters each pattern names. Raises ConstraintError, with near names, for one that matches nothing."""
    demands: list[ParameterDemand] = []
    for pattern, dims in constraints.items():
        matched = [port for port in ports if fnmatchcase(port.name, pattern)]
        if not matched and not any(fnmatchcase(path, pattern) for path in module_paths):
            names = [port.name for port in ports] + list(module_paths)
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ConstraintError(
                f"constraint {pattern!r} matches no parameter and no module; nearest: {', '.join(near)}"
            )
        demands += [
            ParameterDemand(port, dims, f"constraints[{pattern!r}] on {port.name}", layouts[pattern])
            for port in matched
        ]
    return demands
