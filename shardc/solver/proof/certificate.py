"""A proof of a lower bound that anybody can check in one pass over the unreduced problem.

A certificate holds two finite messages per edge `e = (u, v)`. Moving them between the terms (a *reparametrisation*)
changes no total cost, so

    sum_v min_x (c_v[x] + sum_e m_ev[x])  +  sum_e min_xy (t_e[x, y] - m_eu[x] - m_ev[y])   <=   cost of every choice

whatever the messages are: a wrong certificate can only prove too little. `check` shares no code with the solver.

    costs [0, 1] and [0, 1], table [[9, 0], [0, 9]]      minima alone prove 0; every choice costs at least 1
    messages [1, 0] and [0, -1]      costs [1, 1] and [0, 0], table [[8, 0], [0, 10]]: the minima prove 1

That is the bound of the linear program over pairs at best, and cycles can keep it below the optimum. So a certificate
may hold triplets. A triplet over `a < b < c` lends to its three pairs, `l_ab`, `l_bc` and `l_ac`, and owes what it
lent:

    each of the pairs      min_xy (t_e[x, y] - m_eu[x] - m_ev[y] + sum of loans l_e[x, y])
    the triplet            min_abc (- l_ab[x_a, x_b] - l_bc[x_b, x_c] - l_ac[x_a, x_c])

Again no total changes. Loans are the same for all values of a group, and the minimum over groups is one over values. A
pair without a table of its own counts as one of zeros. Where what is left open is little, it may be searched whole
instead (`remainder.py`). The constants below are margins for rounding, on which soundness rests; they are no tuning.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardc.solver.loads import Load
from shardc.solver.problem import Array, Edge, Problem
from shardc.solver.proof.remainder import Mask, Remainder, least_left

_EPSILON = float(np.finfo(np.float64).eps)
_MARGIN = 4.0  # times the roundings that are counted
_LARGEST = 1e300  # of a message or a loan: no sum of them overflows


@dataclass(frozen=True)
class Lender:
    """A triplet: for each of its three variables the group of every value, and the loans to the pairs ab, bc and ac as
    tables over groups."""

    variables: tuple[int, int, int]
    groups: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]
    loans: tuple[Array, Array, Array]


@dataclass(frozen=True)
class Certificate:
    """Messages `(m_eu, m_ev)` per edge, and triplets; an edge that is left out has zero messages. And what they leave
    to be searched, if they do not prove it all."""

    messages: dict[Edge, tuple[Array, Array]]
    triplets: tuple[Lender, ...] = ()
    remainder: Remainder | None = None


Loan = tuple[NDArray[np.intp], NDArray[np.intp], Array]  # groups of rows, groups of columns, table over groups
_NOTHING = np.zeros(())
_PENALTY_ROUNDING = 1e-12  # part of a penalised cost that roundings of its few sums cannot reach
Term = tuple[float, float]  # a minimum, and the roundings that may be in it


def check(problem: Problem, certificate: Certificate) -> float:
    """The lower bound that the certificate proves, rounded down by more than the arithmetic can have erred.

    Raises ValueError for a certificate that does not fit the problem. Equal layers cost little: what is worked out for
    arrays is remembered by their identity.
    """
    run, remainder = _CertificateCheck(problem, certificate), certificate.remainder
    proved = run.bound()
    if remainder is None or not proved < remainder.below:
        return proved
    return max(proved, min(remainder.below, least_left(problem, run.open(remainder.below), remainder.order)))


def open_values(problem: Problem, certificate: Certificate, below: float) -> list[Mask]:
    """Per variable, which values may be in a choice that costs less than `below`, by messages and triplets alone."""
    run = _CertificateCheck(problem, certificate)
    run.bound()
    return run.open(below)


def check_within(
    problem: Problem, loads: Iterable[Load], multipliers: Mapping[int, float], capacity: float, certificate: Certificate
) -> float:
    """The lower bound that multipliers (cost per unit of load, by position) and a certificate for the Lagrangian prove
    for every choice within the capacity: none of these pays more for its load than `capacity` times all multipliers
    together. Raises ValueError where multipliers are negative, or as `check` does."""
    if not all(math.isfinite(multiplier) and multiplier >= 0.0 for multiplier in multipliers.values()):
        raise ValueError(f"multipliers are finite and not negative, but these are {dict(multipliers)}")
    penalised = Problem([*problem.unary], {**problem.edges}, [*problem.names])
    made: dict[tuple[int, int, float], tuple[Array, ...]] = {}
    for load in loads:
        rate = math.fsum(multiplier for place, multiplier in multipliers.items() if load.start <= place <= load.end)
        if not rate:
            continue
        before = penalised.unary[load.one]
        if load.other is not None:
            before = penalised.edges.get((load.one, load.other), _NOTHING)
        key = id(before), id(load.table), rate
        if key not in made:
            made[key] = before + rate * load.table, before, load.table
        if load.other is None:
            penalised.unary[load.one] = made[key][0]
        else:
            penalised.edges[load.one, load.other] = made[key][0]
    least, paid = check(penalised, certificate), capacity * math.fsum(multipliers.values())
    return least - paid - _PENALTY_ROUNDING * (abs(least) + paid)


class _CertificateCheck:
    """One check of a certificate. Every array it meets outlives it, so that identities are those of contents."""

    def __init__(self, problem: Problem, certificate: Certificate) -> None:
        self.problem, self.certificate = problem, certificate
        self.loans: dict[Edge, list[Loan]] = defaultdict(list)
        self.moved: list[list[Array]] = [[] for _ in problem.unary]
        self.costs: list[Array] = []
        self.proved, self.error = math.inf, 0.0
        self._known: dict[tuple[object, ...], Term] = {}
        self._costs: dict[tuple[object, ...], Array] = {}
        self._sound: set[tuple[int, ...]] = set()

    def bound(self) -> float:
        terms = [self._triplet(lender) for lender in self.certificate.triplets]
        for edge in self.certificate.messages:
            if edge not in self.problem.edges and edge not in self.loans:
                raise ValueError(f"the certificate speaks of {edge}, which is no edge of the problem")
        terms += [self._pair(edge) for edge in self.problem.edges]
        terms += [self._pair(edge) for edge in self.loans if edge not in self.problem.edges]
        terms += [self._variable(v) for v in range(len(self.problem.unary))]
        if not all(math.isfinite(least) for least, _ in terms):
            return math.inf  # a variable or an edge without any finite entry: nothing is feasible
        self.error = _MARGIN * _EPSILON * math.fsum(abs(least) + rounding for least, rounding in terms)
        self.proved = math.fsum(least for least, _ in terms) - self.error
        return self.proved

    def open(self, below: float) -> list[Mask]:
        """The values whose star costs less than `below` (`remainder.py`), by the bound just worked out."""
        room = below - self.proved + self.error + _MARGIN * _EPSILON * (abs(below) + abs(self.proved))
        more, terms = [cost.copy() for cost in self.costs], [1] * len(self.costs)
        known: dict[tuple[int, ...], tuple[Array, Array]] = {}
        for edge in self.problem.edges:
            u, v = edge
            key = *map(id, self._of(edge)), id(self.costs[u]), id(self.costs[v])
            if key not in known:
                table = self._rewritten(edge)
                table = table - table.min()
                known[key] = (table + self.costs[v]).min(axis=1), (table + self.costs[u][:, None]).min(axis=0)
            for w, cost in zip(edge, known[key], strict=True):
                more[w] += cost
                terms[w] += 1
        return [cost * (1.0 - _MARGIN * _EPSILON * count) <= room for cost, count in zip(more, terms, strict=True)]

    def _triplet(self, lender: Lender) -> Term:
        """What a triplet keeps; its loans are entered with their pairs."""
        a, b, c = lender.variables
        if not 0 <= a < b < c < len(self.problem.unary):
            raise ValueError(f"{lender.variables} is no triplet of variables in ascending order")
        for place, (i, j) in enumerate(((0, 1), (1, 2), (0, 2))):
            loan = lender.groups[i], lender.groups[j], lender.loans[place]
            edge = lender.variables[i], lender.variables[j]
            self._check_loan(edge, loan)
            self.loans[edge].append(loan)
        key = ("triplet", *map(id, lender.loans))
        if key not in self._known:
            ab, bc, ac = lender.loans
            if (ab.shape[1], bc.shape[1], ac.shape[0]) != (bc.shape[0], ac.shape[1], ab.shape[0]):
                raise ValueError(f"the loans of {lender.variables} are not over the same groups")
            least = -float((ab[:, :, None] + bc[None, :, :] + ac[:, None, :]).max())
            self._known[key] = least, 3.0 * _largest(lender.loans)
        return self._known[key]

    def _check_loan(self, edge: Edge, loan: Loan) -> None:
        sizes = tuple(len(self.problem.unary[v]) for v in edge)
        key = (*sizes, *map(id, loan))
        if key in self._sound:
            return
        table = loan[2]
        if table.ndim != 2 or not _sound(table):
            raise ValueError(f"a loan to {edge} is no table of finite floats")
        for size, groups, count in zip(sizes, loan[:2], table.shape, strict=True):
            whole = groups.shape == (size,) and np.issubdtype(groups.dtype, np.integer)
            if not whole or (size and not 0 <= groups.min() <= groups.max() < count):
                raise ValueError(f"the groups of a loan to {edge} do not fit the domains")
        self._sound.add(key)

    def _pair(self, edge: Edge) -> Term:
        """What a pair keeps; its messages are noted with its variables."""
        (u, v), unary = edge, self.problem.unary
        messages, loans = self.certificate.messages.get(edge, ()), self.loans.get(edge, [])
        if messages:
            to_u, to_v = messages
            self.moved[u].append(to_u)
            self.moved[v].append(to_v)
        key = ("pair", len(unary[u]), len(unary[v]), *map(id, self._of(edge)))
        known = self._known.get(key)
        if known is not None:
            return known
        if messages:
            self._check_messages(edge)
        least = self._least(edge)
        moved = _largest(messages) + _largest([loan for _, _, loan in loans])
        steps = len(messages) + len(loans)
        self._known[key] = least, steps * (abs(least) + moved) if math.isfinite(least) else 0.0
        return self._known[key]

    def _least(self, edge: Edge) -> float:
        """The least of a pair's table, rewritten."""
        if edge not in self.problem.edges or edge in self.loans or edge not in self.certificate.messages:
            return float(self._rewritten(edge).min())
        to_u, to_v = self.certificate.messages[edge]
        return float(((self.problem.edges[edge] - to_v).min(axis=1) - to_u).min())

    def _of(self, edge: Edge) -> tuple[object, ...]:
        """The arrays of a pair."""
        arrays = self.problem.edges.get(edge), *self.certificate.messages.get(edge, ())
        if edge not in self.loans:
            return arrays
        return (*arrays, *(array for loan in self.loans[edge] for array in loan))

    def _rewritten(self, edge: Edge) -> Array:
        """The table of a pair, less its messages, and with what it was lent."""
        u, v = edge
        table = self.problem.edges.get(edge)
        if table is None:
            table = np.zeros((len(self.problem.unary[u]), len(self.problem.unary[v])))
        if edge in self.certificate.messages:
            to_u, to_v = self.certificate.messages[edge]
            table = table - to_u[:, None]
            table -= to_v
        for rows, columns, loan in self.loans.get(edge, []):
            table = table + loan[np.ix_(rows, columns)]
        return table

    def _check_messages(self, edge: Edge) -> None:
        for v, message in zip(edge, self.certificate.messages[edge], strict=True):
            if message.shape != self.problem.unary[v].shape:
                raise ValueError(f"messages of {edge} do not fit the domains")
            if not _sound(message):
                raise ValueError(f"messages of {edge} are not finite floats")

    def _variable(self, v: int) -> Term:
        """The least of a variable's cost with its messages, each value less the roundings that may be in it."""
        cost, moved = self.problem.unary[v], self.moved[v]
        key = ("variable", id(cost), *map(id, moved))
        if key not in self._known:
            total = np.array(cost, dtype=np.float64)
            error = np.abs(total)
            for message in moved:
                total += message
                error += np.abs(message)
            with np.errstate(invalid="ignore"):  # where the cost is infinite, so is the error
                total = np.where(np.isfinite(total), total - _MARGIN * _EPSILON * len(moved) * error, total)
                low = float(total.min())
                self._known[key], self._costs[key] = (low, 0.0), total - low
        self.costs.append(self._costs[key])
        return self._known[key]


def _sound(array: Array) -> bool:
    """Whether all are finite floats, and small enough to be added up."""
    return array.dtype == np.float64 and bool((np.abs(array) <= _LARGEST).all())


def _largest(arrays: "list[Array] | tuple[Array, ...]") -> float:
    return math.fsum(float(np.abs(array).max(initial=0.0)) for array in arrays)
