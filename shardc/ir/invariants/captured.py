"""What holds of the captured program, from capture to assign."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import FACTS, Captured, origin_of
from shardc.ir.invariants.inference import Described, Failure, disagreements
from shardc.ir.invariants.invariant import Broken, Checked, Invariant, invariant, of_another_stage, quoted
from shardc.ir.program import Role, ancestors, value_of


@invariant
def inputs_come_first(checked: Checked) -> Iterator[Broken]:
    """All placeholders stand before all calls."""
    for node in checked.nodes[: len(checked.placeholders)]:
        if node.op != "placeholder":
            yield Broken(node, "stands before a placeholder")


@invariant
def facts_are_captured(checked: Checked) -> Iterator[Broken]:
    """Every node but the output has captured facts: a fake value, several, or a size, and where it comes from."""
    yield from of_another_stage(checked, Captured)
    values = (torch.Tensor, tuple, list, torch.SymInt, torch.SymFloat, torch.SymBool)
    for node in checked.nodes:
        facts = node.meta.get(FACTS)
        if isinstance(facts, Captured) and not isinstance(facts.value, values):
            yield Broken(node, f"has the value {facts.value!r}, which is no tensor")


@invariant
def values_are_inferred(checked: Checked) -> Iterator[Broken]:
    """The fake value of a call has the shape and the dtype that the operator makes of its operands."""
    for node in checked.calls:
        if node.target is operator.getitem:
            source, index = node.args
            yield from _not_made(node, _known(value_of(source)[index]))  # type: ignore[arg-type]
        else:
            yield from disagreements(
                node, lambda operand: _known(value_of(operand)), checked.device, partial(_not_made, node)
            )


def _not_made(node: fx.Node, made: Any) -> Iterator[Broken]:
    value = value_of(node)
    if isinstance(made, Failure):
        yield Broken(node, f"cannot run on its operands: {made.reason}")
    elif isinstance(made, Described) != isinstance(value, torch.Tensor) and isinstance(made, tuple):
        yield Broken(node, f"has the value {value}, its operands make {made}")
    elif isinstance(made, Described) and _known(value) not in (None, made):
        yield Broken(node, f"has the value {_shown(_known(value))}, its operands make {_shown(made)}")
    elif type(made) is tuple:
        for index, (one, other) in enumerate(zip(made, value, strict=False)):
            if one is not None and _known(other) not in (None, one):
                yield Broken(node, f"has the value {_shown(_known(other))} at {index}, makes {_shown(one)}")


@invariant
def forward_reads_nothing_of_backward(checked: Checked) -> Iterator[Broken]:
    """A node of forward reads no node of backward."""
    for node in checked.calls:
        if origin_of(node).phase == "forward":
            late = [operand for operand in checked.operands[node] if origin_of(operand).phase == "backward"]
            if late:
                yield Broken(node, f"is of forward, and reads {quoted(late)} of backward")


@invariant
def tangents_pair_with_outputs(checked: Checked) -> Iterator[Broken]:
    """Every tangent is that of an output, and has its shape and dtype."""
    outputs = {port.index: node for port, node in checked.outputs if port.role is Role.OUTPUT}
    for port, node in checked.inputs:
        if port.role is not Role.TANGENT:
            continue
        if port.index not in outputs:
            yield Broken(node, f"is the tangent of output {port.index}, which there is none of")
        else:
            yield from _pairs(node, outputs[port.index], "output")


@invariant
def gradients_pair_with_inputs(checked: Checked) -> Iterator[Broken]:
    """Every gradient is that of a parameter or an input, and has its shape and dtype."""
    for port, node in checked.outputs:
        if port.role is Role.GRADIENT:
            if port.name not in checked.by_name:
                yield Broken(node, f"is the gradient of {port.name!r}, which is neither parameter nor input")
            else:
                yield from _pairs(node, checked.by_name[port.name], "parameter or input")


@invariant
def gradients_read_the_tangents_that_they_name(checked: Checked) -> Iterator[Broken]:
    """A gradient that depends on some outputs reads no tangents of others."""
    named = checked.program.depends_on
    if not named:
        return
    tangents = {node: port.index for port, node in checked.inputs if port.role is Role.TANGENT}
    for port, node in checked.outputs:
        if port in named:
            read = {tangents[before] for before in ancestors([node]) if before in tangents}
            if not read <= set(named[port]):
                yield Broken(node, f"depends on the outputs {named[port]}, and reads tangents of {tuple(sorted(read))}")


@invariant
def mutations_pair_with_what_they_change(checked: Checked) -> Iterator[Broken]:
    """Every mutation is the new value of a tensor of the model or an input, and has its shape and dtype."""
    roles = (Role.PARAMETER, Role.BUFFER, Role.CONSTANT, Role.INPUT)
    changed = {port.name: node for port, node in checked.inputs if port.role in roles}
    for port, node in checked.outputs:
        if port.role is Role.MUTATION:
            if port.name not in changed:
                yield Broken(node, f"is the new value of {port.name!r}, which is neither of the model nor an input")
            else:
                yield from _pairs(node, changed[port.name], port.role.value)


def _pairs(node: fx.Node, other: fx.Node, what: str) -> Iterator[Broken]:
    one, two = _known(value_of(node)), _known(value_of(other))
    if one is not None and two is not None and one != two:
        yield Broken(node, f"is {_shown(one)}, its {what} %{other.name} is {_shown(two)}")


def _known(value: Any) -> Described | None:
    """Shape and dtype of a tensor whose sizes are numbers: to ask for those that are symbols would fix them."""
    if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return None
    return Described(tuple(value.shape), value.dtype)


def _shown(value: Described | None) -> str:
    return "several tensors" if value is None else f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


CAPTURED: tuple[Invariant, ...] = (
    inputs_come_first, facts_are_captured, values_are_inferred, forward_reads_nothing_of_backward,
    tangents_pair_with_outputs, gradients_pair_with_inputs, gradients_read_the_tangents_that_they_name,
    mutations_pair_with_what_they_change,
)  # fmt: skip
