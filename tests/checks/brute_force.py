"""Rules against truth: every strategy of one operator call, lowered, run on every rank, put together, compared.

The operands of a strategy are cut as it demands. One that is demanded partial becomes random addends, nonzero on
every rank, so that a rule that claims too much linearity is found out."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_structure

import shardc.rules  # noqa: F401  (registers every rule)
from samples.calls.sample import Sample, View
from shardc.ir.facts import NOWHERE, Captured, Lowered, describe, laid, lowered
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, value_of
from shardc.ir.versions import GraphVersion
from shardc.passes.localize import localized
from shardc.planning.strategies import rings_of, strategies_of
from shardc.rules.factors.bodies import sends
from shardc.rules.factors.chosen import Chosen
from shardc.rules.factors.factored import Factored, Op
from shardc.rules.factors.factoring import factor, tensor_arguments
from shardc.rules.factors.strategy import Strategy, demand, make, shape_of, split_of
from shardc.runtime import VirtualMesh, load
from shardc.runtime.kernels.random import DRAWS
from shardc.runtime.kernels.widening import LOW
from shardc.source.module import source_of

aten = torch.ops.aten


class Call:
    """A sample as a one-operator program; `split` says how every operand's dims are cut in two: no, major, minor."""

    def __init__(self, sample: Sample, split: str = "no", factored: bool = True) -> None:
        self.sample = sample
        self.graph = fx.Graph()
        self.split = split
        self.whole: dict[fx.Node, Tensor] = {}
        self._mode = FakeTensorMode()
        self._nodes: dict[int, fx.Node] = {}
        args, kwargs = self._map(sample.args), self._map(sample.kwargs)
        node = self._call(sample.target, args, kwargs)
        self.expected = _run(sample.target, *_map((args, kwargs), lambda n: self.whole[n], fx.Node), sample.turn)
        value = value_of(node)
        results: list[fx.Node] = [node]
        if isinstance(value, (tuple, list)):
            results = []
            for index, one in enumerate(value):
                if isinstance(one, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, index))
                    describe(item, Captured(one))
                    results.append(item)
        self.graph.output(tuple(results))
        self.program = _program(self.graph, len(self.whole), results)
        if not factored:
            return
        self.factored: Factored = factor(self.program)
        self.op: Op = self.factored.ops[-1]
        self.shape = shape_of(self.op)

    def _map(self, arguments: Any) -> Any:
        if isinstance(arguments, dict):
            return {k: self._map(v) for k, v in arguments.items()}
        if isinstance(arguments, (list, tuple)):
            return type(arguments)(self._map(v) for v in arguments)
        if isinstance(arguments, View):
            if id(arguments) not in self._nodes:
                source = self._placeholder(arguments.base)
                self._nodes[id(arguments)] = self._call(arguments.target, (source, *arguments.args), {})
                self.whole[self._nodes[id(arguments)]] = arguments.target(arguments.base, *arguments.args)
            return self._nodes[id(arguments)]
        return self._operand(arguments) if isinstance(arguments, Tensor) else arguments

    def _operand(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            fine = [piece for size in tensor.shape for piece in self._pieces(size)]
            node = self._placeholder(tensor.reshape(fine))
            if len(fine) != tensor.dim():
                whole = self.whole[node].view(tensor.shape)
                node = self.graph.call_function(aten.view.default, (node, list(tensor.shape)))
                describe(node, Captured(self._mode.from_tensor(whole)))
                self.whole[node] = tensor
            self._nodes[id(tensor)] = node
        return self._nodes[id(tensor)]

    def _pieces(self, size: int) -> tuple[int, ...]:
        small = next((n for n in (2, 3) if size % n == 0), size)
        if self.split == "no" or small == size:
            return (size,)
        return (small, size // small) if self.split == "major" else (size // small, small)

    def _placeholder(self, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.whole)}")
        describe(node, Captured(self._mode.from_tensor(tensor.clone())))
        self.whole[node] = tensor
        return node

    def _call(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given = _map((args, kwargs), value_of, fx.Node)
        if isinstance(target, torch._ops.OpOverload):
            with self._mode:
                describe(node, Captured(target(*given[0], **given[1])))
        else:  # a function of the runtime
            values = _map((args, kwargs), lambda n: self.whole[n], fx.Node)
            describe(node, Captured(_map(_run(target, *values, self.sample.turn), self._mode.from_tensor, Tensor)))
        return node

    def strategies(self, mesh: Mesh) -> list[Strategy]:
        along = tuple(name for name, ways in mesh.axes if ways > 1)
        rings = rings_of(self.shape, mesh, along, frozenset(self.shape.rings)).strategies if self.shape.rings else []
        return [*strategies_of(self.shape, mesh).strategies, *rings]

    def lower(
        self, strategies: Sequence[Strategy], mesh: Mesh
    ) -> tuple[str, list[tuple[Tensor, Layout]], list[dict[int, Layout]]]:
        """The source of the operator's local calls, one a strategy; every placeholder with its layout; the layouts of
        the results of every call."""
        graph, bases = fx.Graph(), dict[tuple[fx.Node, Layout], fx.Node]()
        results, layouts = list[fx.Node](), list[dict[int, Layout]]()
        for strategy in strategies:
            layouts.append(self._written(graph, strategy, mesh, bases, results))
        graph.output(tuple(results))
        localized(graph, mesh)
        leave: tuple[fx.Node, ...] = graph.output_node().args[0]  # type: ignore[assignment]
        for node in (*leave, *(n for n in graph.nodes if n.op == "placeholder")):
            # parts go in and come out as they are: nothing is cut or pasted
            describe(node, replace(lowered(node), layout=Layout.whole(laid(node).local_shape(mesh))))
        given = [(self.whole[node], layout) for node, layout in bases]
        return source_of(graph, _program(graph, len(bases), results), mesh), given, layouts

    def _written(
        self,
        graph: fx.Graph,
        strategy: Strategy,
        mesh: Mesh,
        bases: dict[tuple[fx.Node, Layout], fx.Node],
        results: list[fx.Node],
    ) -> dict[int, Layout]:
        """Append a call by one strategy, with placeholders for what no call before it reads; gives the layouts of its
        results."""
        factored, op = self.factored, self.op

        def build(node: fx.Node, index: int, held: Mapping[Any, tuple[str, ...]]) -> fx.Node:
            value, splits = factored.values[node], demand(self.shape, strategy, index, mesh)
            if node is value.key[0]:
                layout = value.form.layout(splits.axes, splits.partial)
                if (node, layout) in bases:
                    return bases[node, layout]
                last = next(reversed(bases.values()), None)
                with graph.inserting_after(last) if last else graph.inserting_before():
                    new = bases[node, layout] = graph.placeholder(f"x{len(bases)}")
            else:
                new = graph.call_function(node.target, (build(node.args[0], index, held), *node.args[1:]))  # type: ignore
                layout = value.form.layout([held.get(ref, ()) for ref in factored.leaves(value)], splits.partial)
            describe(new, Lowered(NOWHERE, value_of(node).dtype, layout))
            return new

        operands: list[fx.Node] = []
        for index, operand in enumerate(op.operands):
            carried = zip(factored.leaves(operand.value), op.kind.carried[index], strict=True)
            split = split_of(self.shape, strategy, self.shape.operands[index].carried)
            held = {ref: split[f] for ref, f in carried if f is not None}
            operands.append(build(operand.node, index, held))
        supply, wanted = iter(operands), set(tensor_arguments(op.node))
        args, kwargs = fx.node.map_arg(
            (op.node.args, dict(op.node.kwargs)), lambda n: next(supply) if n in wanted else n
        )
        call = graph.call_function(op.node.target, args, kwargs)  # type: ignore[arg-type]
        chosen = Chosen(op, self.shape, strategy)
        describe(call, Lowered(NOWHERE, operator=chosen))
        several, layouts = isinstance(value_of(op.node), (tuple, list)), dict[int, Layout]()
        for index, result in enumerate(op.results):
            splits = make(self.shape, strategy, index, mesh)
            node = graph.call_function(operator.getitem, (call, result.key[1])) if several else call
            layouts[result.key[1]] = result.value.form.layout(splits.axes, splits.partial)
            dtype = (value_of(op.node)[result.key[1]] if several else value_of(op.node)).dtype
            describe(node, Lowered(NOWHERE, dtype, layouts[result.key[1]], operator=None if several else chosen))
            results.append(node)
        return layouts

    def check_all(self, strategies: Sequence[Strategy], mesh: Mesh, machine: VirtualMesh) -> dict[Strategy, str]:
        """What is wrong with which strategies. They run together, which takes a third of the time, and one by one where
        something is wrong, or where each draws from the stream."""
        if not strategies or (self.op.node.target not in DRAWS and not self._check(strategies, mesh, machine)):
            return {}
        told = {strategy: self.check(strategy, mesh, machine) for strategy in strategies}
        return {strategy: wrong for strategy, wrong in told.items() if wrong}

    def check(self, strategy: Strategy, mesh: Mesh, machine: VirtualMesh) -> str:
        """Empty if the strategy is right, else what is wrong."""
        return self._check([strategy], mesh, machine)

    def _check(self, strategies: Sequence[Strategy], mesh: Mesh, machine: VirtualMesh) -> str:
        """Empty if the strategies are right, else what is wrong with the first that is not."""
        source, bases, layouts = self.lower(strategies, mesh)
        parts = [scatter(tensor, layout, mesh, machine) for tensor, layout in bases]
        torch.default_generator.manual_seed(7)  # torch.manual_seed tells all kinds of devices, which takes longer
        machine.reset()
        try:
            forward, turn = load(source).forward, self.sample.turn
            ran = machine.run(forward, lambda rank: tuple(p[rank] for p in parts), random=True, turn=turn)
        except Exception as error:
            return f"failed: {str(error)[-500:]}\n{source[source.index('def forward') :]}"
        expected = list(self.expected) if isinstance(self.expected, (tuple, list)) else [self.expected]
        predicted, routed = dict.fromkeys(mesh.names, 0.0), set[str]()
        for strategy in strategies:
            for kind, axis, size, _ in sends(self.shape, strategy, mesh):
                predicted[axis] += kind.sent(mesh.sizes[axis], size)
                routed |= {axis} if kind.uneven else set()  # what it sends depends on values
        if any(not math.isclose(predicted[axis], sent) for axis, sent in machine.traffic.items() if axis not in routed):
            return f"sends {machine.traffic} bytes, its rule says {predicted}"
        made = [(index, layout) for one in layouts for index, layout in one.items()]
        for position, (index, layout) in enumerate(made):
            defined = self.sample.values is None or index in self.sample.values
            locals_ = [outputs[position] for outputs, *_ in ran]
            wrong = gather(locals_, layout, mesh, machine, expected[index], self.sample.tolerance if defined else None)
            if wrong:
                return f"result {index} {layout}: {wrong}\n{source[source.index('def forward') :]}"
        return ""


def _map(value: Any, change: Callable[[Any], Any], kind: type) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(v, change, kind) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change, kind) for v in value)
    return value


def _run(target: Any, args: Any, kwargs: Any, turn: tuple[int, int] = (0, 1)) -> Any:
    """The operator on whole tensors; a function of the runtime on a mesh of one rank."""
    if isinstance(target, torch._ops.OpOverload):
        return target(*args, **kwargs)
    torch.default_generator.manual_seed(7)
    return VirtualMesh({"a": 1}).run(lambda: target(*args, **kwargs), lambda _: (), random=True, turn=turn)[0]


def _program(graph: fx.Graph, inputs: int, results: Sequence[fx.Node]) -> Program:
    count = sum(node.op == "placeholder" for node in graph.nodes)
    assert count <= max(inputs, count)
    ports = [Port(Role.INPUT, f"input:{i}", i) for i in range(count)]
    outputs = [Port(Role.OUTPUT, "", i) for i in range(len(results))]
    return Program(GraphVersion.of(graph), ports, outputs, tree_structure(list(results)), list(range(len(results))))


def _cut(x: Tensor, layout: Layout, mesh: Mesh, where: Mapping[str, int], padding: Any) -> Tensor:
    """The part of a global tensor that the rank at coordinates `where` holds, with `padding` where nothing is."""
    flat = x.reshape([atom.size for dim in layout.dims for atom in dim])
    for index, atom in enumerate(atom for dim in layout.dims for atom in dim):
        for axis in atom.axes:
            size, ways = flat.shape[index], mesh.sizes[axis]
            chunk = -(-size // ways)
            missing = [*flat.shape[:index], chunk * ways - size, *flat.shape[index + 1 :]]
            flat = torch.cat([flat, torch.full(missing, padding, dtype=x.dtype)], index)
            flat = flat.narrow(index, where[axis] * chunk, chunk)
    return flat.reshape(layout.local_shape(mesh))


def garbage(x: Tensor) -> Any:
    """What padding may hold at worst."""
    return float("nan") if x.is_floating_point() or x.is_complex() else x.dtype is torch.bool or 99


def scatter(x: Tensor, layout: Layout, mesh: Mesh, machine: VirtualMesh) -> list[Tensor]:
    """Every rank's part of `x`; where the layout is partial, random addends that sum to it."""
    axes = [axis for axis, _ in layout.partial]
    places = list(itertools.product(*(range(mesh.sizes[a]) for a in axes)))
    addends = dict(zip(places, _addends(x, len(places), torch.Generator().manual_seed(1)), strict=True))
    parts: list[Tensor] = []
    for rank in machine.ranks:
        where = machine.coordinates(rank)
        addend = addends[tuple(where[a] for a in axes)]
        parts.append(_cut(addend, layout, mesh, where, garbage(x)).contiguous())
    return parts


def _addends(x: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """Random addends that sum to `x`."""
    if x.dtype is torch.bool:  # the sum of booleans is their disjunction
        return [*(x & (torch.rand(x.shape, generator=generator) < 0.5) for _ in range(count - 1)), x]
    if x.dtype in LOW:
        # differences would be rounded; doubling is exact
        pairs = [x * 2.0 ** torch.randint(-1, 2, x.shape, generator=generator) for _ in range((count - 1) // 2)]
        rest = [x] if count % 2 else [2 * x, -x]
        return [one.to(x.dtype) for pair in pairs for one in (pair, -pair)] + rest
    addends: list[Tensor] = []
    for _ in range(count - 1):
        if x.is_floating_point():
            addends.append(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype))
        else:
            addends.append(torch.randint(-3, 4, x.shape, generator=generator).to(x.dtype))
        x = x - addends[-1]
    return [*addends, x]


def gather(
    parts: Sequence[Tensor], layout: Layout, mesh: Mesh, machine: VirtualMesh, expected: Tensor, tolerance: float | None
) -> str:
    """Compare the ranks' parts, put together, with `expected` (without tolerance in shape); empty if they agree.

    Partial sums may be off by what rounding can lose of them. A rank's addend r is rounded once, to a relative accuracy
    u; so is each of the n - 1 sums of n addends, none larger than all |r| together; so is the result of the single
    device. So they differ by (n + 1) u sum |r| at most. No bound relative to the result exists: addends may cancel.
    """
    partial = dict(layout.partial)
    combined: dict[tuple[int, ...], Tensor] = {}
    rounded = expected.is_floating_point() and set(partial.values()) == {"sum"}
    sizes: dict[tuple[int, ...], Tensor] = {}  # of all addends together
    for rank in machine.ranks:
        where, part = machine.coordinates(rank), parts[rank]
        if part.dtype != expected.dtype or tuple(part.shape) != layout.local_shape(mesh):
            right = f"{expected.dtype} {layout.local_shape(mesh)}"
            return f"rank {rank} has {part.dtype} {tuple(part.shape)}, should be {right}"
        place = tuple(0 if a in partial else where[a] for a in mesh.names)
        kinds = set(partial.values())
        if rounded:
            sizes[place] = sizes.get(place, 0.0) + part.abs().double()
        if place not in combined:
            combined[place] = part
        elif kinds == {"sum"}:
            combined[place] = combined[place] + part
        else:
            fold = {"max": torch.maximum, "min": torch.minimum, "prod": torch.mul}[kinds.pop()]
            combined[place] = fold(combined[place], part)
    if tolerance is None:
        return ""
    seen = 0
    for place, part in combined.items():
        where = dict(zip(mesh.names, place, strict=True))
        own, real = _owned(tuple(expected.shape), layout, mesh, place)
        seen += len(own)
        right, got = expected.reshape(-1)[own], part.reshape(-1)[real]
        if torch.equal(got, right):
            continue
        if rounded:
            rounding = (mesh.ways(tuple(partial)) + 1) * torch.finfo(expected.dtype).eps / 2
            got = torch.where((got - right).abs() <= rounding * sizes[place].reshape(-1)[real], right, got)
        if torch.allclose(got, right, rtol=tolerance, atol=tolerance, equal_nan=True):
            continue
        try:
            torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance, equal_nan=True)
        except AssertionError as error:
            return f"at {where}: {str(error).splitlines()[0]} got {got[:6]} should be {right[:6]}"
    return "" if seen >= expected.numel() else "parts are missing"


@lru_cache(maxsize=1 << 12)
def _owned(shape: tuple[int, ...], layout: Layout, mesh: Mesh, place: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which elements of a global tensor the rank at `place` holds, and where in its part they stand, padding apart."""
    ids = torch.arange(math.prod(shape)).reshape(shape)
    own = _cut(ids, layout, mesh, dict(zip(mesh.names, place, strict=True)), -1).reshape(-1)
    return own[own >= 0], own >= 0


def additive(sample: Sample, group: Sequence[int]) -> bool:
    """Whether the call is additive in the operands of `group` (positions among the tensors) taken together."""
    call = Call(sample)
    nodes = list(tensor_arguments(call.op.node))
    generator = torch.Generator().manual_seed(2)
    first = {k: torch.randn(call.whole[nodes[k]].shape, generator=generator, dtype=torch.float64) for k in group}

    def run(change: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        counter = itertools.count()

        def pick(node: fx.Node) -> Any:
            index = next(counter)
            whole = call.whole[node]
            return change(index, whole) if index in group else whole

        args, kwargs = _map((call.op.node.args, dict(call.op.node.kwargs)), pick, fx.Node)
        made = _run(sample.target, args, kwargs)
        return [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, Tensor)]

    whole, one, other = run(lambda _, x: x), run(lambda k, _: first[k]), run(lambda k, x: x - first[k])
    return all(torch.allclose(w, a + b, equal_nan=True) for w, a, b in zip(whole, one, other, strict=True))
