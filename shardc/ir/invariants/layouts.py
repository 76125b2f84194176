"""What holds of the program with layouts, from reshard on."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from shardc.ir.facts import FACTS, Lowered, laid, lowered
from shardc.ir.invariants.conversions import conversion_of, misplaced, missized
from shardc.ir.invariants.invariant import Broken, Checked, Invariant, invariant, of_another_stage, quoted
from shardc.ir.layout import Atom, Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Role, value_of
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import wait
from shardc.runtime.collectives.reductions import REDUCTIONS
from shardc.runtime.kernels import indexing
from shardc.runtime.mesh.orders import axis_of

aten = torch.ops.aten
_REGROUPS = frozenset({
    aten.view.default, aten.unsqueeze.default, aten.alias.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
})  # fmt: skip
_VIEWS = _REGROUPS | {aten.permute.default, aten.expand.default}
_AS_ITS_OPERAND = (wait, indexing.fill, indexing.rebase, indexing.pad_dummy, indexing.drop_dummy)


@invariant
def facts_are_lowered(checked: Checked) -> Iterator[Broken]:
    """Every node but the output has lowered facts, with layout and dtype, or it has several results."""
    yield from of_another_stage(checked, Lowered)
    for node in checked.nodes:
        facts = node.meta.get(FACTS)
        if isinstance(facts, Lowered) and (facts.layout is None or facts.dtype is None):
            wrong = next((one for one in node.users if one.target not in (operator.getitem, wait)), None)
            if wrong is not None:
                yield Broken(node, f"has no layout or no dtype, and %{wrong.name} reads it as one tensor")


@invariant
def layouts_are_well_formed(checked: Checked) -> Iterator[Broken]:
    """A layout names axes of the mesh, each once; there is something for every rank; and it is partial by one
    reduction at most."""
    for node in checked.nodes:
        layout = None if node.op == "output" else checked.layout(node)
        if layout is not None:
            wrong = checked.once(("form", id(layout)), lambda layout=layout: _malformed(layout, checked.mesh))
            if wrong:
                yield Broken(node, wrong)


def _malformed(layout: Layout, mesh: Mesh) -> str:
    seen = set[str]()
    atoms = [atom for dim in layout.dims for atom in dim]
    for axis in [*(axis_of(axis) for atom in atoms for axis in atom.axes), *(axis for axis, _ in layout.partial)]:
        if axis not in mesh.names:
            return f"{layout}: the mesh {mesh} has no axis {axis!r}"
        if axis in seen:
            return f"{layout} uses axis {axis!r} twice"
        seen.add(axis)
    reductions = {op for _, op in layout.partial}
    if len(reductions) > 1 or not reductions <= REDUCTIONS.keys():
        return f"{layout} is partial by {' and '.join(sorted(reductions))}"
    small = [atom for atom in atoms if not mesh.splits(atom.size, atom.axes)]
    return f"{layout}: {small[0]} has nothing for some ranks" if small else ""


@invariant
def values_keep_their_shape(checked: Checked) -> Iterator[Broken]:
    """What an operator makes has the shape and the dtype of its value in the captured program, and so has everything
    that is made of it by conversions and views."""
    for node in checked.nodes:
        if node.op == "output" or (layout := checked.layout(node)) is None:
            continue
        facts = lowered(node)
        if facts.base is None:
            yield Broken(node, "is of no value of the captured program")
            continue
        value = value_of(facts.base[0])
        value = value[facts.base[1]] if isinstance(value, (tuple, list)) else value
        made = facts.operator is not None or (node.target is operator.getitem and _makes_several(checked, node))
        if made and layout.shape != tuple(value.shape):
            yield Broken(node, f"{layout} is of shape {list(layout.shape)}, its value {list(value.shape)}")
        # a view of another dtype (`view_as_real`) is an operator; a view of several (`expand`) has more elements
        elif facts.dtype is not value.dtype:
            yield Broken(node, f"is {facts.dtype}, its value {value.dtype}")


def _makes_several(checked: Checked, node: fx.Node) -> bool:
    source: Any = node.args[0]
    return lowered(source).operator is not None


@invariant
def every_call_is_known(checked: Checked) -> Iterator[Broken]:
    """A call is an operator with its strategy, one of several results, a conversion, a view, a wait, or sees to
    padding."""
    for node in checked.calls:
        if lowered(node).operator is not None or isinstance(node.target, Bucket) or node.target in _AS_ITS_OPERAND:
            continue
        if node.target is operator.getitem or node.target in _VIEWS or conversion_of(node) is not None:
            continue
        yield Broken(node, "has no strategy, and is neither a conversion nor a view")


@invariant
def conversions_do_what_they_say(checked: Checked) -> Iterator[Broken]:
    """The layout after a conversion is the layout before it with that collective applied, globally and to the rank's
    part."""
    for node in checked.calls:
        conversion = conversion_of(node)
        if conversion is None:
            continue
        before, after = laid(conversion.operand), laid(node)
        # where their values differ, a border (`retile`) stood between the two, and they have other atoms
        check = misplaced if lowered(node).base == lowered(conversion.operand).base else missized
        told = tuple(sorted((name, str(value)) for name, value in conversion.told.items()))
        key = check, conversion.collective, told, id(before), id(after)
        wrong = checked.once(key, lambda c=conversion, b=before, a=after, f=check: f(c, b, a, checked.mesh))
        if wrong:
            yield Broken(node, wrong)


@invariant
def views_lie_as_their_operand(checked: Checked) -> Iterator[Broken]:
    """A view has the atoms of what it views, split by the same axes, in the order that the view gives them; so has
    what only awaits a value or sees to its padding."""
    for node in checked.calls:
        if lowered(node).operator is not None or (after := checked.layout(node)) is None:
            continue
        if node.target in _VIEWS or node.target in _AS_ITS_OPERAND:
            operand = checked.operands[node][0]
            before = checked.layout(operand)
            if before is None or after.partial != before.partial or not _same_atoms(checked, node, before, after):
                yield Broken(node, f"lies as {after}, its operand %{operand.name} as {before}")


def _same_atoms(checked: Checked, node: fx.Node, before: Layout, after: Layout) -> bool:
    if node.target in _REGROUPS:
        return before is after or checked.lies_as(_flat(before), _flat(after))
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return checked.lies_as(Layout(tuple(before.dims[dim] for dim in order)), Layout(after.dims))
    if node.target is aten.expand.default:
        added = len(after.dims) - len(before.dims)
        one, other = checked.simple(before), checked.simple(after)
        pairs = zip(one.dims, other.dims[added:], strict=True)
        return all(dim == wider or dim == (Atom(1),) for dim, wider in pairs)
    return checked.lies_as(before, after)


def _flat(layout: Layout) -> Layout:
    """All atoms of a layout as one dim."""
    return Layout((tuple(atom for dim in layout.dims for atom in dim) or (Atom(1),),))


@invariant
def partial_values_are_summed(checked: Checked) -> Iterator[Broken]:
    """Partial values are read by operators that are linear in them only, by views, and by conversions."""
    for node, chosen in checked.operators:
        places: dict[tuple[str, str], set[int]] = {}
        for place, operand in enumerate(checked.operands[node]):
            for partial in laid(operand).partial:
                places.setdefault(partial, set()).add(place)
        for (axis, op), operands in places.items():
            if op != "sum" or not chosen.sums(axis, frozenset(operands)):
                read = quoted(checked.operands[node][place] for place in sorted(operands))
                yield Broken(node, f"reads {read}, which is partial by {op} over {axis}, and is not linear in it")


@invariant
def operands_lie_as_demanded(checked: Checked) -> Iterator[Broken]:
    """Every operand of an operator lies as its strategy demands. A view reads the same elements in the same order
    however they are grouped into dims."""
    for node, chosen in checked.operators:
        wanted = checked.once(("demanded", chosen.alike), lambda c=chosen: c.operand_layouts(checked.mesh))
        operands = checked.operands[node]
        if len(wanted) != len(operands):
            yield Broken(node, f"has {len(operands)} operands, its strategy {len(wanted)}")
            continue
        for operand, demanded in zip(operands, wanted, strict=True):
            lies = laid(operand)
            regrouped = node.target in _REGROUPS and lies.partial == demanded.partial
            same = checked.lies_as(_flat(lies), _flat(demanded)) if regrouped else checked.lies_as(lies, demanded)
            if not same:
                yield Broken(node, f"needs %{operand.name} as {demanded}, which lies as {lies}")


@invariant
def results_lie_as_made(checked: Checked) -> Iterator[Broken]:
    """Every result of an operator lies as its strategy makes it."""
    for node in checked.nodes:
        if node.op == "output" or (layout := checked.layout(node)) is None:
            continue
        source: Any = node.args[0] if node.target is operator.getitem else node
        chosen, base = lowered(source).operator, lowered(node).base
        if chosen is None or base is None:
            continue
        made = checked.once(("made", chosen.alike), lambda c=chosen: c.result_layouts(checked.mesh))
        index: Any = node.args[1] if source is not node else base[1]
        if index not in made or not checked.lies_as(layout, made[index]):
            yield Broken(node, f"lies as {layout}, its strategy makes {made.get(index, 'nothing')}")


@invariant
def outputs_are_complete(checked: Checked) -> Iterator[Broken]:
    """No output is partial, but for the gradients that an epilogue reduces."""
    for port, node in checked.outputs:
        if laid(node).partial and port.name not in checked.program.deferred:
            yield Broken(node, f"is the {port.role.value} {port.name or port.index}, and lies as {laid(node)}")


@invariant
def gradients_lie_as_parameters(checked: Checked) -> Iterator[Broken]:
    """A gradient lies as its parameter or input, the new value of a buffer as the buffer. What an epilogue reduces is
    checked where it is whole."""
    plain = {port.name for port, _ in checked.inputs if port.role in (Role.INPUT, Role.CONSTANT)}
    for port, node in checked.outputs:
        written = port.role is Role.MUTATION and port.name in plain  # a tensor of the user's, which is whole
        ends = port.name in checked.by_name and port.name not in checked.program.deferred
        if port.role is not Role.OUTPUT and not written and ends:
            stored = checked.by_name[port.name]
            if not checked.lies_as(laid(node), laid(stored)):
                yield Broken(node, f"lies as {laid(node)}, %{stored.name} as {laid(stored)}")


@invariant
def backward_finds_what_it_reads(checked: Checked) -> Iterator[Broken]:
    """Backward reads what it makes, tangents, and what forward leaves for it; under a memory budget that is marked as
    kept, or is an input."""
    run = checked.forward_and_backward
    found = {*run.saved, *run.tangents, *run.backward}
    for node in run.backward:
        lost = [operand for operand in run.operands[node] if operand not in found]
        if lost:
            yield Broken(node, f"is of backward, and reads {quoted(lost)}, which forward does not leave")
    left = [node for node in checked.nodes if node.op != "output" and lowered(node).kept]
    if left:
        free = {*left, *run.given, *run.outputs}
        for node in run.saved:
            if _stored(node) not in free:
                yield Broken(node, "is read in backward, and is not kept for it")


def _stored(node: fx.Node) -> fx.Node:
    """What a view views."""
    while lowered(node).operator is None and isinstance(node.target, OpOverload):
        node = node.args[0]  # type: ignore[assignment]
    return node


LAYOUTS: tuple[Invariant, ...] = (
    layouts_are_well_formed, every_call_is_known, values_keep_their_shape, conversions_do_what_they_say,
    views_lie_as_their_operand, outputs_are_complete, gradients_lie_as_parameters, partial_values_are_summed,
    results_lie_as_made, operands_lie_as_demanded, backward_finds_what_it_reads,
)  # fmt: skip
