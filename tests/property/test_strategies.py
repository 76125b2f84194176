"""Random strategies of random calls: every rule's samples, on meshes of up to three axes that seldom divide their dims.

An example is one call, cut into atoms at random, on one mesh, under one strategy; NaN stands in all padding.
"""

from __future__ import annotations

import functools
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from checks.brute_force import Call
from checks.fuzz import searched
from samples.calls.elementwise import POINTWISE
from samples.calls.groups import GROUPS
from samples.calls.sample import Sample
from shardc.ir.mesh import Mesh
from shardc.runtime import VirtualMesh

MESHES = ((2,), (3,), (4,), (5,), (6,), (7,), (2, 2), (2, 3), (3, 2), (4, 2), (2, 5), (2, 2, 2), (3, 2, 2))


@functools.cache
def samples() -> tuple[Sample, ...]:
    return tuple(sample for group in (*GROUPS, *POINTWISE) for sample in group())


@functools.cache
def machine(sizes: tuple[int, ...]) -> tuple[Mesh, VirtualMesh]:
    axes = tuple(zip("abc", sizes, strict=False))
    return Mesh(axes), VirtualMesh(dict(axes))


@searched(1500, shrink=False)
@given(random=st.randoms(use_true_random=False))
def test_random_strategies(random: Random) -> None:
    """3,000 of them: two of every call that is drawn."""
    number, split = random.randrange(len(samples())), random.choice(("no", "no", "major", "minor"))
    one = Call(samples()[number], split)
    for _ in range(2):
        mesh, ranks = machine(random.choice(MESHES))
        strategies = one.strategies(mesh)
        if strategies:
            strategy = random.choice(strategies)
            told = one.check(strategy, mesh, ranks)
            assert not told, f"{samples()[number]} split {split} on {mesh}\n  {strategy}\n  {told}"
