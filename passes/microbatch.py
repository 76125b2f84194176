"""Microbatch: the program of a batch becomes that of one micro-batch. Time is an axis, and is localized first.

microbatches=4

    %input_0 = input                             f32[32, 64]     ->   f32[8, 64]
    %mm = mm(%input_0, %w)                       f32[32, 16]     ->   f32[8, 16]
    %sum = sum(%mm, [0, 1])                      f32[]           ->   f32[], an addend of the loss
    %div = div(%sum, 512)                        f32[]           ->   as it is: the count is that of the batch

What is the same in every micro-batch is computed in each, or once before all, where all of the inputs it takes: the
number of labels that count, by which a loss is divided.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from shardc.analysis.operands import collective_of
from shardc.errors import InfeasibleError, ShardcError
from shardc.ir.facts import Captured, Key, captured, describe, dtype_of, lowered, origin_of
from shardc.ir.program import Microbatches, Port, Program, Role, ancestors, call, name_of, tensor_of, value_of, where
from shardc.ir.versions import GraphVersion
from shardc.passes.assign import solved
from shardc.passes.factor import factor
from shardc.passes.localize import localized
from shardc.passes.propagate import spread
from shardc.passes.reshard import resharded
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.planning.constraints import Constraint
from shardc.planning.time_axis import ATTENTION, PARTED_DRAWS, TimeNetwork, batch_of, from_inputs_alone, time_mesh
from shardc.rules.factors.chosen import chosen_of
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.shard import shard
from shardc.runtime.collectives.to_partial import to_partial
from shardc.runtime.kernels.parts import Part, addend_of_microbatch, part_of_microbatch
from shardc.runtime.kernels.random import DRAWS
from shardc.runtime.mesh.mesh import TIME

aten = torch.ops.aten


@compiler_pass
def microbatch(c: Compilation) -> Compilation:
    """Divide the batch, where micro-batches are asked for. Raises ShardcError where the batch cannot be divided, and
    InfeasibleError where an operator needs all of it at once."""
    count = 1 if c.options.microbatches is None else c.options.microbatches
    if not isinstance(count, int):
        raise ShardcError(f"microbatches={count!r} is for whoever runs all passes; name a number")
    if count == 1:
        return c
    if TIME in c.mesh.names:
        raise ShardcError(f"mesh {c.mesh} has an axis {TIME!r}, along which micro-batches lie; give it another name")
    network = TimeNetwork.of(c.factored, c.options.device, count)
    for variable in network.variables:
        if not variable.domain:
            raise InfeasibleError(f"microbatches={count}: {variable.name} cannot be divided among micro-batches")
    assignment = network.assignment(solved(network.problem(), c.time_limit).choice)
    graph = localized(resharded(network, assignment), network.mesh)
    program = _Divided(c.program, graph, count, _coupling(network, c)).program()
    assert program.microbatches is not None
    before = program.microbatches.prologue
    return factor.run(replace(c, program=program, prologue=None if before is None else _compiled(c, before)))


def _coupling(network: TimeNetwork, c: Compilation) -> fx.Node | None:
    """The first operator that reads a batch and cannot compute a part of it alone, or pairs its samples."""
    batch = batch_of(c.program, network.mesh.size)
    asked: list[Constraint] = []
    for port, node in zip(c.program.inputs, c.program.placeholders, strict=True):
        if port in batch:
            value = c.factored.values[node]
            dims = ((TIME,), *(None for _ in value.dims[1:]))
            asked.append(Constraint(value.key, value, dims, port.name))
    axes = spread(c.factored, network.mesh, asked).axes
    for op in c.factored.ops:
        domain: Any = network.variables[network.variable_of(op.node)].domain
        divided = {
            number
            for operand, carried in zip(op.operands, op.kind.carried, strict=False)
            for place, number in zip(operand.value.form.places, carried, strict=True)
            if place is not None and number is not None and TIME in axes[operand.value.key][place]
        }
        for number in divided:
            if len(divided) > 1 or not any(strategy.split[number] for strategy in domain):
                return op.node
    return None


def _compiled(c: Compilation, program: Program) -> Compilation:
    """What runs before all micro-batches, up to the code: a small program without parameters."""
    from shardc.passes.pipeline import part, run  # the list of passes names this one

    asked = replace(c.options, microbatches=1, constraints={}, plan=None, outputs="full", memory="unbounded")
    alone = replace(c, program=program, options=asked, demands=(), given=None, reuse=None)
    return run(part("factor", "overlap"), alone)


class _Divided:
    """Writes the program of one micro-batch, from the graph that is localized over time."""

    def __init__(self, program: Program, graph: fx.Graph, count: int, coupling: fx.Node | None) -> None:
        self.whole, self.old, self.count, self.mesh = program, graph, count, time_mesh(count)
        self.coupling = coupling
        self.new, self.here = fx.Graph(), dict[fx.Node, fx.Node]()
        self.fakes: dict[Any, tuple[Any, torch.Tensor]] = {}
        self.alone = from_inputs_alone(program)
        self.once: dict[Key, fx.Node] = {}

    def program(self) -> Program:
        calls = [node for node in self.old.nodes if node.op == "call_function"]
        for node in self.old.find_nodes(op="placeholder"):
            self._place(self.new.placeholder(node.name), node)
        for node in calls:
            if self._sends(node):
                self._known_before(node)
        for node in calls:
            if node not in self.here:
                self._place(self._called(node), node)
        results: list[fx.Node | None] = list(self.old.output_node().args[0])  # type: ignore[arg-type]
        self.new.output(tuple(None if node is None else self.here[node] for node in results))
        for node in reversed(self.new.nodes):  # what only led to what is known before
            if not node.users and node.op == "call_function" and node.target not in DRAWS:
                self.new.erase_node(node)
        ports = [*self.whole.inputs, *(Port(Role.CONSTANT, f"prologue:{n}") for n in range(len(self.once)))]
        made = replace(self.whole, version=GraphVersion.of(self.new), inputs=ports)
        return replace(made, microbatches=self._microbatches(results))

    def _microbatches(self, results: Sequence[fx.Node | None]) -> Microbatches:
        dims: dict[Port, int] = {}
        sums: set[Port] = set()
        placeholders = self.old.find_nodes(op="placeholder")
        inputs = zip(self.whole.inputs, placeholders, strict=True)
        for port, node in [*inputs, *zip(self.whole.outputs, results, strict=True)]:
            layout = None if node is None else lowered(node).layout
            if layout is not None and layout.partial:
                sums.add(port)
            elif layout is not None and layout.cuts(self.mesh):
                ((dims[port], _, _),) = layout.cuts(self.mesh)
        return Microbatches(self.count, dims, frozenset(sums), self._prologue() if self.once else None)

    def _called(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.here.__getitem__)
        target: Any = node.target
        if target is shard:
            target, kwargs = part_of_microbatch, {"dim": kwargs["dim"], "count": self.count}
        elif target is to_partial:
            target, kwargs = addend_of_microbatch, {}
        elif (chosen := chosen_of(node)) is not None and chosen.op.node.target in ATTENTION:
            target, kwargs = chosen.op.node.target, dict(chosen.op.node.kwargs)
        elif target in PARTED_DRAWS:
            at = PARTED_DRAWS[target]
            parts = {int(name[1:]): value for name, value in kwargs.items() if isinstance(value, Part)}
            shape: list[int] = list(args[at])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Part)}
            if parts:
                kwargs["batch"] = [(dim, shape[dim]) for dim in parts]
                of_part = [n // self.count if dim in parts else n for dim, n in enumerate(shape)]
                args = (*args[:at], of_part, *args[at + 1 :])
        return call(self.new, target, args, kwargs)

    # values

    def _place(self, new: fx.Node, node: fx.Node) -> None:
        """Give a node its facts: those of the value that it is a part of."""
        facts = lowered(node)
        if facts.layout is not None:
            assert facts.base is not None
            value: Any = self._fake(tensor_of(facts.base), facts.layout.local_shape(self.mesh), facts.dtype)
        else:
            chosen = chosen_of(node)
            assert chosen is not None
            made, values = chosen.result_layouts(self.mesh), list(value_of(chosen.op.node))
            for index, layout in made.items():
                values[index] = self._fake(values[index], layout.local_shape(self.mesh), values[index].dtype)
            value = tuple(values)
        describe(new, Captured(value, facts.origin))
        self.here[node] = new

    def _fake(self, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
        """A fake value of `shape` that lies in memory as another does. Equal layers share theirs."""
        key = id(like), tuple(shape), dtype
        if key not in self.fakes:
            fake = like.new_empty(tuple(shape), dtype=dtype)
            if like.dim() == len(shape) and not like.is_contiguous():
                order = sorted(range(like.dim()), key=lambda dim: -like.stride(dim))
                back = sorted(range(like.dim()), key=order.__getitem__)
                fake = like.new_empty([shape[dim] for dim in order], dtype=dtype).permute(back)
            self.fakes[key] = like, fake
        return self.fakes[key][1]

    # what is known before

    def _sends(self, node: fx.Node) -> bool:
        collective = collective_of(node)
        return collective is not None and not collective.local

    def _known_before(self, node: fx.Node) -> None:
        """A value of which every micro-batch needs all: computed once, of all of the inputs. Raises InfeasibleError
        where it depends on what the micro-batches compute."""
        base, layout = lowered(node).base, lowered(node).layout
        assert base is not None and layout is not None
        if base[0] not in self.alone or node.target is not all_reduce:
            raise self._refused(node, base)
        if base not in self.once:
            self.once[base] = self.new.placeholder(f"prologue_{len(self.once)}")
            describe(self.once[base], Captured(tensor_of(base)))
        known = self.once[base]
        if tuple(layout.shape) != tuple(tensor_of(base).shape):
            known = call(self.new, aten.view.default, (known, list(layout.shape)))
            describe(known, Captured(self._fake(tensor_of(base), layout.shape, None), origin_of(node)))
        self.here[node] = known

    def _refused(self, node: fx.Node, base: Key) -> InfeasibleError:
        reader = self.coupling
        if reader is None:
            readers = [node]
            while readers[0].op != "output" and lowered(readers[0]).operator is None and readers[0].users:
                readers = list(readers[0].users)
            reader = node if readers[0].op == "output" else readers[0]
        place = where(reader) or where(base[0])
        if self.coupling is None and any(map(_rounds, (reader, *reader.users, *reader.all_input_nodes))):
            return InfeasibleError(
                f"microbatches={self.count}: {name_of(reader.target)} ({place}) rounds a sum over all samples to fewer "
                "bits, and each micro-batch has only its own addend: compute and return it in float32, as in "
                "loss(x.float())"
            )
        return InfeasibleError(
            f"microbatches={self.count}: {name_of(reader.target)} ({place}) needs values of all samples at once, and "
            "each micro-batch has only its own. Operators that couple samples (batch norm while it trains, contrastive "
            "losses) cannot run on micro-batches; leave microbatches out, or keep them out of the sharded model"
        )

    def _prologue(self) -> Program:
        """What is known before as a program of its own."""
        needed = ancestors(key[0] for key in self.once)
        graph, here, ports = fx.Graph(), dict[fx.Node, fx.Node](), list[Port]()
        inputs = dict(zip(self.whole.placeholders, self.whole.inputs, strict=True))
        for node in self.whole.graph.nodes:
            if node in needed:
                here[node] = graph.node_copy(node, here.__getitem__)
                ports += [inputs[node]] if node in inputs else []
        results: list[fx.Node] = []
        for node, index in self.once:
            several = isinstance(value_of(node), (tuple, list))
            made = call(graph, operator.getitem, (here[node], index)) if several else here[node]
            if several:
                describe(made, Captured(value_of(node)[index], captured(node).origin))
            results.append(made)
        graph.output(tuple(results))
        outputs = [Port(Role.OUTPUT, "", index) for index in range(len(results))]
        spec = pytree.tree_structure([*results])
        return replace(
            self.whole, version=GraphVersion.of(graph), inputs=ports, outputs=outputs, out_spec=spec,
            out_leaves=[*range(len(results))], attached=frozenset(), effects=None, orders={}, depends_on={},
        )  # fmt: skip


def _rounds(node: fx.Node) -> bool:
    """Whether a node casts floats to floats of fewer bits."""
    if node.target is not torch.ops.aten._to_copy.default:
        return False
    before, after = map(dtype_of, (node.all_input_nodes[0], node))
    return before.is_floating_point and after.is_floating_point and after.itemsize < before.itemsize
