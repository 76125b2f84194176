"""Sweeps and lending prove what they claim, however long they go on."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.triplets import Groups
from shardc.solver.problem import Problem
from shardc.solver.proof.certificate import check
from shardc.solver.proof.prove import Prover, Target
from shardc.solver.solve import solve

SWEEPS = 300


@pytest.mark.parametrize("seed", range(4))
def test_many_rounds_of_lending_stay_in_scale(seed: int) -> None:
    """Triplets that share pairs pass constants round and round. Were those to grow, rounding would raise the bound
    above what its own messages and loans prove, and above the optimum."""
    rng, problem, count = np.random.default_rng(seed), Problem(), 12
    for v in range(count):
        problem.add_variable(f"v{v}", rng.random(3))
    for u, v in itertools.combinations(range(count), 2):
        if v - u <= 3:
            problem.add_edge(u, v, rng.random((3, 3)))
    bound = Bound(problem.unary, problem.edges)
    bound.sweep()
    triples = [t for t in itertools.combinations(range(count), 3) if t[2] - t[0] <= 3]
    bound = bound.with_triplets(triples, [Groups.by(cost) for cost in bound.reduced_costs()], np.inf)
    lower = [bound.sweep() for _ in range(SWEEPS)]
    assert min(np.diff(lower)) > -1e-12
    assert lower[-1] <= solve(problem).cost * (1 + 1e-12)
    proof = Prover(problem, bound, Target(lower[-1], 0.0), time.process_time())
    assert check(problem, proof.certificate()) == pytest.approx(lower[-1], rel=1e-11)
    assert max(float(np.abs(loan).max()) for triplet in bound.triplets for loan in triplet.loans) < SWEEPS
