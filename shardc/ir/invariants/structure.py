"""What holds of every graph, at every stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from shardc.ir.invariants.invariant import Broken, Checked, Invariant, invariant
from shardc.ir.program import Port, Role, ancestors

_GIVEN = frozenset({Role.PARAMETER, Role.BUFFER, Role.CONSTANT, Role.INPUT, Role.NUMBER, Role.TANGENT})
_MADE = frozenset({Role.OUTPUT, Role.MUTATION, Role.GRADIENT})


@invariant
def nodes_are_inputs_calls_and_an_output(checked: Checked) -> Iterator[Broken]:
    """A graph has placeholders, calls of functions, and one output, which comes last."""
    for place, node in enumerate(checked.nodes):
        if node.op not in ("placeholder", "call_function", "output"):
            yield Broken(node, f"is of the kind {node.op!r}")
        elif (node.op == "output") != (place == len(checked.nodes) - 1):
            yield Broken(node, f"a node of the kind {node.op!r} cannot stand here")


@invariant
def names_are_unique(checked: Checked) -> Iterator[Broken]:
    """No two nodes have the same name."""
    seen = set[str]()
    for node in checked.nodes:
        if node.name in seen:
            yield Broken(node, f"there is another node called %{node.name}")
        seen.add(node.name)


@invariant
def operands_come_first(checked: Checked) -> Iterator[Broken]:
    """Every operand is made before it is read."""
    made = set[fx.Node]()
    for node in checked.nodes:
        for operand in checked.operands[node]:
            if operand not in made:
                yield Broken(node, f"reads %{operand.name}, which is not made before it")
        made.add(node)


@invariant
def inputs_have_ports(checked: Checked) -> Iterator[Broken]:
    """There is one port for every placeholder, and each is the port of something that is given."""
    yield from _ports(checked, checked.program.inputs, len(checked.placeholders), checked.nodes[0], _GIVEN)


@invariant
def outputs_have_ports(checked: Checked) -> Iterator[Broken]:
    """There is one port for every output, and each is the port of something that is made; only gradients may be
    missing."""
    yield from _ports(checked, checked.program.outputs, len(checked.results), checked.output, _MADE)
    for port, node in zip(checked.program.outputs, checked.results, strict=True):
        if node is None and port.role is not Role.GRADIENT:
            yield Broken(checked.output, f"the {port.role.value} {port.name or port.index} is None")


def _ports(
    checked: Checked, ports: Sequence[Port], nodes: int, node: fx.Node, roles: frozenset[Role]
) -> Iterator[Broken]:
    if len(ports) != nodes:
        yield Broken(node, f"the program has {len(ports)} ports for {nodes} nodes")
    seen = set[Port]()
    for port in ports:
        if port.role not in roles:
            yield Broken(node, f"a {port.role.value} stands among the ports here")
        if port in seen:
            yield Broken(node, f"two ports are the {port.role.value} {port.name or port.index}")
        seen.add(port)


@invariant
def forward_needs_no_tangents(checked: Checked) -> Iterator[Broken]:
    """Nothing that outputs and mutations need reads a tangent."""
    needed = ancestors([node for port, node in checked.outputs if port.role is not Role.GRADIENT])
    for port, node in checked.inputs:
        if port.role is Role.TANGENT and node in needed:
            reader = next((user for user in node.users if user in needed), checked.output)
            yield Broken(reader, f"reads the tangent %{node.name}, and an output needs it")


STRUCTURE: tuple[Invariant, ...] = (
    nodes_are_inputs_calls_and_an_output, names_are_unique, operands_come_first, inputs_have_ports, outputs_have_ports,
    forward_needs_no_tangents,
)  # fmt: skip
