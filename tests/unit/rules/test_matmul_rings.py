"""Rings of matrix products: every strategy against the product of whole tensors, what they hold, where they are
offered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from checks.brute_force import Call
from checks.peaks import peaks
from samples.calls.sample import Sample, real
from shardc.analysis.bodies import body_of
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import Hardware, hardware
from shardc.ir.mesh import Mesh
from shardc.planning.strategies import OperatorOptions, rings_of, strategies_of
from shardc.rules.factors.rings import circle_of
from shardc.rules.factors.strategy import Strategy, legal, workspace
from shardc.runtime import VirtualMesh

aten = torch.ops.aten
MM: Any = aten.mm.default
SAMPLES = {
    "mm": Sample(MM, (real(12, 18), real(18, 30))),
    "mm, uneven": Sample(MM, (real(7, 9), real(9, 11))),
    "mm, transposed": Sample(MM, (real(18, 12).t(), real(30, 18).t())),
    "mm, parts that are empty": Sample(MM, (real(6, 6), real(6, 6))),
    "bmm": Sample(aten.bmm.default, (real(2, 6, 9), real(2, 9, 12))),
    "addmm": Sample(aten.addmm.default, (real(30), real(12, 18), real(18, 30)), {"beta": 0.5, "alpha": 2.0}),
    "baddbmm": Sample(aten.baddbmm.default, (real(6, 12), real(2, 6, 9), real(2, 9, 12))),
}
RUNS = {
    "two": ("no", {"a": 2}),
    "three": ("no", {"a": 3}),
    "four": ("no", {"a": 4}),
    "five": ("no", {"a": 5}),
    "major": ("major", {"a": 2}),
    "minor": ("minor", {"a": 3}),
    "two by two": ("major", {"a": 2, "b": 2}),
}
NODE = Mesh.parse("a=8")


def rings(call: Call, mesh: Mesh) -> list[Strategy]:
    return rings_of(call.shape, mesh, mesh.names, frozenset(call.shape.rings)).strategies


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_ring(name: str, run: str) -> None:
    """Values to 1e-10, with NaN in the padding, and the bytes that a rank sends."""
    split, axes = RUNS[run]
    mesh, call = Mesh(tuple(axes.items())), Call(SAMPLES[name], split)
    machine, found = VirtualMesh(axes), rings(call, mesh)
    for strategy in found[:: -(-len(found) // 24)]:
        assert legal(call.shape, strategy, mesh)
        assert not call.check(strategy, mesh, machine), strategy
    kinds = {"ring_lhs", "ring_rhs", "ring_sum"}
    assert {strategy.variant for strategy in found} == kinds


def test_no_other_strategy_splits_two_factors_by_an_axis() -> None:
    call, mesh = Call(SAMPLES["mm"]), Mesh.parse("a=2,b=2")
    for strategy in strategies_of(call.shape, mesh).strategies:
        axes = [axis for several in strategy.split for axis in several]
        assert len(axes) == len(set(axes)) and not strategy.variant
        assert not legal(call.shape, strategy._replace(variant="ring_sum"), mesh)
    for strategy in rings(call, mesh):
        assert not legal(call.shape, strategy._replace(variant=""), mesh)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("count", "split"), [(2, "no"), (4, "no"), (2, "minor")])
def test_what_a_ring_holds(count: int, split: str, dtype: torch.dtype) -> None:
    sample = Sample(MM, tuple(real(*shape).to(dtype) for shape in ((288, 192), (192, 288))))
    call, mesh = Call(sample, split), Mesh((("a", count),))
    for strategy in rings(call, mesh):
        chunks = [mesh.chunk(f.size, axes) for f, axes in zip(call.shape.factors, strategy.split, strict=True)]
        circle = circle_of(call.shape, strategy)
        assert circle is not None
        whole = mesh.chunk(call.shape.factors[circle.around].size, strategy.split[circle.around][:-1])
        total = 0
        for side in (*call.shape.operands, *call.shape.results):
            both = {circle.inside, circle.around} <= side.carried
            total += (
                side.itemsize
                * torch.Size(
                    [whole if both and f == circle.around else chunks[f] for f in side.factors if f is not None]
                ).numel()
            )
        predicted = total + workspace(call.shape, strategy, mesh)
        found = max(max(peaks(call, strategy, mesh)) for _ in range(2))
        assert 0.97 * found <= predicted <= 1.2 * found, strategy


def options(device: Hardware, rows: int, width: int, hidden: int) -> OperatorOptions:
    """The strategies of a product in bfloat16 on a node."""
    shape = Call(Sample(MM, (torch.zeros(2, 2), torch.zeros(2, 2)))).shape
    sizes = {"m": rows, "k": width, "n": hidden}
    factors = tuple(replace(f, size=sizes[f.name]) for f in shape.factors)

    def sided(side: Any) -> Any:
        return replace(side, sizes=tuple(factors[f].size for f in side.factors), itemsize=2)

    shape = replace(
        shape, factors=factors, dtype=torch.bfloat16, operands=tuple(map(sided, shape.operands)),
        results=tuple(map(sided, shape.results)),
    )  # fmt: skip
    classes = [
        [TensorClass(side.sizes, 2, ("sum",), NODE, device) for side in sides]
        for sides in (shape.operands, shape.results)
    ]
    return OperatorOptions(shape, NODE, device, *classes, offered=frozenset(shape.rings))


def test_rings_are_offered_where_links_overlap_and_products_are_large() -> None:
    h100 = hardware("h100")
    silent = replace(h100, inside=replace(h100.inside, overlap=0.0))
    for width, hidden, kind in ((8192, 28672, "ring_lhs"), (28672, 8192, "ring_sum")):
        large = options(h100, 8192, width, hidden)
        assert {large.strategies[place].variant for place in large.rings} == {kind}
    assert not options(silent, 8192, 8192, 28672).rings
    assert not options(h100, 64, 64, 64).rings


def test_a_ring_that_is_offered_beats_all_conversions_around_a_plain_product() -> None:
    large = options(hardware("h100"), 8192, 8192, 28672)
    for place in large.rings:
        ring, seconds = large.strategies[place], large.seconds[place]
        body = body_of(large.shape, ring, NODE, large.device)
        assert seconds == pytest.approx(body.compute + body.exposed) and len(body.steps) == 8
        assert sum(len(step.beside) for step in body.steps) == 7
        for other in range(len(large.strategies)):
            if other not in large.rings:
                instead = large.seconds[other] + sum(
                    one.seconds[layouts[place], layouts[other]]
                    for one, layouts in zip(large.operand_classes, large.operand_layouts, strict=True)
                )
                instead += large.result_classes[0].seconds[
                    large.result_layouts[0][other], large.result_layouts[0][place]
                ]
                assert seconds < instead
