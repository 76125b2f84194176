"""Layers that end alike call one function for that end, in graphs made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from shardc.ir.facts import Lowered, describe, origin
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role
from shardc.ir.versions import GraphVersion
from shardc.runtime import load
from shardc.source.module import source_of

aten = torch.ops.aten
Begins = Sequence[Callable[..., Tensor]]
ENDS: Begins = [
    aten.sin.default, aten.cos.default, aten.tanh.default, aten.atan.default, aten.neg.default, aten.erf.default,
    aten.asinh.default, aten.cos.default, aten.sin.default, aten.sigmoid.default, aten.tanh.default, aten.erf.default,
    aten.atan.default,
]  # fmt: skip
ONE: Begins = [aten.exp.default, aten.neg.default, aten.exp.default, aten.sigmoid.default]
OTHER: Begins = [aten.neg.default, aten.exp.default, aten.neg.default, aten.exp.default, aten.sigmoid.default]


def tower(begins: Sequence[Begins], kept: Sequence[Sequence[int]]) -> Program:
    """Layers that begin with other operators, then run ENDS and add a weight; of each layer some of what ENDS made is
    an output."""
    graph = fx.Graph()
    given = [graph.placeholder(f"w{number}") for number in range(len(begins))]
    value, results = given[0], list[fx.Node]()
    for number, (begin, places) in enumerate(zip(begins, kept, strict=True)):
        made = list[fx.Node]()
        for place, call in enumerate((*begin, *ENDS)):
            value = graph.call_function(call, (value,))
            made.append(value)
            line = f"layer.py:{place - len(begin)}"
            describe(value, Lowered(origin(f"layers.{number}", line, "forward"), torch.float32, Layout.whole((4, 4))))
        results += [made[len(begin) + place] for place in places]
        value = graph.call_function(aten.add.Tensor, (value, given[number]))
        describe(value, Lowered(origin(f"layers.{number}", "", "forward"), torch.float32, Layout.whole((4, 4))))
    graph.output((value, *results))
    for node in given:
        describe(node, Lowered(origin("", ""), torch.float32, Layout.whole((4, 4))))
    inputs = [Port(Role.INPUT, f"input:{number}", number) for number in range(len(given))]
    outputs = [Port(Role.OUTPUT, "", number) for number in range(1 + len(results))]
    return Program(GraphVersion.of(graph), inputs, outputs, tree_flatten(0)[1], list(range(1 + len(results))))


def test_layers_may_be_those_of_a_loop_and_leave_something_else() -> None:
    """Four operators repeat within the layers, too; the last of them leave what the others do not."""
    graph = fx.Graph()
    value, results = graph.placeholder("x"), list[fx.Node]()
    for number in range(12):
        for call in ENDS[:4]:
            value = graph.call_function(call, (value,))
            describe(value, Lowered(origin("", "", "forward"), torch.float32, Layout.whole((4, 4))))
        results += [value] if number > 8 else []
    graph.output(tuple(results))
    describe(next(iter(graph.nodes)), Lowered(origin("", ""), torch.float32, Layout.whole((4, 4))))
    outputs = [Port(Role.OUTPUT, "", number) for number in range(3)]
    program = Program(
        GraphVersion.of(graph), [Port(Role.INPUT, "input:0")], outputs, tree_flatten(0)[1], [0, 1, 2]
    )  # fmt: skip
    (found, _) = load(source_of(graph, program, Mesh.parse("dp=1"))).forward(x := torch.randn(4, 4))
    for _ in range(9):
        x = x.sin().cos().tanh().atan()
    for one in found:
        x = x.sin().cos().tanh().atan()
        torch.testing.assert_close(one, x)


def expected(begins: Sequence[Begins], kept: Sequence[Sequence[int]], weights: Sequence[Tensor]) -> list[Tensor]:
    value, results = weights[0], list[Tensor]()
    for begin, places, weight in zip(begins, kept, weights, strict=True):
        for call in begin:
            value = call(value)
        made = list[Tensor]()
        for call in ENDS:
            value = call(value)
            made.append(value)
        results += [made[place] for place in places]
        value = value + weight
    return [value, *results]


@pytest.mark.parametrize(
    ("begins", "kept", "functions"),
    [
        ([ONE] * 6, [[1, 6]] * 2 + [[6]] * 4, 1),  # the first two keep one more
        ([ONE] * 6, [[6]] * 3 + [[2, 6]] * 3, 1),  # the last three do
        ([ONE] * 2 + [OTHER] * 4, [[1, 6]] * 2 + [[6, 9]] * 4, 3),
        ([ONE] * 2 + [OTHER] * 3 + [ONE] * 2, [[1, 6]] * 2 + [[6, 9]] * 3 + [[6]] * 2, 4),
        ([ONE] * 2 + [OTHER] * 4, [[]] * 2 + [[6]] * 4, 2),  # the first leave nothing: they share nothing
    ],
)
def test_an_end_that_is_alike_is_one_function(
    begins: Sequence[Begins], kept: Sequence[Sequence[int]], functions: int
) -> None:
    program = tower(begins, kept)
    source = source_of(program.graph, program, Mesh.parse("dp=1"))
    weights = [torch.randn(4, 4) for _ in begins]
    (found, _) = load(source).forward(*weights)
    torch.testing.assert_close(list(found), expected(begins, kept, weights))
    assert source.count("\ndef layer") == functions, source
