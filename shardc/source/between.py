"""What runs between the runs of a loop: buckets of gradients that begin, or have landed, where a layer ends.

    for _ in range(2):  # layers.3 to layers.2
        grad, new_made = layer_backward(grad, take(saved, 4))
        made += new_made
    bucket_started = all_reduce_bucket.start([*made], axis="dp")
    for _ in range(2):  # layers.1 to layers.0
        grad, new_made = layer_backward(grad, take(saved, 4))
        made += new_made

It is one loop, in stretches. The nodes between its runs are set aside while equal stretches are looked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from torch import fx

from shardc.ir.facts import layer_of
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.bucket import Bucket
from shardc.source.repetition import Loop, repeated


class Found(NamedTuple):
    """Loops among `nodes`, which are those of a function without what runs `between` the runs of a loop. `behind` has
    for the latter the number of the node that it stands behind, of those that are left."""

    loops: list[Loop]
    nodes: Sequence[fx.Node]
    behind: dict[fx.Node, int]

    def run_before(self, node: fx.Node, loop: Loop) -> int | None:
        """The run of a loop that a node stands behind, if another call of the layer follows; else None."""
        place = self.behind.get(node, -1) + 1 - loop.start
        run = place // loop.size - 1
        last = len(loop.runs) if loop.rest else len(loop.runs) - 1
        return run if place > 0 and run < last else None


def loops_among(nodes: Sequence[fx.Node], results: Collection[fx.Node], mesh: Mesh) -> Found:
    """The loops among the nodes of a function that leave the fewest nodes to be written, with what runs between their
    runs set aside where that helps. `results` must be there when the function ends."""
    found = Found(repeated(nodes, results, mesh), nodes, {})
    aside = _at_borders(nodes)
    if not aside:
        return found
    left = [node for node in nodes if node not in aside]
    behind, place = dict[fx.Node, int](), -1
    for node in nodes:
        if node in aside:
            behind[node] = place
        else:
            place += 1
    read = {operand for node in aside for operand in node.all_input_nodes if operand not in aside}
    other = Found(repeated(left, {*results, *read}, mesh), left, behind)
    within = any(_within(loop, place) for loop in other.loops for place in behind.values())
    return found if within or _written(other) >= _written(found) else other


def _within(loop: Loop, place: int) -> bool:
    """Whether what stands behind the node at `place` would stand within a run."""
    return loop.start <= place < loop.stop - 1 and (place + 1 - loop.start) % loop.size != 0


def _written(found: Found) -> int:
    """How many nodes are written, in functions of layers and beside them."""
    saved = sum(loop.size * (len(loop.runs) - 1) + len(loop.rest) for loop in found.loops)
    return len(found.nodes) + len(found.behind) - saved


def _at_borders(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Buckets, and what is made of them, where one layer has ended and the next has not begun."""
    trailing = _trailing(nodes)
    found, stretch, before = set[fx.Node](), list[fx.Node](), ""
    for node in nodes:
        if node in trailing:
            stretch.append(node)
            continue
        layer = layer_of(node)
        if layer != before:
            found.update(stretch)
        stretch, before = [], layer
    return found


def _trailing(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The buckets, and all that is made of what they bring."""
    found = set[fx.Node]()
    for node in nodes:
        if isinstance(node.target, Bucket) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
