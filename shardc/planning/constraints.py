"""Constraints: what the user demands of values, by path or by `shardc.constrain`, and how that spread."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardc.errors import ConstraintError, InfeasibleError, LayoutError
from shardc.ir.constrain import Dim, Spec, parse, serialise, spec_text
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, value_of, where
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Accepts
from shardc.rules.factors.atoms import Ref
from shardc.rules.factors.factored import Factored, Key, Value

Axes = tuple[str, ...]


class ParameterDemand(NamedTuple):
    """The axes of every dim (None: open) that are demanded of a parameter, and by whom."""

    port: Port
    dims: tuple[Dim, ...]
    label: str


@dataclass(frozen=True)
class Constraint:
    """One demand of the user on one value: the axes of every dim (None: open), and where the user made it."""

    key: Key
    value: Value
    dims: tuple[Dim, ...]
    label: str


@dataclass
class Spread:
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


def collect(factored: Factored, mesh: Mesh, demands: Sequence[ParameterDemand]) -> list[Constraint]:
    """The user's constraints: `demands` on parameters, and every `constrain` in the code. Raises what does not fit."""
    program = factored.program
    nodes = {port: node for port, node in zip(program.inputs, program.placeholders, strict=True)}
    found = [Constraint((nodes[port], 0), factored.values[nodes[port]], dims, label) for port, dims, label in demands]
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
    from shardc.planning.minimal_conflict import LayoutRequest, minimal_conflict  # z3 takes a while to import

    names = {c.key: f"{c.key[0].name}.{c.key[1]}" for c in constraints}
    shapes = {names[c.key]: tuple(int(n) for n in _tensor(c.key).shape) for c in constraints}
    requests = [LayoutRequest(c.label, names[c.key], c.dims) for c in constraints]
    core = minimal_conflict(shapes, mesh.sizes, requests)
    if core:
        lines = "\n".join(f"  - {request.label}: {spec_text(request.dims)}" for request in core)
        raise InfeasibleError(f"these constraints contradict each other; drop or change any one of them:\n{lines}")


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


def parameter_demands(
    program: Program, model: nn.Module, constraints: Mapping[str, Spec], mesh: Mesh
) -> tuple[ParameterDemand, ...]:
    """What `constraints` demand of parameters, by any of their names, each demand once; and DTensors stay as they are
    stored. Raises ConstraintError for a pattern that matches nothing, or that cannot be read."""
    specs = {pattern: _spec(pattern, spec) for pattern, spec in constraints.items()}
    paths = [path for path, _ in model.named_modules() if path]
    ports = [port for port in program.inputs if port.role is Role.PARAMETER]
    home = {port.name: port for port in ports}
    aliases = {name: home[first] for name, first in program.tied.items() if first in home}
    named = _match_parameters([*ports, *(Port(Role.PARAMETER, name) for name in aliases)], specs, paths)
    unique = {(aliases.get(port.name, port), dims): label for port, dims, label in reversed(named)}
    once = [ParameterDemand(port, dims, label) for (port, dims), label in reversed(unique.items())]
    return (*once, *_stored(model, ports, mesh))


def module_constraints(constraints: Mapping[str, Spec], model: nn.Module) -> dict[str, Spec]:
    """The constraints that name a module: they are on its output."""
    paths = [path for path, _ in model.named_modules() if path]
    return {pattern: spec for pattern, spec in constraints.items() if any(fnmatchcase(path, pattern) for path in paths)}


def _spec(pattern: str, spec: Spec) -> tuple[Dim, ...]:
    try:
        return parse(serialise(spec))
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"constraints[{pattern!r}]: cannot read {spec!r}: {error}") from error


def _stored(model: nn.Module, ports: list[Port], mesh: Mesh) -> list[ParameterDemand]:
    """Parameters that are DTensors already stay as they are stored."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    demands: list[ParameterDemand] = []
    for port in ports:
        tensor = tensors[port.name]
        if isinstance(tensor, DTensor):
            layout = Layout.from_dtensor(tensor.placements, tensor.shape, mesh)
            dims = tuple(tuple(axis for atom in dim for axis in atom.axes) for dim in layout.dims)
            demands.append(ParameterDemand(port, dims, f"the stored layout of {port.name}"))
    return demands


def _match_parameters(
    ports: Sequence[Port], constraints: dict[str, tuple[Dim, ...]], module_paths: Sequence[str]
) -> list[ParameterDemand]:
    """Which parameters each pattern names. Raises ConstraintError, with near names, for one that matches nothing."""
    found: list[ParameterDemand] = []
    for pattern, dims in constraints.items():
        matched = [port for port in ports if fnmatchcase(port.name, pattern)]
        if not matched and not any(fnmatchcase(path, pattern) for path in module_paths):
            names = [port.name for port in ports] + list(module_paths)
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ConstraintError(
                f"constraint {pattern!r} matches no parameter and no module; nearest: {', '.join(near)}"
            )
        found += [ParameterDemand(port, dims, f"constraints[{pattern!r}] on {port.name}") for port in matched]
    return found
