"""Versions of a graph: what each pass left, though passes write in place.

A graph of a deep model has thirty thousand nodes, and copying it takes as long as most passes. So a pass may *take* the
graph of a version and write the next version into it. Whoever reads the old version afterwards gets it written anew:

    before = GraphVersion.of(graph)
    after = before.derived("localize", lambda graph: localized(graph, mesh))
    after.read()     # takes the graph of `before` and changes it
    before.read()    # the graph as it was, in new nodes
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from torch import fx
from torch.fx.node import map_arg


class GraphLine(NamedTuple):
    """One node as it was in its version: passes change nodes, but not what a node's facts were."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    meta: Mapping[str, Any]


class GraphVersion:
    """A graph as one pass left it. `write` makes it, and makes it again for whoever reads it after it was taken; where
    it is made already, that is `graph`."""

    def __init__(self, write: Callable[[], fx.Graph], graph: fx.Graph | None = None) -> None:
        self._write = write
        self._graph = graph
        self._was_written = graph is not None
        self._lines: list[GraphLine] | None = None
        self._last: tuple[Hashable, GraphVersion] | None = None
        self.source: GraphVersion | None = None  # the version that this one is derived from
        self.holds: dict[str, Any] = {}  # what the verifier knows to hold of it, by stage

    @staticmethod
    def of(graph: fx.Graph) -> GraphVersion:
        """The first version of a graph that nobody could write again: when it is taken, its lines are noted."""
        version = GraphVersion(lambda: _written(version.lines()), graph)
        version._lines = []
        return version

    def read(self) -> fx.Graph:
        """The graph of this version, to look at."""
        if self._graph is None:
            self._graph = self._write()
            self._was_written = True
        return self._graph

    def write(self) -> None:
        """Write the graph now, unless it was written before: it may have been taken since."""
        if not self._was_written:
            self.read()

    def take(self) -> fx.Graph:
        """The graph of this version, for a pass that writes the next one into it."""
        graph = self.read()
        if self._lines is not None and not self._lines:
            self._lines = _noted(graph)
        self._graph = None
        return graph

    @property
    def taken(self) -> bool:
        """Whether a pass wrote the next version into the graph."""
        return self._was_written and self._graph is None

    def lines(self) -> list[GraphLine]:
        """The nodes of this version in order; the old ones, where its lines were noted when it was taken."""
        return self._lines or _noted(self.read())

    def derived(self, key: Hashable, write: Callable[[fx.Graph], fx.Graph]) -> GraphVersion:
        """The version that `write` makes of this one, when it is read. Asked again for the key that was asked for last,
        the same version."""
        if self._last is None or self._last[0] != key:
            after = GraphVersion(lambda: write(self.take()))
            after.source, self._last = self, (key, after)
        return self._last[1]


def copied(graph: fx.Graph) -> fx.Graph:
    """The graph in new nodes of the same names."""
    return _written(_noted(graph))


def _noted(graph: fx.Graph) -> list[GraphLine]:
    return [GraphLine(node, node.target, node.args, node.kwargs, dict(node.meta)) for node in graph.nodes]


def _written(lines: list[GraphLine]) -> fx.Graph:
    """A graph of new nodes from lines."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for line in lines:
        args, kwargs = map_arg((line.args, dict(line.kwargs)), new.__getitem__)
        new[line.node] = graph.create_node(line.node.op, line.target, args, kwargs, line.node.name)  # type: ignore[arg-type]
        new[line.node].meta = dict(line.meta)
    return graph
