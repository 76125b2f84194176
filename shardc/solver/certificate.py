"""A proof of a lower bound that anybody can check in one pass over the unreduced problem.

A certificate holds two finite messages per edge `e = (u, v)`. Moving them between the terms changes no total cost, so

    sum_v min_x (c_v[x] + sum_e m_ev[x])  +  sum_e min_xy (t_e[x, y] - m_eu[x] - m_ev[y])   <=   cost of every choice

whatever the messages are: a wrong certificate can only prove too little. `check` shares no code with the solver.

What it proves is the bound of the linear relaxation at best. Where the exact solve had to close a gap by
elimination or by branching, `check` returns less than the optimum; `Solution.lower_bound` (proved by the search,
not by the certificate) and `Solution.certified_bound` (what `check` returned) are reported side by side for that
reason.
"""

import math
from dataclasses import dataclass

import numpy as np

from shardc.solver.problem import Array, Edge, Problem


@dataclass(frozen=True)
class Certificate:
    """Messages `(m_eu, m_ev)` per edge; an edge that is left out has zero messages."""

    messages: dict[Edge, tuple[Array, Array]]


def check(problem: Problem, certificate: Certificate) -> float:
    """The lower bound that the certificate proves, rounded down by more than the arithmetic can have erred."""
    unary = [np.array(cost, dtype=np.float64) for cost in problem.unary]
    error = [np.abs(cost, where=np.isfinite(cost), out=np.zeros_like(cost)) for cost in unary]
    terms: list[float] = []
    rounding: list[float] = []
    for edge in certificate.messages:
        if edge not in problem.edges:
            raise ValueError(f"the certificate speaks of {edge}, which is no edge of the problem")
    for (u, v), table in problem.edges.items():
        if (u, v) not in certificate.messages:
            terms.append(float(table.min()))
            continue
        to_u, to_v = certificate.messages[(u, v)]
        if to_u.shape != unary[u].shape or to_v.shape != unary[v].shape:
            raise ValueError(f"messages of {(u, v)} do not fit the domains")
        if not (np.isfinite(to_u).all() and np.isfinite(to_v).all()):
            raise ValueError(f"messages of {(u, v)} are not finite")
        left = table - to_u[:, None] - to_v[None, :]
        terms.append(float(left.min()))
        rounding.append(abs(terms[-1]) + 2.0 * float(np.abs(to_u).max() + np.abs(to_v).max()))
        unary[u] += to_u
        unary[v] += to_v
        error[u] += np.abs(to_u)
        error[v] += np.abs(to_v)
    degree = [1] * len(unary)
    for u, v in problem.edges:
        degree[u] += 1
        degree[v] += 1
    for v, cost in enumerate(unary):
        terms.append(float(cost.min()))
        rounding.append(degree[v] * float(error[v].max()))
    if not all(math.isfinite(term) for term in terms):
        return math.inf  # a variable or an edge without any finite entry: nothing is feasible
    return math.fsum(terms) - 4.0 * float(np.finfo(np.float64).eps) * math.fsum(rounding)
