"""Codegen on graphs made by hand."""

from __future__ import annotations

import time

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from shardc.ir.facts import Lowered, describe, origin
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role
from shardc.ir.versions import GraphVersion
from shardc.runtime import load
from shardc.source.module import source_of

MESH = Mesh.parse("dp=1")


def chain(length: int) -> Program:
    """Forward and backward of a chain of equal operators, localized; backward reads all that forward made."""
    graph = fx.Graph()
    value, tangent = graph.placeholder("x"), graph.placeholder("tangent")
    made = [value]
    for _ in range(length):
        made.append(graph.call_function(torch.ops.aten.tanh.default, (made[-1],)))
    gradient = tangent
    for saved in reversed(made[1:]):
        gradient = graph.call_function(torch.ops.aten.tanh_backward.default, (gradient, saved))
    graph.output((made[-1], gradient))
    for place, node in enumerate(graph.nodes):
        phase = "" if node.op == "placeholder" else "forward" if place < length + 2 else "backward"
        describe(node, Lowered(origin("tower", "tower.py:1", phase), torch.float32, Layout.whole((4, 4))))
    inputs = [Port(Role.INPUT, "input:0"), Port(Role.TANGENT, "")]
    outputs = [Port(Role.OUTPUT, ""), Port(Role.GRADIENT, "input:0")]
    return Program(GraphVersion.of(graph), inputs, outputs, tree_flatten(0)[1], [0])


def test_what_backward_reads_is_saved_and_every_value_dropped_after_its_last_use() -> None:
    program = chain(2)
    source = source_of(program.graph, program, MESH)
    assert "    return (tower,), (tower_tanh, tower)\n" in source
    backward = source.partition("def backward")[2]
    assert "    del tangent, tower\n" in backward


def test_equal_stretches_become_a_loop_and_what_differs_stays_beside_it() -> None:
    """The fifth layer adds something else than the others do."""
    graph = fx.Graph()
    given = [graph.placeholder(f"w{number}") for number in range(8)]
    value = given[0]
    for layer, weight in enumerate(given):
        for operator in (torch.ops.aten.tanh, torch.ops.aten.sin, torch.ops.aten.cos):
            value = graph.call_function(operator.default, (value,))
        value = graph.call_function(torch.ops.aten.add.Tensor, (value, weight), {"alpha": 3 if layer == 4 else 2})
    graph.output((value,))
    for node in graph.nodes:
        describe(node, Lowered(origin("", "", "forward"), torch.float32, Layout.whole((4, 4))))
    inputs = [Port(Role.INPUT, f"input:{number}", number) for number in range(8)]
    program = Program(GraphVersion.of(graph), inputs, [Port(Role.OUTPUT, "")], tree_flatten(0)[1], [0])
    source = source_of(graph, program, MESH)
    assert "for i in range(4):" in source and source.count("aten.tanh.default") < 8
    weights = [torch.randn(4, 4) for _ in range(8)]
    ((found,), _), expected = load(source).forward(*weights), weights[0]
    for layer, weight in enumerate(weights):
        expected = expected.tanh().sin().cos() + weight * (3 if layer == 4 else 2)
    assert torch.allclose(found, expected)


def test_time_is_linear_in_the_length_of_the_program() -> None:
    """Eight times the length takes eight times as long, not sixty-four."""

    def seconds(program: Program) -> float:
        start = time.process_time()
        source_of(program.graph, program, MESH)
        return time.process_time() - start

    programs = chain(500), chain(4000)
    short, long = (min(seconds(program) for _ in range(3)) for program in programs)
    assert long < 20 * short
