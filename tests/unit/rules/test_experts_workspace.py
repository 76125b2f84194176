"""What the rules of experts say that their bodies allocate, against what ranks hold where routing is balanced."""

from __future__ import annotations

import math

import pytest
import torch

from checks.brute_force import Call
from checks.peaks import peaks
from samples.calls.sample import Sample
from shardc.ir.mesh import Mesh
from shardc.rules.factors.strategy import Side, Strategy, split_of, workspace
from shardc.runtime.kernels.mixture.fused import experts, experts_backward  # noqa: F401  (registers the operators)

FORWARD, BACKWARD = torch.ops.shardc.experts.default, torch.ops.shardc.experts_backward.default
TOKENS, WIDTH, EXPERTS, K = 2048, 256, 4, 2
ACTIVATION = "mul(silu(gate), up)"
SLOPE = "silu_backward(mul(grad, up), gate), mul(grad, silu(gate))"


def call(inner: int, backward: bool) -> Call:
    """A call with room for the mean alone. Every rank's tokens go to all experts alike."""
    ids = (torch.arange(TOKENS * K).view(TOKENS, K)) % EXPERTS
    given = torch.randn(TOKENS, WIDTH), ids, torch.rand(TOKENS, K)
    weights = torch.randn(EXPERTS, 2, inner, WIDTH), None, torch.randn(EXPERTS, WIDTH, inner), None
    if backward:
        grad = torch.randn(TOKENS, WIDTH)
        return Call(Sample(BACKWARD, (grad, *given, *weights, ACTIVATION, SLOPE, True, 1.0)))
    return Call(Sample(FORWARD, (*given, *weights, ACTIVATION, SLOPE, 1.0)))


def local(made: Call, strategy: Strategy, mesh: Mesh, side: Side) -> int:
    split = split_of(made.shape, strategy, side.carried)
    sizes = [
        size if at is None else math.ceil(size / mesh.ways(split[at]))
        for size, at in zip(side.sizes, side.factors, strict=True)
    ]
    return math.prod(sizes) * side.itemsize


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("inner", [32, 384])  # where rows travel, or are summed, is the peak of narrow experts
@pytest.mark.parametrize(("variant", "split"), [("in_parts", "e"), ("in_parts", "f"), ("exchanged", "et")])
def test_predicted_peak_is_what_a_rank_holds(variant: str, split: str, inner: int, backward: bool) -> None:
    made, mesh = call(inner, backward), Mesh((("x", 2),))
    wanted = tuple(("x",) if f.name in split else () for f in made.shape.factors)
    strategy = next(s for s in made.strategies(mesh) if s.variant == variant and s.split == wanted and not s.passes)
    sides = [*made.shape.operands, *made.shape.results]
    predicted = sum(local(made, strategy, mesh, side) for side in sides) + workspace(made.shape, strategy, mesh)
    found = peaks(made, strategy, mesh)
    # in collectives the threads of a virtual mesh hold what belongs to others, for as long as they happen to take
    assert any(predicted == pytest.approx(one, rel=0.05) for one in found), (predicted, found)
