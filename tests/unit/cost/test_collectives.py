"""What collectives cost: formulas against values computed by hand, and the wiring of axes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardc.cost.collectives import ALGORITHMS, Line, Wires
from shardc.cost.hardware import Hardware, Link, hardware
from shardc.ir.mesh import Mesh
from shardc.runtime import all_gather, all_reduce, all_to_all, permute, reduce_scatter
from shardc.runtime.collectives.collective import AnyCollective

# One node of 4: 1 s a hop, 10 bytes a second. Two nodes of 4: between them 5 s a hop, 2 bytes a second for one ring.
NODE = Wires(4, 1, Line(1.0, 0.1), Line(5.0, 0.5))
NODES = Wires(4, 2, Line(1.0, 0.1), Line(5.0, 0.5))


def seconds(kind: AnyCollective, algorithm: str, wires: Wires, size: float) -> float:
    made = ALGORITHMS[kind][algorithm](wires)
    return min(line.at(size) for line in (made if isinstance(made, list) else [made]))


@pytest.mark.parametrize(
    ("kind", "algorithm", "inside", "over_nodes"),
    [
        # an operand of 80 bytes
        (all_gather, "ring", 3 + 3 * 8, 6 * 1 + 5 + 7 * 40),
        (all_gather, "direct", 1 + 3 * 8, 5 + 4 * 4 * 40),
        (all_gather, "hierarchical", 3 + 3 * 8, 5 + 160 + 3 + 3 * 16),
        (reduce_scatter, "ring", 3 + 3 * 2, 6 + 5 + 7 * 5),
        (reduce_scatter, "hierarchical", 3 + 3 * 2, 3 + 3 * 2 + 5 + 4 * 5),
        (reduce_scatter, "all_reduce", 2 * (3 + 3 * 2), 2 * (6 + 5 + 7 * 5)),
        (all_reduce, "ring", 2 * (3 + 3 * 2), 2 * (6 + 5 + 7 * 5)),
        (all_reduce, "tree", 2 * 3 + 2 * 8, 2 * (3 + 5) + 2 * 40),
        (all_reduce, "star", 2 * (1 + 3 * 8), 2 * (5 + 7 * 40)),
        (all_reduce, "direct", 1 + 3 * 8, 5 + 4 * 4 * 40),
        (all_reduce, "hierarchical", 2 * (3 + 3 * 2), 2 * (3 + 3 * 2) + 2 * (5 + 20)),
        (all_to_all, "pairwise", 3 + 3 * 2, 3 + 4 * 5 + 4 * 4 * 5),
        (all_to_all, "torus", 2 * 1 + 8, 4 * 5 + 2 * 40),
        (permute, "direct", 1 + 8, 5 + 4 * 40),
    ],
)
def test_formulas(kind: AnyCollective, algorithm: str, inside: float, over_nodes: float) -> None:
    assert seconds(kind, algorithm, NODE, 80.0) == pytest.approx(inside)
    assert seconds(kind, algorithm, NODES, 80.0) == pytest.approx(over_nodes)


def test_a_tree_is_chosen_where_latency_rules_and_a_ring_where_bandwidth_does() -> None:
    device, mesh = replace(hardware("h100"), algorithms={all_reduce: ("ring", "tree")}), Mesh((("dp", 64),))
    ring, tree = (replace(device, algorithms={all_reduce: (name,)}) for name in ("ring", "tree"))

    def taken(one: Hardware, size: float) -> float:
        return one.collective_seconds(all_reduce, size, mesh, "dp")

    for size, best in ((1e3, tree), (1e10, ring)):
        assert taken(device, size) == taken(best, size) == min(taken(ring, size), taken(tree, size))
    assert taken(tree, 1e3) < taken(ring, 1e3) / 4
    assert taken(ring, 1e10) < taken(tree, 1e10)


PLAIN = Hardware("plain", {"float32": 1e12}, 1e12, 0.0, 8, Link(1e-6, 100e9), Link(1e-5, 80e9))


@pytest.mark.parametrize(
    ("mesh", "wiring"),
    [
        # axis: ranks in a node, nodes, GB/s that one ring has between nodes
        ("dp=8", {"dp": (8, 1, 80)}),
        ("dp=2,tp=8", {"dp": (1, 2, 10), "tp": (8, 1, 80)}),
        ("dp=4,tp=4", {"dp": (2, 2, 20), "tp": (4, 1, 80)}),
        ("dp=64", {"dp": (8, 8, 80)}),
        ("a=2,b=16,c=2", {"a": (1, 2, 10), "b": (4, 4, 40), "c": (2, 1, 80)}),
        ("dp=3,tp=8", {"dp": (1, 3, 10), "tp": (8, 1, 80)}),
        ("dp=12", {"dp": (4, 3, 80)}),  # 4 a node of 8: of 12 ranks, every node has to have as many
        ("dp=2,tp=3", {"dp": (2, 1, 80), "tp": (3, 1, 80)}),  # fits into one node
        ("dp=4,tp=3", {"dp": (1, 4, 80 / 3), "tp": (1, 3, 80)}),  # some group of 3 crosses the border of a node of 8
    ],
)
def test_axes_are_mapped_to_links_by_position(mesh: str, wiring: dict[str, tuple[int, int, float]]) -> None:
    for axis, (near, nodes, share) in wiring.items():
        wires = PLAIN.wires(Mesh.parse(mesh), axis, all_reduce)
        assert (wires.near, wires.nodes) == (near, nodes)
        if nodes > 1:
            assert 1 / wires.between.per_byte == pytest.approx(share * 1e9, rel=0.15)  # distance slows a little


def test_rings_of_all_devices_of_a_node_share_its_uplink() -> None:
    """Eight rings through a node take eight times as long as one."""
    one, eight = Mesh.parse("dp=8"), Mesh.parse("dp=8,tp=8")
    alone = replace(PLAIN, devices_per_node=1, between=Link(0.0, 80e9))
    shared = replace(PLAIN, between=Link(0.0, 80e9))
    ratio = shared.collective_seconds(all_reduce, 1e9, eight, "dp") / alone.collective_seconds(
        all_reduce, 1e9, one, "dp"
    )
    assert ratio == pytest.approx(8, rel=0.1)


def test_neighbours_of_a_ring_share_the_uplink_less() -> None:
    """Of eight ranks in two nodes, one of each node sends to the other, not four."""
    link, uplink = Link(0.0, 4e9), Link(0.0, 1e9)
    device = Hardware("two nodes", {"float32": 1e12}, 1e12, 0.0, 4, link, uplink)
    mesh = Mesh.parse("a=8")
    seconds = [device.passing_seconds(1e9, mesh, "a", by) for by in (1, 2, 3, 4, 5, 7)]
    assert seconds == pytest.approx([1.0, 2.0, 3.0, 4.0, 3.0, 1.0])
    assert device.collective_seconds(permute, 1e9, mesh, "a") == pytest.approx(4.0)
    assert device.passing_seconds(1e9, Mesh.parse("a=4"), "a", 1) == pytest.approx(0.25)
