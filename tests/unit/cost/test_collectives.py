"""What collectives cost: formulas against values computed by hand, the wiring of axes, and hardware files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardc.cost.calibrate import fit, wiring
from shardc.cost.collectives import ALGORITHMS, TEXTBOOK, Line, Wires
from shardc.cost.hardware import Hardware, Link, hardware
from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh

FILES = sorted(path.stem for path in (Path(__file__).parents[3] / "shardc/cost/hardware").glob("*.toml"))
# One node of 4: 1 s a hop, 10 bytes a second. Two nodes of 4: between them 5 s a hop, 2 bytes a second for one ring.
NODE = Wires(4, 1, Line(1.0, 0.1), Line(5.0, 0.5))
NODES = Wires(4, 2, Line(1.0, 0.1), Line(5.0, 0.5))


def seconds(kind: str, algorithm: str, wires: Wires, size: float) -> float:
    made = ALGORITHMS[kind][algorithm](wires)
    return min(line.at(size) for line in (made if isinstance(made, list) else [made]))


@pytest.mark.parametrize(
    ("kind", "algorithm", "inside", "over_nodes"),
    [
        # an operand of 80 bytes
        ("all_gather", "ring", 3 + 3 * 8, 6 * 1 + 5 + 7 * 40),
        ("all_gather", "direct", 1 + 3 * 8, 5 + 4 * 4 * 40),
        ("all_gather", "hierarchical", 3 + 3 * 8, 5 + 160 + 3 + 3 * 16),
        ("reduce_scatter", "ring", 3 + 3 * 2, 6 + 5 + 7 * 5),
        ("reduce_scatter", "hierarchical", 3 + 3 * 2, 3 + 3 * 2 + 5 + 4 * 5),
        ("reduce_scatter", "all_reduce", 2 * (3 + 3 * 2), 2 * (6 + 5 + 7 * 5)),
        ("all_reduce", "ring", 2 * (3 + 3 * 2), 2 * (6 + 5 + 7 * 5)),
        ("all_reduce", "tree", 2 * 3 + 2 * 8, 2 * (3 + 5) + 2 * 40),
        ("all_reduce", "star", 2 * (1 + 3 * 8), 2 * (5 + 7 * 40)),
        ("all_reduce", "direct", 1 + 3 * 8, 5 + 4 * 4 * 40),
        ("all_reduce", "hierarchical", 2 * (3 + 3 * 2), 2 * (3 + 3 * 2) + 2 * (5 + 20)),
        ("all_to_all", "pairwise", 3 + 3 * 2, 3 + 4 * 5 + 4 * 4 * 5),
        ("all_to_all", "torus", 2 * 1 + 8, 4 * 5 + 2 * 40),
        ("permute", "direct", 1 + 8, 5 + 4 * 40),
    ],
)
def test_formulas(kind: str, algorithm: str, inside: float, over_nodes: float) -> None:
    assert seconds(kind, algorithm, NODE, 80.0) == pytest.approx(inside)
    assert seconds(kind, algorithm, NODES, 80.0) == pytest.approx(over_nodes)


def test_a_tree_is_chosen_where_latency_rules_and_a_ring_where_bandwidth_does() -> None:
    device, mesh = replace(hardware("h100"), algorithms={"all_reduce": ("ring", "tree")}), Mesh((("dp", 64),))
    ring, tree = (replace(device, algorithms={"all_reduce": (name,)}) for name in ("ring", "tree"))

    def all_reduce(one: Hardware, size: float) -> float:
        return one.collective_seconds("all_reduce", size, mesh, "dp")

    for size, best in ((1e3, tree), (1e10, ring)):
        assert all_reduce(device, size) == all_reduce(best, size) == min(all_reduce(ring, size), all_reduce(tree, size))
    assert all_reduce(tree, 1e3) < all_reduce(ring, 1e3) / 4
    assert all_reduce(ring, 1e10) < all_reduce(tree, 1e10)


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
        wires = PLAIN.wires(Mesh.parse(mesh), axis, "all_reduce")
        assert (wires.near, wires.nodes) == (near, nodes)
        if nodes > 1:
            assert 1 / wires.between.per_byte == pytest.approx(share * 1e9, rel=0.15)  # distance slows a little


def test_rings_of_all_devices_of_a_node_share_its_uplink() -> None:
    """Eight rings through a node take eight times as long as one."""
    one, eight = Mesh.parse("dp=8"), Mesh.parse("dp=8,tp=8")
    alone = replace(PLAIN, devices_per_node=1, between=Link(0.0, 80e9))
    shared = replace(PLAIN, between=Link(0.0, 80e9))
    ratio = shared.collective_seconds("all_reduce", 1e9, eight, "dp") / alone.collective_seconds(
        "all_reduce", 1e9, one, "dp"
    )
    assert ratio == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("name", FILES)
def test_our_files_load_and_name_the_source_of_every_number(name: str) -> None:
    device = hardware(name)
    assert device.name == name and device.memory > 1e9 and set(device.algorithms) == set(ALGORITHMS)
    assert device.compute_seconds(1e12, 0.0, torch.bfloat16) < device.compute_seconds(2e12, 0.0, torch.bfloat16)
    text = (Path(__file__).parents[3] / f"shardc/cost/hardware/{name}.toml").read_text()
    for line in text.splitlines():
        if re.match(r"(memory|memory_bandwidth|launch|start|latency|bandwidth) *=|\[flops\]", line):
            assert re.search(r"# .*\w", line), f"{name}.toml: a number without unit and source: {line}"


GOOD = (Path(__file__).parents[3] / "shardc/cost/hardware/h100.toml").read_text()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[inside]", "[within]", r"lacks the table \[inside\]"),
        ("memory_bandwidth =", "bandwidth =", "lacks memory_bandwidth"),
        ("latency = 1.9e-6", "latency = 'fast'", "inside.latency is 'fast', not a number"),
        ("bandwidth = 370e9", "bandwidth = -1", "inside.bandwidth is -1; it must be above zero"),
        ("overlap = 0.9 ", "overlap = 9 ", "between.overlap is 9.0; it is a part, from 0 to 1"),
        ("overlap = 0.9 ", "stall = -1e-6 ", "between.stall is -1e-06"),
        ("devices_per_node = 8", "devices_per_node = 8.5", "devices_per_node is 8.5, not a whole number"),
        ("float32 =", "float31 =", "lacks flops.float32"),
        ('"tree"', '"shrub"', "algorithms.all_reduce is .*'shrub'.*some of ring, tree, star, direct, hierarchical"),
        ("all_reduce = [", "allreduce = [", "no collective is called 'allreduce'; they are all_gather,"),
        ("[between]", "[inside.measured.gather]\nlatency = 1\nbandwidth = 1\n[between]", "measured names gather"),
        ("[between]", "profile = [[2, 1.0], [1, 1.0]]\n[between]", r"inside\.profile is .* by ascending bytes"),
        ("[between]", "profile = [3]\n[between]", r"inside\.profile is \[3\]"),
        ("[between]", "[inside.spanning.permute]\nlatency = 1\nbandwidth = 1\n[between]", "spanning is not read"),
        ("[flops]", "[flops", "h100.toml is no TOML"),
    ],
)
def test_a_file_that_is_wrong_is_one_message(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "h100.toml"
    assert before in GOOD
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(ShardcError, match=message) as caught:
        hardware(path)
    assert str(path) in str(caught.value)


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "\n[inside.measured.all_gather]\nlatency = 1e-3\nbandwidth = 1e6\n")
    device, mesh = hardware(str(path)), Mesh.parse("tp=8")
    assert device.name == "mine"
    gather, reduce = (device.collective_seconds(kind, 0.0, mesh, "tp") for kind in ("all_gather", "reduce_scatter"))
    assert gather == pytest.approx(9.6e-6 + 7e-3) and reduce == pytest.approx(9.6e-6 + 7 * 1.9e-6)
    with pytest.raises(ShardcError, match=r"no hardware file .*nowhere\.toml; `shardc calibrate"):
        hardware(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
def test_a_fit_finds_the_link_that_made_the_times(kind: str) -> None:
    device, mesh = replace(PLAIN, inside=Link(3e-5, 2e9)), Mesh.parse("tp=4")
    times = [(size, device.collective_seconds(kind, size, mesh, "tp") + 1e-6) for size in (1e3, 1e4, 1e5, 1e6)]
    found = fit(kind, TEXTBOOK[kind][0], wiring(4), 1e-6, times)
    assert found.link.latency == pytest.approx(3e-5) and found.link.bandwidth == pytest.approx(2e9)
    assert found.error < 1e-6


@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
def test_a_fit_along_an_axis_that_spans_nodes_finds_the_link_between_them(kind: str) -> None:
    far = Link(7e-5, 5e7)
    device, mesh = replace(PLAIN, inside=Link(3e-5, 2e9), between=far, devices_per_node=2), Mesh.parse("all=6")
    times = [(size, device.collective_seconds(kind, size, mesh, "all")) for size in (1e3, 1e4, 1e5, 1e6)]
    found = fit(kind, TEXTBOOK[kind][0], wiring(3, 2, 3e-5), device.launch + device.start, times)
    assert found.link.latency == pytest.approx(far.latency) and found.link.bandwidth == pytest.approx(far.bandwidth)


def test_links_along_axes_that_span_nodes_have_figures_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "\n[between.spanning.all_gather]\nlatency = 1e-3\nbandwidth = 1e6\n")
    device, plain = hardware(path), hardware("h100")
    for kind, mesh, axis, same in (
        ("all_gather", "pp=2,tp=16", "tp", False),
        ("all_reduce", "pp=2,tp=16", "tp", True),
        ("all_gather", "pp=2,tp=16", "pp", True),  # one rank a node
        ("all_gather", "dp=16,tp=4", "dp", True),  # two, but rings of four devices side by side
        ("all_gather", "dp=16,tp=4", "tp", True),  # within a node
    ):
        one, other = (each.collective_seconds(kind, 1e6, Mesh.parse(mesh), axis) for each in (device, plain))
        assert (one == other) == same, (kind, mesh, axis)


def test_a_profile_gives_the_times_that_were_measured_and_what_lies_between_them(tmp_path: Path) -> None:
    mesh, times = Mesh.parse("tp=4"), [(1e3, 5e-3), (1e5, 1e-2), (1e6, 4e-1)]
    found = fit("all_gather", "ring", wiring(4), PLAIN.launch, times)
    assert found.error > 0.1  # no straight line

    def seconds(size: float) -> float:
        device = replace(PLAIN, inside=replace(PLAIN.inside, measured={"all_gather": found.link}))
        return device.collective_seconds("all_gather", size, mesh, "tp")

    for size, measured in times:
        assert seconds(size) == pytest.approx(measured)
    (_, low), (_, high) = found.link.profile[1:]
    assert found.link.strays(10**5.5) == pytest.approx((low + high) / 2)
    assert found.link.strays(0.0) == found.link.profile[0][1] and found.link.strays(1e9) == high
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace("[between]", "profile = [[1000, 2.0]]\n[between]"))
    mine, plain = hardware(path), hardware("h100")
    args = "all_reduce", 5e3, mesh, "tp"
    assert mine.collective_seconds(*args) == pytest.approx(2.0 * plain.collective_seconds(*args))


def test_a_fit_to_noise_has_a_bandwidth_all_the_same() -> None:
    """Small calls of a slow backend show nothing but latency; a bandwidth of zero or of infinity would be no link."""
    found = fit("all_gather", "ring", wiring(2), 1e-6, [(1e3, 2e-3), (2e3, 1e-3)])
    assert 0 < found.link.bandwidth < float("inf") and found.error < 1
    floor = fit("all_gather", "ring", wiring(2), 1.0, [(1e3, 2e-3), (2e3, 1e-3)])
    assert floor.link.latency == 0.0  # all is within it
