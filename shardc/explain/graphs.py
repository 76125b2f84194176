"""The graph after a pass, as text."""

from __future__ import annotations

from torch import fx

from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.printing import printed
from shardc.ir.versions import GraphLine
from shardc.planning.compilation import Compilation
from shardc.rules.factors.strategy import make


def graph_after(c: Compilation) -> str:
    """The program as the last pass left it. Up to `assign`, this is the captured program with the layouts that are
    known; from `reshard` on, the lowered graph; after `codegen`, the generated code."""
    return c.code() if c.has("code") else printed(*lines_after(c))


def lines_after(c: Compilation) -> tuple[list[GraphLine], Mesh, dict[fx.Node, Layout]]:
    """The lines of that graph, the mesh, and the layouts that are known beside those in the facts of nodes."""
    if c.has("lowered"):
        return c.lowered.lines(), c.mesh, {}
    layouts = _spread(c) if c.has("spread") else {}
    if c.has("assignment"):
        layouts |= _chosen(c)
    return c.program.version.lines(), c.mesh, layouts


def _spread(c: Compilation) -> dict[fx.Node, Layout]:
    """The layouts of values after constraints have spread, by node."""
    axes = c.spread.axes
    return {node: value.form.layout_on(tuple(axes[value.key])) for node, value in c.factored.values.items()}


def _chosen(c: Compilation) -> dict[fx.Node, Layout]:
    """The layouts in which operators make their results, by node."""
    assignment, values = c.assignment, c.factored.values
    layouts: dict[fx.Node, Layout] = {}
    for op in c.factored.ops:
        for index, result in enumerate(op.results):
            splits = make(assignment.shapes[op.node], assignment.strategies[op.node], index, c.mesh)
            layout = result.value.form.layout_on(splits.axes, splits.partial)
            named = (op.node, *op.node.users)  # the results of an operator that has several
            layouts |= {node: layout for node in named if values.get(node) is result.value}
    return layouts
