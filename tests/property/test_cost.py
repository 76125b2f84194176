"""What prices of collectives must obey, whatever the hardware and the mesh."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from checks.fuzz import searched
from shardc.cost.collectives import ALGORITHMS
from shardc.cost.hardware import Hardware, Link
from shardc.ir.mesh import Mesh
from shardc.runtime import all_reduce

randoms = st.randoms(use_true_random=False)
KINDS = list(ALGORITHMS)


def link(random: Random) -> Link:
    return Link(random.choice((0.0, 10.0 ** random.uniform(-7, -3))), 10.0 ** random.uniform(6, 12))


def machine(random: Random) -> Hardware:
    """Any links; of every kind of collective some of its algorithms."""
    chosen = {kind: tuple(random.sample(sorted(known), random.randint(1, len(known)))) for kind, known in
              ALGORITHMS.items()}  # fmt: skip
    node = random.choice((1, 2, 4, 6, 8, 64))
    return Hardware("random", {"float32": 1e12}, 1e12, 1e-6, node, link(random), link(random), algorithms=chosen)


def mesh_of(random: Random) -> Mesh:
    return Mesh(tuple((name, random.choice((2, 3, 4, 6, 8, 16))) for name in "abc"[: random.randint(1, 3)]))


@searched(300)
@given(random=randoms)
def test_wiring_accounts_for_every_rank(random: Random) -> None:
    device, mesh = machine(random), mesh_of(random)
    for axis, ways in mesh.axes:
        wires = device.wires(mesh, axis, all_reduce)
        assert wires.near * wires.nodes == ways
        assert wires.near <= max(device.devices_per_node, 1)


@searched(300)
@given(random=randoms)
def test_more_bytes_never_cost_less_and_faster_links_never_cost_more(random: Random) -> None:
    device, mesh, kind = machine(random), mesh_of(random), random.choice(KINDS)
    axis, size = random.choice(mesh.names), random.choice((0.0, 10.0 ** random.uniform(0, 10)))
    price = device.collective_seconds(kind, size, mesh, axis)
    assert price >= device.launch
    assert device.collective_seconds(kind, size * 2, mesh, axis) >= price
    level = random.choice(("inside", "between"))
    old: Link = getattr(device, level)
    for better in (Link(old.latency / 2, old.bandwidth), Link(old.latency, old.bandwidth * 2)):
        faster = replace(device, **{level: better})
        assert faster.collective_seconds(kind, size, mesh, axis) <= price * (1 + 1e-12)


@searched(300)
@given(random=randoms)
def test_a_larger_choice_of_algorithms_never_costs_more(random: Random) -> None:
    device, mesh, kind = machine(random), mesh_of(random), random.choice(KINDS)
    axis, size = random.choice(mesh.names), 10.0 ** random.uniform(0, 10)
    every = replace(device, algorithms={name: tuple(known) for name, known in ALGORITHMS.items()})
    assert every.collective_seconds(kind, size, mesh, axis) <= device.collective_seconds(kind, size, mesh, axis)


@searched(300)
@given(random=randoms)
def test_no_all_reduce_sends_less_than_its_lower_bound(random: Random) -> None:
    """2(n-1)/n · B over the faster of the links (Patarasuk and Yuan 2009), with the whole uplink to oneself."""
    device, mesh = machine(random), mesh_of(random)
    axis, size = random.choice(mesh.names), 10.0 ** random.uniform(0, 10)
    fastest = max(device.inside.bandwidth, device.between.bandwidth)
    least = 2 * (mesh.sizes[axis] - 1) / mesh.sizes[axis] * size / fastest
    assert device.collective_seconds(all_reduce, size, mesh, axis) >= least * (1 - 1e-12)
