"""Reshard: write the chosen layouts into a new graph, with a conversion wherever a value is needed in another layout.

    %y = mm(%h, %w2)                             f32[32@dp, 512] +sum@tp
    %z = add(%y, %x)                             f32[32@dp, 512@tp]
becomes
    %y = mm(%h, %w2)                             f32[32@dp, 512] +sum@tp
    %y1 = reduce_scatter(%y, dim=1, axis=tp)     f32[32@dp, 512@tp]
    %z = add(%y1, %x)                            f32[32@dp, 512@tp]

A conversion is made once and shared by all that need the same layout. Views are rebuilt on whatever layout their reader
needs. Under a memory budget, backward shares nothing with forward but what was kept for it:

    %k = shard(%x, dim=0, axis=tp)               f32[8@tp, 512]            kept
    ...
    %x1 = all_gather(%k, dim=0, axis=tp)         f32[8, 512]               in backward
    %h1 = relu(%x1)                              f32[8, 512]               again
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardc.ir.facts import Key, Lowered, Origin, describe, laid, lowered, origin, origin_of
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, call, tensor_of, value_of
from shardc.ir.splits import Splits, Step, apply
from shardc.ir.versions import GraphVersion
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.planning.cost_network import Assignment, CostNetwork, base_demand
from shardc.planning.gradient_sums import takes_sums
from shardc.rules.factors.chosen import Chosen
from shardc.rules.factors.factored import Factored, Form, Kind, Op, Value
from shardc.rules.factors.strategy import Shape, Strategy, demand, make, split_of

aten = torch.ops.aten
Axes = tuple[tuple[str, ...], ...]


@compiler_pass
def reshard(c: Compilation) -> Compilation:
    """Write the layouts of the assignment."""
    network, assignment = c.network, c.assignment
    if c.draft is not None and c.draft.assignment is assignment:
        return replace(c, lowered=c.draft.resharded, titles=c.draft.titles)
    version = GraphVersion(lambda: resharded(network, assignment))
    return replace(c, lowered=version, titles=titles_of(c.program, version.read()))


def titles_of(program: Program, graph: fx.Graph) -> dict[Key, str]:
    """The names of base values: those of parameters, buffers and inputs, else those in the resharded graph."""
    titles: dict[Key, str] = {}
    for node in graph.nodes:
        if node.op != "output" and (base := lowered(node).base) is not None:
            titles.setdefault(base, node.name)
    for port, node in zip(program.inputs, program.placeholders, strict=True):
        titles[node, 0] = port.name or f"{port.role.value} {port.index}"
    return titles


def resharded(network: CostNetwork, assignment: Assignment) -> fx.Graph:
    """The graph with layouts and conversions; every node has `Lowered` facts, every operator its `Chosen` strategy."""
    return _Rewrite(network, assignment).run()


class _Part:
    """What was written of forward and backward together, or of one of them."""

    def __init__(self) -> None:
        self.held: dict[Key, dict[Splits, fx.Node]] = {}  # every layout in which a base value exists so far
        self.origin: dict[Key, Splits] = {}
        self.views: dict[tuple[fx.Node, Splits, Axes], fx.Node] = {}


class _Layouts:
    """What a strategy demands and makes, of every operator of a kind: per operand the layout of its base value and the
    axes of its own atoms, per result the layout."""

    def __init__(self, op: Op, shape: Shape, strategy: Strategy, mesh: Mesh) -> None:
        self.operands: list[tuple[Splits, Axes]] = []
        for index, carried in enumerate(op.kind.carried[: len(op.operands)]):
            split = split_of(shape, strategy, shape.operands[index].carried)
            axes = tuple([() if factor is None else split[factor] for factor in carried])
            self.operands.append((demand(shape, strategy, index, mesh), axes))
        self.results = [make(shape, strategy, index, mesh) for index in range(len(op.results))]


class _Rewrite:
    def __init__(self, network: CostNetwork, assignment: Assignment) -> None:
        self.network = network
        self.factored: Factored = network.factored
        self.mesh = network.mesh
        self.assignment = assignment
        self.graph = fx.Graph()
        self.here = _Part()
        self.forward: _Part | None = None  # while backward is written, what forward made
        self.now: fx.Node | None = None
        self.repeated: set[fx.Node] = set()
        self.made: dict[int, fx.Node | None] = {}
        self.known: dict[tuple[Kind, Strategy], _Layouts] = {}
        self.by_node = {op.node: op for op in self.factored.ops}
        self.places = {op.node: place for place, op in enumerate(self.factored.ops)}
        program = self.factored.program
        self.parameters = {p.name: n for p, n in zip(program.inputs, program.placeholders, strict=True)}
        self.ports: list[tuple[Port, fx.Node | None]] = list(zip(program.outputs, program.results, strict=True))
        self.gradients: dict[Key, list[int]] = {}
        for index, (port, node) in enumerate(self.ports):
            if node is not None and port.role is Role.GRADIENT:
                self.gradients.setdefault(self.factored.values[node].key, []).append(index)

    def run(self) -> fx.Graph:
        ops, forward = self.factored.ops, self.assignment.forward
        if forward is None:
            self._write(ops)
        else:
            self._write([op for op in ops if op.node in forward or op.node.op == "placeholder"])
            self._leave_forward()
            for op in ops:
                if op.node not in forward and op.node.op != "placeholder":
                    self._write([op])
                    self._outputs(index for result in op.results for index in self.gradients.get(result.key, ()))
        self._outputs(range(len(self.ports)))
        self.graph.output(tuple(self.made[index] for index in range(len(self.made))))
        return self.graph

    def _write(self, ops: Iterable[Op]) -> None:
        for op in ops:
            self.now = op.node
            self._operator(op)
            for result in op.results if self.forward is None else ():
                shared = self.assignment.shares.get(result.key)
                origin = self.here.origin.get(result.key)
                if origin is not None and (shared in (None, origin) or self.assignment.kept.get(result.key) == origin):
                    self._keep(result.key)  # else once it was converted for its readers

    def _keep(self, key: Key) -> None:
        """Make sure of what backward finds of a value."""
        kept = self.assignment.kept.get(key)
        if kept is None or self.assignment.strategies[key[0]].again or self.forward is not None:
            return
        here, shared = self.here.held[key], self.assignment.shares.get(key)
        if kept not in here:
            start = self.here.origin[key] if shared is None else shared
            self._walk(key, self.here.origin[key], start)
            self._walk(key, start, kept)
        describe(here[kept], replace(lowered(here[kept]), kept=True))

    def _leave_forward(self) -> None:
        self._outputs(index for index, (port, _) in enumerate(self.ports) if port.role is not Role.GRADIENT)
        for key in self.assignment.kept:
            if key in self.here.held:
                self._keep(key)
        self.forward, self.here = self.here, _Part()

    def _operator(self, op: Op) -> None:
        shape, strategy = self.assignment.shapes[op.node], self.assignment.strategies[op.node]
        if (op.kind, strategy) not in self.known:
            self.known[op.kind, strategy] = _Layouts(op, shape, strategy, self.mesh)
        layouts, old = self.known[op.kind, strategy], op.node
        if old.op == "placeholder":
            new = self.graph.placeholder(old.name)
        else:
            operands, gradient = zip(op.operands, layouts.operands, strict=True), takes_sums(old)
            supply = iter([self._value(operand.node, splits, axes, gradient) for operand, (splits, axes) in operands])
            wanted = {operand.node for operand in op.operands}
            args, kwargs = map_arg((old.args, old.kwargs), lambda n: next(supply) if n in wanted else n)
            new = call(self.graph, old.target, args, kwargs)
        chosen, place = Chosen(op, shape, strategy), self._origin(old)
        several = isinstance(value_of(old), (tuple, list))
        used = [user.args[1] for user in old.users if user.target is operator.getitem] if several else [0]
        if several:
            describe(new, Lowered(place, operator=chosen))
        for result, splits in zip(op.results, layouts.results, strict=True):
            if result.key[1] not in used:
                continue
            node = call(self.graph, operator.getitem, (new, result.key[1])) if several else new
            layout = result.value.form.layout_on(splits.axes, splits.partial)
            dtype = tensor_of(result.key).dtype
            describe(node, Lowered(place, dtype, layout, result.key, None if several else chosen))
            self.here.held[result.key] = {splits: node}
            self.here.origin[result.key] = splits

    def _origin(self, old: fx.Node) -> Origin:
        """Where a node comes from that stands for `old`."""
        place = origin_of(old)
        return place if self.forward is None else origin(place.module, place.source, "backward")

    def _value(self, old: fx.Node, splits: Splits, axes: Axes, gradient: bool = False) -> fx.Node:
        """The node that holds `old` (perhaps a view) when its base lies as `splits` and its own atoms as `axes`; as
        the `gradient` of a parameter, or for any other reader."""
        value = self.factored.values[old]
        if old is value.key[0] or old.target is operator.getitem:
            return self._converted(value.key, splits, gradient)
        identity = (old, splits, axes)
        if identity not in self.here.views:
            viewed: fx.Node = old.args[0]  # type: ignore[assignment]
            below = self._below(value, self.factored.values[viewed], axes)
            node = call(self.graph, old.target, (self._value(viewed, splits, below, gradient), *old.args[1:]))
            layout = value.form.layout(axes, splits.partial)
            describe(node, Lowered(self._origin(old), value_of(old).dtype, layout, value.key))
            self.here.views[identity] = node
        return self.here.views[identity]

    def _below(self, value: Value, viewed: Value, axes: Axes) -> Axes:
        """The axes of the atoms of what a value views, where those of the value are split by `axes`."""
        ours, theirs = value.form.places, viewed.form.places
        if None in theirs:  # an expanded dim is told by its ref alone
            ours, theirs = self.factored.leaves(value), self.factored.leaves(viewed)
        held = dict[object, tuple[str, ...]](zip(ours, axes, strict=True))
        return tuple([held.get(atom, ()) for atom in theirs])

    def _converted(self, key: Key, splits: Splits, gradient: bool) -> fx.Node:
        """A base value in the given layout; steps go by way of the layout in which its users share it."""
        if key not in self.here.held:
            self._recall(key)
        here, start = self.here.held[key], self.here.origin[key]
        if splits in here:
            return here[splits]
        for stop in self._stops(key):
            self._walk(key, start, stop)
            start = stop
        self._walk(key, start, splits, gradient)
        self._keep(key)
        return here[splits]

    def _stops(self, key: Key) -> list[Splits]:
        """The layouts by way of which readers of a value get it."""
        chosen = self.assignment
        if self.forward is None or key not in self.forward.held:
            shared = chosen.shares.get(key)
            return [] if shared is None else [shared]
        return [layouts[key] for layouts in (chosen.kept, chosen.regathered) if key in layouts]

    def _recall(self, key: Key) -> None:
        """Bring a value of forward into backward: what was kept, or what made it, once again."""
        assert self.forward is not None
        if key in self.assignment.kept and self.assignment.strategies[key[0]].again:
            self._repeat(key)
            return
        origin = self.assignment.kept.get(key, self.forward.origin[key])
        self.here.held[key], self.here.origin[key] = {origin: self.forward.held[key][origin]}, origin

    def _repeat(self, key: Key) -> None:
        """Write again what makes a value, and before it all that it needs and that is not kept either."""
        needed: set[fx.Node] = set()
        stack = [key]
        while stack:
            producer = stack.pop()[0]
            if producer in needed or producer in self.repeated or not self.assignment.strategies[producer].again:
                continue
            needed.add(producer)
            stack += [operand.value.key for operand in self.by_node[producer].operands]
        self.repeated |= needed
        before = self.now
        for producer in sorted(needed, key=self.places.__getitem__):
            self.now = producer
            self._operator(self.by_node[producer])
        self.now = before

    def _walk(self, key: Key, start: Splits, end: Splits, gradient: bool = False) -> None:
        here = self.here.held[key]
        if end in here:
            return
        tensor = self.network.gradient_class(key) if gradient else self.network.class_of(key)
        for step in tensor.path(start, end):
            after = apply(start, step, self.mesh)
            if after not in here:
                here[after] = self._step(here[start], key, start, after, step)
            start = after

    def _step(self, node: fx.Node, key: Key, before: Splits, after: Splits, step: Step) -> fx.Node:
        """Emit one move; a piece inside a compound dim is reached through a view onto the atoms and back."""
        form = self.factored.base[key].form
        moved = list(dict.fromkeys(atom for atom in (step.source, step.target) if atom is not None))
        places = [self._direct(form, before, atom) for atom in moved]
        if all(place is not None for place in places) and len(set(places)) == len(places):
            return self._emit(node, key, form, after, step, dict(zip(moved, places, strict=True)))  # type: ignore[arg-type]
        node = self._view(node, key, form.flat, before)
        node = self._emit(node, key, form.flat, after, step, {atom: atom for atom in moved})
        return self._view(node, key, form, after)

    def _direct(self, form: Form, splits: Splits, atom: int) -> int | None:
        """The dim that a move on `atom` acts on directly: all pieces before it in its dim have one element a rank."""
        start = 0
        for index, dim in enumerate(form.dims):
            if atom < start + len(dim):
                alone = all(form.base[i] == self.mesh.ways(splits.axes[i]) for i in range(start, atom))
                return index if alone else None
            start += len(dim)
        raise AssertionError(atom)

    def _view(self, node: fx.Node, key: Key, form: Form, splits: Splits) -> fx.Node:
        layout = form.layout_on(splits.axes, splits.partial)
        new = call(self.graph, aten.view.default, (node, list(layout.shape)))
        describe(new, Lowered(self._origin(self.now or key[0]), tensor_of(key).dtype, layout, key))
        return new

    def _emit(self, node: fx.Node, key: Key, form: Form, after: Splits, step: Step, place: dict[int, int]) -> fx.Node:
        source, target = (None if atom is None else place[atom] for atom in (step.source, step.target))
        keywords: dict[str, Any] = {**step.collective.dims(source, target), "axis": step.axis, **step.orders}
        if step.op not in (None, "sum"):
            keywords["op"] = step.op
        new = call(self.graph, step.collective, (node,), keywords)
        # an input has no place in the user's code: its conversion belongs to the reader that made it necessary
        reader = self.now or key[0]
        stands = self._origin(reader if key[0].op == "placeholder" else key[0])
        if self.forward is None:
            stands = origin(stands.module, stands.source, origin_of(reader).phase)
        describe(new, Lowered(stands, tensor_of(key).dtype, form.layout_on(after.axes, after.partial), key))
        uneven = self._uneven(node, new, step, place)
        if uneven:
            new.kwargs = {**keywords, **uneven}
        return new

    def _uneven(self, before: fx.Node, after: fx.Node, step: Step, place: Mapping[int, int]) -> dict[str, int]:
        """What a step must be told where its dims do not divide: the chunk it leaves, the size it gathers."""
        had, has = (laid(node).local_shape(self.mesh) for node in (before, after))
        ways, told = self.mesh.sizes[step.axis], dict[str, int]()
        if step.source == step.target:
            return told
        if step.target is not None and has[place[step.target]] * ways != had[place[step.target]]:
            told["chunk"] = has[place[step.target]]
        if step.source is not None and had[place[step.source]] * ways != has[place[step.source]]:
            told["size"] = has[place[step.source]]
        return told

    def _outputs(self, indices: Iterable[int]) -> None:
        parameters = self.parameters
        for index in indices:
            port, old = self.ports[index]
            if index in self.made or old is None:
                self.made.setdefault(index, None)
                continue
            self.now = old
            value = self.factored.values[old]
            gradient = port.role is Role.GRADIENT and index not in self.assignment.outputs
            if gradient:
                stored = self.assignment.strategies[parameters[port.name]].split
                splits, axes = base_demand(value, stored), stored
            else:
                splits = self.assignment.outputs[index]
                axes = value.form.split_by(splits.axes)
            self.made[index] = self._value(old, splits, axes, gradient and not takes_sums(value.key[0]))
