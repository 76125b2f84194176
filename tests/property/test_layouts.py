"""Layouts on random meshes: text and DTensor round trips, cuts and pastes; every conversion moves the right values."""

from __future__ import annotations

import itertools
import math
import re
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.distributed.tensor import Partial, Replicate, Shard

from checks.fuzz import searched
from shardc.capture.trace import capture
from shardc.cost.conversion import TensorClass, step_seconds
from shardc.cost.hardware import Hardware, Link
from shardc.errors import LayoutError
from shardc.ir.facts import NOWHERE, Lowered, describe, laid
from shardc.ir.layout import Atom, Layout
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits, apply
from shardc.passes.localize import localized
from shardc.passes.normalize import normalized
from shardc.passes.reshard import _Rewrite
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.rules.factors.factored import Factored
from shardc.rules.factors.factoring import factor
from shardc.runtime import Executable, cut, load, paste
from shardc.runtime.mesh.orders import FOLDED, in_order
from shardc.source.module import source_of

randoms = st.randoms(use_true_random=False)


def mesh_of(random: Random, least: int = 1) -> Mesh:
    """One to three axes, at most twelve ranks."""
    sizes = random.choice(
        [s for n in (1, 2, 3) for s in itertools.product((least, 2, 3, 4), repeat=n) if math.prod(s) <= 12]
    )
    return Mesh(tuple(zip(("a", "b", "c"), sizes, strict=False)))


def layout_of(random: Random, mesh: Mesh) -> Layout:
    """A layout with compound dims, axes in any order, and sometimes a partial axis."""
    free = list(mesh.names)
    random.shuffle(free)
    partial = [free.pop()] if free and random.random() < 0.2 else []
    dims: list[tuple[Atom, ...]] = []
    for _ in range(random.randint(0, 3)):
        atoms: list[Atom] = []
        for _ in range(random.choice((1, 1, 2, 3))):
            axes = tuple(free.pop() for _ in range(random.choice((0, 0, 1, 1, 2))) if free)
            if axes and mesh.sizes[axes[-1]] > 1 and random.random() < 0.2:
                axes = (*axes[:-1], in_order(axes[-1], FOLDED))
                atoms.append(Atom(2 * mesh.ways(axes) * random.choice((1, 1, 2, 3)), axes))
                continue
            even = random.random() < 0.7
            atoms.append(Atom(mesh.ways(axes) * random.choice((1, 1, 2, 3)) if even else random.randint(2, 9), axes))
        dims.append(tuple(atoms))
    op = random.choice(("sum", "max"))
    return Layout(tuple(dims), tuple((axis, op) for axis in partial))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


@searched(300)
@given(random=randoms)
def test_text_round_trip(random: Random) -> None:
    mesh = mesh_of(random)
    layout = layout_of(random, mesh)
    layout.check(mesh)
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(f"bf16{layout}") == layout


@searched(300)
@given(random=randoms)
def test_a_text_is_read_whole_or_refused(random: Random) -> None:
    """Texts of layouts with a few characters too many, too few, or others: what is read is all that stood there."""
    text = list(describe_layout(random))
    for _ in range(random.randint(1, 3)):
        place, new = random.randrange(len(text) + 1), random.choice("0148@@@(),, []+abx~.")
        text[place : place + random.choice((0, 0, 1))] = random.choice((new, new, ""))
    try:
        layout = Layout.parse("".join(text))
    except LayoutError:
        return
    dims = "".join(text).partition("[")[2]
    assert re.sub(r"[\s()]", "", dims) == re.sub(r"[\s()]", "", str(layout)[1:])
    assert Layout.parse(str(layout)) == layout


def describe_layout(random: Random) -> str:
    return f"bf16{layout_of(random, mesh_of(random))}"


@searched(300)
@given(random=randoms)
def test_cuts_lead_to_the_local_shape_and_back(random: Random) -> None:
    mesh = mesh_of(random)
    layout = layout_of(random, mesh)
    simple = layout.simplify(mesh)
    assert simple.simplify(mesh) == simple
    assert simple.shape == layout.shape and simple.local_shape(mesh) == layout.local_shape(mesh)
    whole = numbered(layout.shape)
    ranks = [
        dict(zip(mesh.names, at, strict=True)) for at in itertools.product(*(range(n) for n in mesh.sizes.values()))
    ]
    try:
        cuts = layout.cuts(mesh)
    except LayoutError as error:
        assert "does not divide, and stands before others" in str(error)
        return
    parts = [cut(whole, cuts, rank, mesh.sizes) for rank in ranks]
    assert all(tuple(part.shape) == layout.local_shape(mesh) for part in parts)
    assert all(
        torch.equal(part, cut(whole, simple.cuts(mesh), rank, mesh.sizes))
        for part, rank in zip(parts, ranks, strict=True)
    )
    assert torch.equal(paste(parts, layout.shape, cuts, mesh.sizes), whole)
    assert Layout.from_cuts(cuts, layout.shape, mesh, layout.partial) == simple


@searched(300)
@given(random=randoms)
def test_dtensor_round_trip_or_an_error(random: Random) -> None:
    mesh = mesh_of(random)
    layout = layout_of(random, mesh)
    try:
        placements = layout.to_dtensor(mesh)
    except LayoutError as error:
        assert "DTensor cannot express" in str(error)
        return
    assert Layout.from_dtensor(placements, layout.shape, mesh) == layout.simplify(mesh)


@searched(300)
@given(random=randoms)
def test_placements_of_dtensor_round_trip(random: Random) -> None:
    """Plain placements: axes split a dim in mesh order, as DTensor does."""
    mesh = mesh_of(random, least=2)
    rank = random.randint(1, 3)
    placements = [random.choice([Replicate(), Partial("sum"), *(Shard(d) for d in range(rank))]) for _ in mesh.axes]
    shape = tuple(mesh.size * random.choice((1, 2)) for _ in range(rank))
    layout = Layout.from_dtensor(placements, shape, mesh)
    for dim in range(rank):
        axes = tuple(a for a, p in zip(mesh.names, placements, strict=True) if p == Shard(dim))
        assert layout.dims[dim] == (Atom(shape[dim], axes),)
    assert layout.to_dtensor(mesh) == tuple(placements)


def machine(random: Random) -> Hardware:
    """Random links, so that different paths are cheapest."""

    def link() -> Link:
        return Link(random.choice((0.0, 1e-6)), 10.0 ** random.randint(3, 8))

    return Hardware(
        "random", {"float32": 1e9}, 10.0 ** random.randint(3, 9), 1e-9, random.choice((1, 2, 4)), link(), link()
    )


class Scaled(nn.Module):
    """Views `x` as its atoms, so that the compiler must tell them apart."""

    def __init__(self, atoms: tuple[int, ...]) -> None:
        super().__init__()
        self.atoms = atoms

    def forward(self, x: Tensor) -> Tensor:
        return x.view(self.atoms) * 2


@searched(250)
@given(random=randoms)
def test_every_conversion_moves_the_right_values(random: Random) -> None:
    """From whole to a random layout, to another, and back where that cannot leave; the price is that of the steps."""
    mesh, device = mesh_of(random), machine(random)
    atoms = tuple(random.choice((2, 3, 4, 5, 6, 7, 8, 9, 12)) for _ in range(random.randint(1, 3)))
    breaks = [i for i in range(1, len(atoms)) if random.random() < 0.5]
    shape = tuple(math.prod(atoms[i:j]) for i, j in itertools.pairwise([0, *breaks, len(atoms)]))
    ops = random.choice((("sum",), ("sum", "max"), ("sum", "min")))
    x = numbered(shape) + 1
    program = normalized(capture(Scaled(atoms), (x,), grad=False))
    factored = factor(program)
    key = (program.placeholders[0], 0)
    assert factored.sizes(key) == atoms
    folds = tuple(tuple(axis for axis in mesh.names if random.random() < 0.5) for _ in atoms)
    tensor = TensorClass(atoms, 8, ops, mesh, device, folds=folds)
    whole = Splits(((),) * len(atoms))
    start, end = random.choice(tensor.layouts), random.choice(tensor.layouts)

    _price(tensor, start, end)
    network = SimpleNamespace(factored=factored, mesh=mesh, class_of=lambda _: tensor)
    rewrite = _Rewrite(cast(CostNetwork, network), Assignment({}, {}, {}, {}))
    node = rewrite.graph.placeholder("x")
    facts = Lowered(NOWHERE, x.dtype, factored.base[key].form.layout(whole.axes), key)
    describe(node, facts)
    back = bool(end.partial) or not _sliceable(factored, key, end, mesh)
    for one, other in ((whole, start), (start, end), *([(end, whole)] if back else [])):
        node = _walk(rewrite, key, node, one, other)
    rewrite.graph.output((node,))
    source = source_of(localized(rewrite.graph, mesh), program, mesh)
    executable = Executable(load(source))
    (found,) = executable.run({}, [x])
    assert torch.equal(found, x), f"{atoms} as {shape}: {start} -> {end} on {mesh}\n{source}"
    if not back:
        assert executable.outputs[0].cuts == laid(node).simplify(mesh).cuts(mesh)
    sent = _sent(tensor, whole, start) + _sent(tensor, start, end) + (_sent(tensor, end, whole) if back else 0)
    assert sum(executable.mesh.traffic.values()) == pytest.approx(sent)


def _sliceable(factored: Factored, key: tuple[fx.Node, int], splits: Splits, mesh: Mesh) -> bool:
    layout = factored.base[key].form.layout(splits.axes)
    try:
        layout.cuts(mesh)
    except LayoutError:
        return False
    return True


def _walk(rewrite: _Rewrite, key: tuple[fx.Node, int], node: fx.Node, start: Splits, end: Splits) -> fx.Node:
    rewrite.here.held[key] = {start: node}
    rewrite._walk(key, start, end)
    return rewrite.here.held[key][end]


def _price(tensor: TensorClass, start: Splits, end: Splits) -> None:
    """The table's entry is the sum of the steps of the path, and the path leads there."""
    total, here = 0.0, start
    for step in tensor.path(start, end):
        there = apply(here, step, tensor.mesh)
        moved = tensor.operand_bytes(here, there, step)
        folded = bool(step.orders)
        total += step_seconds(step.collective, step.axis, moved, tensor.mesh, tensor.device, folded)
        here = there
    assert here == end
    assert tensor.seconds[tensor.index[start], tensor.index[end]] == pytest.approx(total)


def _sent(tensor: TensorClass, start: Splits, end: Splits) -> float:
    """Bytes that the path sends."""
    total, here = 0.0, start
    for step in tensor.path(start, end):
        there = apply(here, step, tensor.mesh)
        total += step.collective.sent(tensor.mesh.sizes[step.axis], tensor.operand_bytes(here, there, step))
        here = there
    return total


def test_moves_that_cost_nothing_lead_there_too() -> None:
    """A tensor without elements over links without latency: every move is free, and walking in a circle as cheap."""
    free = Hardware("free", {"float32": 1.0}, 1.0, 0.0, 4, Link(0.0, 1.0), Link(0.0, 1.0))
    tensor = TensorClass((0, 4), 4, ("sum",), Mesh((("a", 4),)), free)
    for start, end in itertools.product(tensor.layouts, repeat=2):
        direct = not (end.partial and any(start.axes))
        assert len(tensor.path(start, end)) == (0 if start == end else 1 if direct else 2)
