"""One operator call through shardc, with its operands in given layouts, forward and backward, and a trace of what ran.

An operand that enters split is a closed constraint on an input. One that enters partial is an input that holds all
ranks' addends, one behind the other and split so that each rank has its own, of which every rank takes the sum:

    x  +sum@a      ->      addends  [4@a, *x]    x = sum(addends, 0)
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from checks.compiling import compiled_program, factored_program
from opinfo.database import RANKS, Sample
from shardc.analysis.operands import collective_of
from shardc.capture.trace import capture
from shardc.cost.hardware import Hardware, Link
from shardc.ir.constrain import Dim
from shardc.ir.facts import Captured, Origin, captured, describe, lowered, origin_of
from shardc.ir.layout import P, S
from shardc.ir.mesh import Mesh
from shardc.ir.program import Constant, Port, Program, Role, value_of
from shardc.ir.verifier import VARIABLE
from shardc.ir.versions import GraphVersion, copied
from shardc.planning.compilation import Compilation
from shardc.planning.constraints import ParameterDemand
from shardc.rules.factors.chosen import chosen_of
from shardc.rules.factors.factoring import VIEWS
from shardc.runtime import Slot, VirtualMesh, load
from shardc.runtime.execute.slots import cut, paste

aten = torch.ops.aten
AXIS = "a"
MESH = Mesh(((AXIS, RANKS),))
SLOW = Hardware("slow", {"float32": 1.0}, 1.0, 0.0, RANKS, Link(0.0, 1e6), Link(0.0, 1e6))
"""A device that computes a flop and moves a byte a second, on links a million times as fast: so computing on a part is
always worth a conversion, and tensors of a few bytes are split as large ones would be."""

ADDENDS = (2.0, -1.0, 1.0, -1.0)
"""What the ranks hold of a partial operand, as multiples of its value: exact sums, and no operator that is not linear
passes by luck."""


@dataclass
class Step:
    """One operator that ran: its operands' placements as computed, its results', and the conversions made for it."""

    name: str
    phase: str
    operands: list[str]
    results: list[str]
    moves: list[tuple[str, str]]
    view: bool

    def __str__(self) -> str:
        return f"{self.name}({','.join(self.operands)}->{','.join(self.results)}){'!' if self.moves else ''}"


@dataclass
class Outcome:
    """Whole outputs and gradients (one per operand that requires one), the failure of the backward if there was one."""

    outputs: list[Any] = field(default_factory=list[Any])
    gradients: list[Tensor | None] | None = None
    backward_error: Exception | None = None
    steps: list[Step] = field(default_factory=list[Step])
    disagree: list[str] = field(default_factory=list[str])
    """Results that should be the same on several ranks and are not."""


class _Call(nn.Module):
    """The call as a function of its tensors alone."""

    def __init__(self, sample: Sample, args: list[Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function = sample.function
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        result = self.function(*args, **kwargs)
        # an operand that comes back is no result of a program, and would not be judged
        return tree_map_only(Tensor, lambda out: out.clone() if any(out is t for t in tensors) else out, result)


class Traced:
    """A sample's call, and the program that it is captured as: one for all layouts."""

    def __init__(self, sample: Sample, args: list[Any], kwargs: dict[str, Any]) -> None:
        self._call = _Call(sample, args, kwargs)
        self.tensors = tuple(leaf for leaf in self._call.leaves if isinstance(leaf, Tensor))
        self._programs: dict[frozenset[int], Program] = {}
        self._factored: dict[frozenset[int], tuple[Program, dict[str, Compilation]]] = {}

    def program(self, tangents: frozenset[int]) -> Program:
        """The program whose flat outputs numbered `tangents` get one, in a copy that may be changed. Raises what
        capture raises."""
        if tangents not in self._programs:
            self._programs[tangents] = capture(self._call, self.tensors, grad=bool(tangents), differentiable=tangents)
        program = self._programs[tangents]
        return replace(program, version=GraphVersion.of(copied(program.graph)), inputs=[*program.inputs])

    def factored(self, tangents: frozenset[int]) -> tuple[Program, dict[str, Compilation]]:
        """The same program, not to be changed, and what the passes make of it that ask about no layout."""
        if tangents not in self._factored:
            program = self.program(tangents)
            self._factored[tangents] = program, factored_program(program, MESH)
        return self._factored[tangents]


def run_sharded(traced: Traced, placements: Sequence[str], tangents: Mapping[int, Tensor]) -> Outcome:
    """Run the call on a mesh of `RANKS`, its tensors placed as `placements` says, in pytree order.

    `tangents` are those of the flat outputs that get one; none: forward only. If only the backward fails, the outcome
    says so. Raises what capture, planning or running raise.
    """
    try:
        return _run(traced, placements, tangents)
    except Exception as error:
        if not tangents:
            raise
        outcome = _run(traced, placements, {})
        outcome.backward_error = error
        return outcome


def _run(traced: Traced, placements: Sequence[str], tangents: Mapping[int, Tensor]) -> Outcome:
    tensors, factored = traced.tensors, None
    if "P" in placements:
        program = traced.program(frozenset(tangents))
    else:
        program, factored = traced.factored(frozenset(tangents))
    demands, sums = _demands(program, placements)
    # no capture makes a program whose gradient is that of a sum of its input: the verifier would refuse it
    with patch.dict(os.environ, {VARIABLE: ""} if sums else {}):
        made = compiled_program(program, MESH, SLOW, demands=demands, whole=False, factored=factored)
    feeds = [_addends(x) if p == "P" else x.detach() for x, p in zip(tensors, placements, strict=True)]
    outcome = Outcome(steps=list(_trace(made["overlap"].lowered.read(), program, sums)))
    gradients = _execute(load(made["codegen"].code()), program, feeds, tangents, outcome)
    if tangents:
        outcome.gradients = [gradients.get(f"input:{i}") for i, x in enumerate(tensors) if x.requires_grad]
    return outcome


def _demands(program: Program, placements: Sequence[str]) -> tuple[list[ParameterDemand], set[fx.Node]]:
    """How operands enter, and the nodes that stand for partial ones."""
    demands: list[ParameterDemand] = []
    sums: set[fx.Node] = set()
    for position, (port, node) in enumerate(zip(program.inputs, program.placeholders, strict=True)):
        if port.role is not Role.INPUT:
            continue
        dims: list[Dim] = [() for _ in value_of(node).shape]
        placement = placements[port.index]
        if placement == "P":
            port = program.inputs[position] = Port(Role.INPUT, f"addends:{port.index}", port.index)
            sums.add(_summed(program.graph, node))
            dims.insert(0, (AXIS,))
        elif placement != "R":
            dims[int(placement[1:])] = (AXIS,)
        demands.append(ParameterDemand(port, tuple(dims), f"{port.name} enters as {placement}"))
    return demands, sums


def _summed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Turn a placeholder into that of its addends; their sum takes its place."""
    users = list(node.users)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        total = graph.call_function(aten.sum.dim_IntList, (node, [0], False))
    describe(total, Captured(value_of(node), Origin(phase="forward")))
    describe(node, replace(captured(node), value=value_of(node).new_empty((RANKS, *value_of(node).shape))))
    for user in users:
        user.replace_input_with(node, total)
    return total


def _addends(x: Tensor) -> Tensor:
    """The ranks' parts of a partial operand, stacked. What is not finite cannot be cut: the first rank has it all."""
    x = x.detach()
    finite = torch.isfinite(x)
    return torch.stack(
        [torch.where(finite, x * w, x if rank == 0 else torch.zeros_like(x)) for rank, w in enumerate(ADDENDS)]
    )


@functools.cache
def _machine() -> VirtualMesh:
    return VirtualMesh(MESH.sizes)


def _execute(
    module: ModuleType, program: Program, feeds: Sequence[Tensor], tangents: Mapping[int, Tensor], outcome: Outcome
) -> dict[str, Tensor]:
    """Run the generated code on every rank; outputs go into `outcome`, the gradients are returned by name."""
    machine = _machine()

    def local(slot: Slot, whole: Tensor, rank: int) -> Tensor:
        return cut(whole, slot.cuts, machine.coordinates(rank), machine.axes)

    def arguments(rank: int) -> tuple[Tensor, ...]:
        return tuple(
            local(s, feeds[s.index] if s.role == "input" else program.constants[s.name], rank) for s in module.INPUTS
        )

    ran = machine.run(module.forward, arguments, random=module.RANDOM)
    outputs = {
        slot.index: _pasted(slot, [result[0][k] for result in ran], outcome)
        for k, slot in enumerate(module.OUTPUTS)
        if slot.role == "output"
    }
    constants = [None if isinstance(leaf, int) else leaf for leaf in program.out_leaves]
    assert all(leaf is None or isinstance(leaf, Constant) for leaf in constants), constants
    outcome.outputs = [
        leaf.value if isinstance(leaf, Constant) else outputs[leaf]  # type: ignore[index]
        for leaf in program.out_leaves
    ]
    if not tangents or not hasattr(module, "backward"):
        return {}
    given: dict[int, Tensor] = {}
    for leaf, tangent in tangents.items():
        position = program.out_leaves[leaf]
        assert isinstance(position, int)
        given[position] = given[position] + tangent if position in given else tangent
    back = machine.run(
        module.backward,
        lambda rank: ([*ran[rank][1], *(local(s, given[s.index], rank) for s in module.TANGENTS)],),
        random=False,
    )
    return {
        slot.name: _pasted(slot, [result[k] for result in back], outcome) for k, slot in enumerate(module.GRADIENTS)
    }


def _pasted(slot: Slot, parts: Sequence[Tensor], outcome: Outcome) -> Tensor:
    if not slot.cuts and not all(torch.allclose(parts[0], part, equal_nan=True) for part in parts[1:]):
        outcome.disagree.append(str(slot))
    return paste(parts, slot.shape, slot.cuts, MESH.sizes)


def _trace(graph: fx.Graph, program: Program, sums: set[fx.Node]) -> Iterator[Step]:
    """What ran, from the local graph, in order. Conversions of outputs are no part of it."""
    entries = {node for node in graph.nodes if (chosen := chosen_of(node)) is not None and chosen.op.node in sums}
    for node in graph.nodes:
        if node.op != "call_function" or node in entries or collective_of(node) is not None:
            continue
        if node.target is operator.getitem or (chosen_of(node) is None and node.target not in VIEWS):
            continue
        if chosen_of(node) is None and any(collective_of(user) is not None for user in node.users):
            continue  # part of a conversion
        operands = [_came(operand, entries) for operand in node.all_input_nodes]
        made = [node] if lowered(node).layout is not None else list(node.users)
        yield Step(
            _name(node.target),
            origin_of(node).phase,
            [now for _, now, _ in operands],
            [placement_of(n) for n in made],
            [(before, now) for before, now, moved in operands if moved],
            _is_view(node.target),
        )
    for port, result in zip(program.outputs, graph.output_node().args[0], strict=True):
        if result is not None:
            source = _source(result, entries)[0]
            if source.op == "placeholder" or source in entries:
                phase = "backward" if port.role is Role.GRADIENT else "forward"
                yield Step("identity", phase, [placement_of(source)], [placement_of(source)], [], True)


def _name(target: Any) -> str:
    """`mm.default`, or the name of a function of the runtime."""
    return str(target).removeprefix("aten.") if isinstance(target, torch._ops.OpOverload) else target.__name__


def _came(operand: fx.Node, entries: set[fx.Node]) -> tuple[str, str, bool]:
    """How a value was made, how it is when it is used, and whether it was converted between."""
    source, moved = _source(operand, entries)
    return placement_of(source), placement_of(operand), moved


def _source(node: fx.Node, entries: set[fx.Node]) -> tuple[fx.Node, bool]:
    """Where a value was made, past views and conversions; whether it was converted."""
    moved = False
    while node.op == "call_function" and chosen_of(node) is None and node.target is not operator.getitem:
        moved |= collective_of(node) is not None
        node = node.all_input_nodes[0]
    if node in entries and node.all_input_nodes[0].op != "placeholder":
        moved = True  # the addends were brought together before they were summed
    return node, moved


def placement_of(node: fx.Node) -> str:
    """`R`, `P` or `S<dim>`."""
    layout = lowered(node).layout
    if layout is None:
        return "R"
    placement = layout.placement(AXIS)
    return "P" if isinstance(placement, P) else f"S{placement.dim}" if isinstance(placement, S) else "R"


_VIEW_NAMES = {"detach", "alias", "clone", "is_same_size", "_unsafe_view", "_reshape_alias", "zeros_like", "ones_like"}
_VIEW_NAMES |= {"_to_copy"}


def _is_view(target: Any) -> bool:
    """Whether an operator computes nothing: views, copies and constants."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    looks = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    return looks or schema.name.removeprefix("aten::") in _VIEW_NAMES
