"""Prove a folded network: the messages of its middle layers are those of a ring.

    embed  L0 [L1 L2 ... L124] L125  head     ->     R0 -> R1 -> R2 -> R0    and    embed  L0 ~ ~ L125  head

Messages of a template, carried over to all layers, lose a little in each: what is tight at the cut need not be tight
where two layers of the middle meet. In a ring of copies of one layer, all meet alike.

Let a choice that repeats be the
best one, and let a bound meet its cost. Then every term is least at that choice; so is the mean of a term over the
copies. So the mean of the messages over the copies proves as much, and is the same for each.

With these messages in the middle, the layers before and behind the cut share no edge any more, and are proved for
themselves. Nothing of this has to be believed: the check of the certificate tells whether all messages together meet
the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from itertools import combinations

import numpy as np

from shardc.solver import tuning
from shardc.solver.layers.fold import Fold, Messages, enter
from shardc.solver.problem import Array, Edge, Problem, evaluate, zeros
from shardc.solver.proof.certificate import Certificate

ProveFunction = Callable[[Problem, Sequence[int], Certificate], Certificate]
"""A certificate for a problem and its best choice; another is where it may begin."""


def ring_certificate(
    problem: Problem, folded: Fold, choice: Sequence[int], known: Certificate, ring: ProveFunction, ends: ProveFunction
) -> Certificate | None:
    """A certificate for a network, from the choice for its template and what is proved there. `ring` and `ends` prove
    the parts. None where the layers cannot all take the values of the last one before the cut, or are linked otherwise
    than in a ring."""
    ahead, before = folded.ahead, {*folded.ahead.values()}
    pairs = sorted({(min(pair), max(pair)) for pair in (folded.edges[edge] for edge in folded.cut)})
    beside = folded.inside - before - ahead.keys()
    if any(pair not in folded.template.edges or not beside.isdisjoint(pair) for pair in pairs):
        return None
    middle = _middle(folded, pairs, choice, known, ring)
    if middle is None:
        return None
    across = {(a, b) for a, b in pairs if (a in ahead and b in before) or (b in ahead and a in before)}
    parted = _parted(folded, across, middle)
    left = {edge: pair for edge, pair in known.messages.items() if edge in parted.edges}
    spans = (before.isdisjoint(one.variables) or ahead.keys().isdisjoint(one.variables) for one in known.triplets)
    lenders = tuple(one for one, whole in zip(known.triplets, spans, strict=True) if whole)
    certificate = ends(parted, choice, Certificate(left, lenders))
    lenders = tuple(map(folded.kept_lender, certificate.triplets))
    met = problem.edges.keys() | {pair for lender in lenders for pair in combinations(lender.variables, 2)}
    placed = (((folded.kept[a], folded.kept[b]), pair) for (a, b), pair in certificate.messages.items())
    messages = {edge: pair for edge, pair in placed if edge in met}  # an edge that skips a layer has moved
    for edge in folded.cut:
        enter(messages, edge, folded.edges[edge], middle)
    return Certificate(messages, lenders)


def _middle(
    folded: Fold, pairs: Sequence[Edge], choice: Sequence[int], known: Certificate, prove: ProveFunction
) -> Messages | None:
    """The messages of the layers that were cut out, by pairs of the template."""
    template, ahead, before = folded.template, folded.ahead, {*folded.ahead.values()}
    problem, chosen = Problem(), list[int]()
    number: dict[tuple[int, int], int] = {}

    def place(v: int, copy: int) -> int:
        """The variable of the ring for one of the template."""
        inside = v in before or v in ahead
        original, where = (ahead.get(v, v), (copy + (v in ahead)) % tuning.RING_COPIES) if inside else (v, -1)
        if (original, where) not in number:
            part = 1.0 if inside else tuning.RING_COPIES / folded.count  # all layers share what is in none
            number[original, where] = problem.add_variable(template.names[v], template.unary[original] * part)
            chosen.append(choice[original])
        return number[original, where]

    for copy in range(tuning.RING_COPIES):
        for v in sorted(before):
            place(v, copy)
    meets: dict[Edge, list[Edge]] = {}
    for a, b in pairs:
        meets[a, b] = [(place(a, copy), place(b, copy)) for copy in range(tuning.RING_COPIES)]
        for u, v in meets[a, b]:
            problem.add_edge(u, v, template.edges[a, b])
    if not math.isfinite(evaluate(problem, chosen)):
        return None
    nothing = {(u, v): (zeros(len(problem.unary[u])), zeros(len(problem.unary[v]))) for u, v in problem.edges}
    start: Messages = {}
    for pair, edges in meets.items():
        for edge in edges:
            enter(start, edge, pair, known.messages)
    proved = nothing | prove(problem, chosen, Certificate(start)).messages
    return {pair: _mean([_of(proved, edge) for edge in edges]) for pair, edges in meets.items()}


def _of(messages: Messages, edge: Edge) -> tuple[Array, Array]:
    """The messages of an edge in the order of its variables as given."""
    u, v = edge
    if u < v:
        return messages[u, v]
    second, first = messages[v, u]
    return first, second


def _mean(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    one, other = (np.mean(side, axis=0) for side in zip(*pairs, strict=True))
    return one, other


def _parted(folded: Fold, across: Set[Edge], middle: Messages) -> Problem:
    """The template without the edges across the cut, but with the messages of what led to layers that were cut out."""
    template, place = folded.template, {v: i for i, v in enumerate(folded.kept)}
    unary = list(template.unary)
    for edge in folded.cut:
        for v, message in zip(edge, _of(middle, folded.edges[edge]), strict=True):
            if v in place:
                unary[place[v]] = unary[place[v]] + message
    edges = {edge: table for edge, table in template.edges.items() if edge not in across}
    return Problem(unary, edges, template.names)
