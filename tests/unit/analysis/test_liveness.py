"""After which line of a function a value is dead."""

from __future__ import annotations

from torch import fx

from shardc.analysis.liveness import dead_after


def names(dead: dict[int, list[fx.Node]]) -> dict[int, list[str]]:
    return {line: [node.name for node in values] for line, values in dead.items()}


def test_a_value_is_dead_after_its_last_reader_unless_it_is_kept() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(len, (x,))
    unread = graph.call_function(len, (w,))
    z = graph.call_function(max, (x, y))
    lines = [[*node.all_input_nodes, node] for node in (y, unread, z)]
    assert names(dead_after(lines, kept=[z, None])) == {1: ["w", "len_2"], 2: ["x", "len_1"]}
    assert names(dead_after(lines, kept=[w, x, z])) == {1: ["len_2"], 2: ["len_1"]}
    assert dead_after([], kept=[]) == {}
