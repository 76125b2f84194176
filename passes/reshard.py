"""Reshard: write the chosen layouts into a new graph, with a conversion wherever a value is needed in another layout.

    %y = mm(%h, %w2)                             f32[32@dp, 512] +sum@tp
    %z = add(%y, %x)                             f32[32@dp, 512@tp]
becomes
    %y = mm(%h, %w2)                             f32[32@dp, 512] +sum@tp
    %y1 = reduce_scatter(%y, dim=1, axis=tp)     f32[32@dp, 512@tp]
    %z = add(%y1, %x)                            f32[32@dp, 512@tp]

A conversion is made once and shared by all that need the same layout. Views are rebuilt on whatever layout their reader
needs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardc.cost.conversion import Splits, Step, apply
from shardc.graph import Role, value_of
from shardc.rules.atoms import Ref
from shardc.rules.factoring import Factored, Key, Op, Value, carried, layout_of, tensor_arguments
from shardc.runtime import collectives
from shardc.solver.network import Assignment, Network, base_demand
from shardc.solver.strategies import demand, make

aten = torch.ops.aten
Held = dict[Ref, tuple[str, ...]]


def reshard(network: Network, assignment: Assignment) -> fx.Graph:
    """The graph with layouts and conversions. Node metadata: `layout`, `dtype`, `base` (the key of the base
    value), `op` and `strategy` on operators."""
    return _Rewrite(network, assignment).run()


class _Rewrite:
    def __init__(self, network: Network, assignment: Assignment) -> None:
        self.network = network
        self.factored: Factored = network.factored
        self.mesh = network.mesh
        self.assignment = assignment
        self.graph = fx.Graph()
        self.held: dict[Key, dict[Splits, fx.Node]] = {}  # every layout in which a base value exists so far
        self.origin: dict[Key, Splits] = {}
        self.views: dict[tuple[fx.Node, Splits, frozenset[tuple[Ref, tuple[str, ...]]]], fx.Node] = {}
        self.now: fx.Node | None = None

    def run(self) -> fx.Graph:
        for op in self.factored.ops:
            self.now = op.node
            self._operator(op)
        self._outputs()
        return self.graph

    def _operator(self, op: Op) -> None:
        shape, strategy = self.assignment.shapes[op.node], self.assignment.strategies[op.node]
        if op.node.op == "placeholder":
            new = self.graph.placeholder(op.node.name)
        else:
            operands: list[fx.Node] = []
            for index, operand in enumerate(op.operands):
                held = {
                    ref: strategy.split[f] for ref, f in carried(self.factored, operand, op.factors) if f is not None
                }
                operands.append(self._value(operand.node, demand(shape, strategy, index, self.mesh), held))
            supply = iter(operands)
            wanted = set(tensor_arguments(op.node))
            arguments = (op.node.args, dict(op.node.kwargs))
            args, kwargs = map_arg(arguments, lambda n: next(supply) if n in wanted else n)
            new = self._call(op.node.target, args, kwargs)
        new.meta = {"op": op, "shape": shape, "strategy": strategy}
        several = isinstance(value_of(op.node), (tuple, list))
        used = [user.args[1] for user in op.node.users if user.target is operator.getitem] if several else [0]
        new.meta["dtype"] = None
        self._provenance(new, op.node)
        for index, result in enumerate(op.results):
            if result.key[1] not in used:
                continue
            splits = make(shape, strategy, index, self.mesh)
            node = self._call(operator.getitem, (new, result.key[1])) if several else new
            if several:
                self._provenance(node, op.node)
            self._describe(node, result.key, result.value, splits, self._base_held(result.key, splits))
            self.held[result.key] = {splits: node}
            self.origin[result.key] = splits

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else target.__name__
        return self.graph.create_node("call_function", target, args, kwargs or {}, name=name.strip("_"))

    def _base_held(self, key: Key, splits: Splits) -> Held:
        return dict(zip(self.factored.leaves(key), splits.axes, strict=True))

    def _provenance(self, new: fx.Node, old: fx.Node) -> None:
        new.meta.update({k: old.meta.get(k, "") for k in ("module", "source", "phase")})

    def _describe(
        self, node: fx.Node, key: Key, value: Value, splits: Splits, held: Mapping[Ref, tuple[str, ...]]
    ) -> None:
        producer = value_of(key[0])
        tensor = producer[key[1]] if isinstance(producer, (tuple, list)) else producer
        node.meta["dtype"] = tensor.dtype
        node.meta["base"] = key
        node.meta["layout"] = layout_of(self.factored, value, held, splits.partial)

    def _value(self, old: fx.Node, splits: Splits, held: Held) -> fx.Node:
        """The node that holds `old` (perhaps a view) when its base lies as `splits` and its own leaves as `held`."""
        value = self.factored.values[old]
        if old is value.key[0] or old.target is operator.getitem:
            return self._converted(value.key, splits)
        identity = (old, splits, frozenset((r, a) for r, a in held.items() if a))
        if identity not in self.views:
            source = self._value(old.args[0], splits, held)  # type: ignore[arg-type]
            node = self._call(old.target, (source, *old.args[1:]))  # type: ignore[arg-type]
            self._provenance(node, old)
            own = self.factored.atoms.leaves([ref for dim in value.dims for ref in dim])
            self._describe(node, value.key, value, splits, {ref: held.get(ref, ()) for ref in own})
            node.meta["dtype"] = value_of(old).dtype
            self.views[identity] = node
        return self.views[identity]

    def _converted(self, key: Key, splits: Splits) -> fx.Node:
        """A base value in the given layout; steps go by way of the layout in which its users share it."""
        here = self.held[key]
        if splits in here:
            return here[splits]
        start = self.origin[key]
        shared = self.assignment.shares.get(key)
        if shared is not None and shared != start:
            self._walk(key, start, shared)
            start = shared
        if splits not in here:
            self._walk(key, start, splits)
        return here[splits]

    def _walk(self, key: Key, start: Splits, end: Splits) -> None:
        here = self.held[key]
        if end in here:
            return
        tensor = self.network.class_of(key)
        for step in tensor.path(start, end):
            after = apply(start, step, self.mesh)
            if after not in here:
                here[after] = self._step(here[start], key, start, after, step)
            start = after

    def _step(self, node: fx.Node, key: Key, before: Splits, after: Splits, step: Step) -> fx.Node:
        """Emit one move; a piece inside a compound dim is reached through a view onto the atoms and back."""
        value = self.factored.base[key]
        dims = [self.factored.atoms.leaves(dim) for dim in value.dims]
        moved = [atom for atom in (step.source, step.target) if atom is not None]
        places = [self._direct(dims, before, atom) for atom in moved]
        if all(place is not None for place in places) and len(set(places)) == len(places):
            return self._emit(node, key, value, after, step, dict(zip(moved, places, strict=True)))  # type: ignore[arg-type]
        flat = Value(key, [[ref] for dim in dims for ref in dim])
        node = self._view(node, key, flat, before)
        node = self._emit(node, key, flat, after, step, {atom: atom for atom in moved})
        return self._view(node, key, value, after)

    def _direct(self, dims: list[list[Ref]], splits: Splits, atom: int) -> int | None:
        """The dim that a move on `atom` acts on directly: all pieces before it in its dim have one element a rank."""
        start = 0
        for index, dim in enumerate(dims):
            if atom < start + len(dim):
                before = range(start, atom)
                sizes = [self.factored.atoms.size(ref) for ref in dim]
                alone = all(sizes[i - start] == self.mesh.ways(splits.axes[i]) for i in before)
                return index if alone else None
            start += len(dim)
        raise AssertionError(atom)

    def _view(self, node: fx.Node, key: Key, value: Value, splits: Splits) -> fx.Node:
        layout = layout_of(self.factored, value, self._base_held(key, splits), splits.partial)
        new = self._call(aten.view.default, (node, list(layout.shape)))
        self._provenance(new, self.now or key[0])
        self._describe(new, key, value, splits, self._base_held(key, splits))
        return new

    def _emit(self, node: fx.Node, key: Key, value: Value, after: Splits, step: Step, place: dict[int, int]) -> fx.Node:
        keywords: dict[str, Any] = {}
        if step.kind == "all_to_all":
            assert step.source is not None and step.target is not None
            keywords = {"split_dim": place[step.target], "concat_dim": place[step.source]}
        elif place:
            keywords = {"dim": next(iter(place.values()))}
        keywords["axis"] = step.axis
        if step.op not in (None, "sum"):
            keywords["op"] = step.op
        new = self._call(getattr(collectives, step.kind), (node,), keywords)
        # an input has no place in the user's code: its conversion belongs to the reader that made it necessary
        reader = self.now or key[0]
        self._provenance(new, reader if key[0].op == "placeholder" else key[0])
        new.meta["phase"] = reader.meta.get("phase", "")
        self._describe(new, key, value, after, self._base_held(key, after))
        new.kwargs = {**keywords, **self._uneven(node, new, step, place)}
        return new

    def _uneven(self, before: fx.Node, after: fx.Node, step: Step, place: Mapping[int, int]) -> dict[str, int]:
        """What a step must be told where its dims do not divide: the chunk it leaves, the size it gathers."""
        had, has = (node.meta["layout"].local_shape(self.mesh) for node in (before, after))
        ways, told = self.mesh.sizes[step.axis], dict[str, int]()
        if step.target is not None and has[place[step.target]] * ways != had[place[step.target]]:
            told["chunk"] = has[place[step.target]]
        if step.source is not None and had[place[step.source]] * ways != has[place[step.source]]:
            told["size"] = has[place[step.source]]
        return told

    def _outputs(self) -> None:
        program = self.factored.program
        parameters = {p.name: n for p, n in zip(program.inputs, program.placeholders, strict=True)}
        made: list[fx.Node | None] = []
        for index, (port, old) in enumerate(zip(program.outputs, program.results, strict=True)):
            if old is None:
                made.append(None)
                continue
            self.now = old
            value = self.factored.values[old]
            leaves = self.factored.atoms.leaves([ref for dim in value.dims for ref in dim])
            if port.role is Role.GRADIENT and port.name in parameters:
                stored = self.assignment.strategies[parameters[port.name]].split
                splits = base_demand(self.factored, value, stored)
                held = dict(zip(leaves, stored, strict=True))
            else:
                splits = self.assignment.outputs[index]
                held = {ref: axes for ref, axes in self._base_held(value.key, splits).items() if ref in leaves}
            made.append(self._value(old, splits, held))
        self.graph.output(tuple(made))
