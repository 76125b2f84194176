"""Every strategy of every operator that has a rule, against the operator on whole tensors."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import pytest
import torch

from checks.brute_force import Call
from samples.calls.elementwise import POINTWISE
from samples.calls.groups import GROUPS
from samples.calls.matrices import MATRICES
from samples.calls.sample import Sample
from samples.calls.split_dims import PARTED
from shardc.ir.mesh import Mesh
from shardc.rules.notation import registered
from shardc.runtime import VirtualMesh

MOST = 40
"""Of a sample's strategies on the mesh of two axes, no more than this are run."""

RUNS = (
    ("no", (("a", 2),)),
    ("no", (("a", 3),)),
    ("major", (("a", 2),)),
    ("minor", (("a", 3),)),
    ("no", (("a", 2), ("b", 2))),
    ("no", (("a", 4),)),
    ("major", (("a", 5),)),
)
"""How operands' dims are cut into atoms, and the mesh. Four and five ranks divide few of the samples' dims."""


def name_of(operator: Any) -> str:
    return str(operator) if isinstance(operator, torch._ops.OpOverload) else operator.__name__


def _by_operator() -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for group in (*GROUPS, *MATRICES, *PARTED, *POINTWISE):
        for sample in group():
            found[name_of(sample.target)].append(sample)
    return dict(found)


SAMPLES = _by_operator()


@functools.cache
def machine(*axes: tuple[str, int]) -> tuple[Mesh, VirtualMesh]:
    return Mesh(axes), VirtualMesh(dict(axes))


@functools.cache
def checked(name: str) -> tuple[int, tuple[str, ...]]:
    """How many strategies were run, and what was wrong with them."""
    count, wrong = 0, list[str]()
    for sample in SAMPLES[name]:
        calls = {split: Call(sample, split) for split in dict(RUNS)}
        for split, axes in RUNS:
            mesh, ranks = machine(*axes)
            call = calls[split]
            strategies = call.strategies(mesh)
            strategies = strategies[:: -(-len(strategies) // MOST)]
            count += len(strategies)
            where = f"{sample} split {split} on {mesh}\n  factors {call.op.factors}"
            told = call.check_all(strategies, mesh, ranks)
            wrong += [f"{where}\n  {strategy}\n  {what}" for strategy, what in told.items()]
    return count, tuple(wrong)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_strategy(name: str) -> None:
    count, wrong = checked(name)
    assert count >= 5 * len(SAMPLES[name])
    assert not wrong, f"{len(wrong)} of {count} strategies are wrong; the first:\n{wrong[0]}"


def test_every_rule_has_a_sample() -> None:
    ours = [name for name in registered() if not name.startswith("paired.")]  # the toys of other tests of this process
    without = [name for name in ours if name not in SAMPLES]
    assert without == [], "add a sample in tests/samples/calls"
