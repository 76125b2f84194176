"""Codegen on graphs made by hand."""

from __future__ import annotations

import time

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role
from shardc.ir.versions import GraphVersion
from shardc.passes.codegen import codegen

MESH = Mesh.parse("dp=2")


def chain(length: int) -> Program:
    """Forward and backward of a chain of equal operators, localized; backward reads all that forward made."""
    graph = fx.Graph()
    value, tangent = graph.placeholder("x"), graph.placeholder("tangent")
    made = [value]
    for _ in range(length):
        made.append(graph.call_function(torch.ops.aten.relu.default, (made[-1],)))
    gradient = tangent
    for saved in reversed(made):
        gradient = graph.call_function(torch.ops.aten.threshold_backward.default, (gradient, saved, 0))
    graph.output((made[-1], gradient))
    for node in graph.nodes:
        node.meta |= {"layout": Layout.whole((4, 4)), "dtype": torch.float32}
    inputs = [Port(Role.INPUT, "input:0"), Port(Role.TANGENT, "")]
    outputs = [Port(Role.OUTPUT, ""), Port(Role.GRADIENT, "input:0")]
    return Program(GraphVersion.of(graph), inputs, outputs, tree_flatten(0)[1], [0])


def test_what_backward_reads_is_saved_and_every_value_dropped_after_its_last_use() -> None:
    program = chain(2)
    source = codegen(program.graph, program, MESH)
    assert "    return (relu_default_1,), (x, relu_default, relu_default_1)\n" in source
    backward = source.partition("def backward")[2]
    assert "    del relu_default_1, tangent\n" in backward
    assert "    del relu_default, threshold_backward_default\n" in backward


def test_time_is_linear_in_the_length_of_the_program() -> None:
    """Eight times the length takes eight times as long, not sixty-four."""

    def seconds(program: Program) -> float:
        start = time.process_time()
        codegen(program.graph, program, MESH)
        return time.process_time() - start

    programs = chain(500), chain(4000)
    short, long = (min(seconds(program) for _ in range(3)) for program in programs)
    assert long < 20 * short
