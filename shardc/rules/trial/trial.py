"""Rules by trial: an operator without a rule runs on small inputs, whole and in parts.

A factor is a set of operand dims that are cut together. It holds if every result is then cut too, or equal on every
part, or a sum (max, min, product) of the parts. The outcome is a rule like any other, as text. If no cut holds, or none
can be tried, every dim stays whole: the operator runs on gathered operands.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from shardc.rules.notation import Rule, Size, parse
from shardc.rules.trial.checker import Checker, Cut, Unfit, Unrunnable, undisturbed
from shardc.rules.trial.guard import survivors
from shardc.rules.trial.recombine import FOLDS, How
from shardc.rules.trial.sample_call import Path, SampleCall, SampleOperand, sample_calls

MOST_HYPOTHESES = 2048
"""Cuts that are tried for one call at most."""
MOST_LINEAR = 6
"""With more floating operands than this, linearity is only tried for single ones and for all together."""


@dataclass(frozen=True)
class Learned:
    """The outcome of the trial of one call: a rule as text, with the reason if all dims stay whole (`replicated`).

    `refused` is the reason if there can be no rule; then there is no text.
    """

    text: str
    linear: tuple[frozenset[int], ...] = ()
    reads: tuple[frozenset[int], ...] | None = None
    sizes: Mapping[int, Size] = field(default_factory=dict[int, Size])
    replicated: str = ""
    refused: str = ""

    def rule(self) -> Rule:
        """The rule that the text describes. It splits evenly only, since the trial did not try padding."""
        return parse(self.text, self.linear, self.reads, self.sizes, even=True)

    def __str__(self) -> str:
        linear = f", linear={[set(group) for group in self.linear]}" if self.linear else ""
        reads = f", reads={[set(group) for group in self.reads]}" if self.reads is not None else ""
        sizes = f", sizes={dict(self.sizes)}" if self.sizes else ""
        return f'"{self.text}"{linear}{reads}{sizes}'


class Split(NamedTuple):
    """A factor that holds: the cut, and its effect on every result."""

    cut: Cut
    hows: tuple[How, ...]

    @property
    def reduces(self) -> bool:
        """Whether some result is partial over the factor."""
        return any(how in FOLDS for how in self.hows)


def learn(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Learned:
    """Learn the rule of one call. `args` and `kwargs` are those of the operator, with fake tensors."""
    call = SampleCall.of(operator, args, kwargs)
    reason = refusal(operator)
    if reason:
        return Learned("", refused=reason)
    samples = sample_calls(call)
    shapes = samples[0].results if samples else call.fake()
    if shapes is None:
        return Learned("", refused="its fake kernel does not accept this call")
    if not samples:
        return _whole(call, "it is too large to be tried, and does not run at smaller sizes")
    (answer,) = survivors(_attempt, [samples], patience=300.0)
    return answer or _whole(call, "it does not survive a trial")


def _attempt(samples: Sequence[SampleCall]) -> Learned:
    """The trial itself, on sample calls. It may crash the process."""
    with undisturbed():
        try:
            return _Trial(Checker(samples[0]), samples[1:]).learned()
        except Unrunnable:
            return _whole(samples[0], "it does not run on made-up inputs")
        except Unfit as error:
            return Learned("", refused=str(error))


def refusal(operator: OpOverload) -> str:
    """Why an operator can have no rule; empty if it can have one."""
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "it draws random numbers, which would differ from rank to rank"
    if operator._schema.is_mutable:
        return "it changes its arguments; return new tensors instead"
    if torch.Tag.dynamic_output_shape in operator.tags or torch.Tag.data_dependent_output in operator.tags:
        return "the shape of its result, or a number that it returns, is known only when it runs"
    if "as_strided" in operator._schema.name:
        return "its results depend on the strides of its operand; use views that name dims"
    return ""


def _whole(call: SampleCall, why: str) -> Learned:
    shapes = call.results or call.fake() or ((),)
    names = _names()

    def dims(shape: Sequence[int] | None) -> str:
        return "_" if shape is None else " ".join("1" if n == 1 else f"{next(names)}!" for n in shape)

    operands = ", ".join(dims(shape) for shape in call.actual)
    text = f"{operands} -> {', '.join(dims(shape) for shape in shapes)}" if call.actual else f"-> {dims(shapes[0])}"
    return Learned(text, replicated=why)


def _names() -> Iterator[str]:
    yield from string.ascii_lowercase
    yield from (f"{letter}{i}" for i in itertools.count(1) for letter in string.ascii_lowercase)


class _Trial:
    """The search for the factors of one call with a checker, and their confirmation on other sample calls."""

    def __init__(self, checker: Checker, others: Sequence[SampleCall]) -> None:
        self.checker, self.call = checker, checker.call
        self.others = list(_checkers(others))

    def learned(self) -> Learned:
        """The rule with the most compatible factors, with linear groups or without."""
        linear: list[frozenset[int]] = []
        for group in self._groups():
            # a group whose subset is linear adds an operand that the results do not depend on
            if not any(smaller < group for smaller in linear) and self.checker.additive(group):
                linear.append(group)
        additive = frozenset.intersection(*linear) if linear else frozenset[int]()
        plain = self._holding(frozenset())
        if additive:
            shared = self._holding(additive)
            plain_only = self._compatible(plain)
            with_linear = self._compatible([s for s in plain if not (s.reduces and self._lacks(s, additive))] + shared)
            if len(with_linear) >= len(plain_only):
                return self._written(with_linear, linear)
            return self._written(plain_only, [])
        return self._written(self._compatible(plain), linear)

    def _lacks(self, split: Split, additive: frozenset[int]) -> frozenset[int]:
        """The additive operands without the factor: a strategy demands that they are partial."""
        return frozenset(k for k in additive if split.cut.carriers[k] is None)

    def _groups(self) -> Iterator[frozenset[int]]:
        floats = [k for k, d in enumerate(self.checker.dtypes) if d.is_floating_point or d.is_complex]
        sizes = range(1, len(floats) + 1) if len(floats) <= MOST_LINEAR else (1, len(floats))
        for size in sizes:
            yield from (frozenset(group) for group in itertools.combinations(floats, size))

    def _holding(self, additive: frozenset[int]) -> list[Split]:
        """Every cut that holds. With `additive`, only those that reduce, with these operands as addends."""
        cuts: list[Cut] = []
        for cut in itertools.islice(self._cuts(), MOST_HYPOTHESES):
            shares = frozenset(k for k in additive if cut.carriers[k] is None)
            if shares or not additive:
                cuts.append(cut._replace(shares=shares))
        tried = survivors(self._tried, cuts)
        return [split for split in tried if split is not None and (split.reduces or not additive)]

    def _tried(self, cut: Cut) -> Split | None:
        options = self.checker.options(cut)
        hows = _chosen(options) if options is not None else None
        if hows is None:
            return None
        split = Split(cut, hows)
        return split if all(_confirms(checker, split) for checker in self.others) else None

    def _cuts(self) -> Iterator[Cut]:
        """All hypotheses: for each size, a dim of that size (or none) of every operand, and integers that equal it."""
        sizes = {n for shape in (*self.call.actual, *(r for r in self.call.results if r)) for n in shape if n > 1}
        units = self._units()
        for size in sorted(sizes):
            choices = [[None, *(d for d, n in enumerate(self.call.actual[unit[0]]) if n == size)] for unit in units]
            numbers = self._numbers(size)
            most = min(len(numbers), 3)
            subsets = [frozenset(c) for k in range(most + 1) for c in itertools.combinations(numbers, k)]
            for picked in _straight(choices):
                carriers: list[int | None] = [None] * len(self.call.actual)
                for unit, dim in zip(units, picked, strict=True):
                    for k in unit:
                        carriers[k] = dim
                for scaled in subsets:
                    if scaled or any(dim is not None for dim in carriers):
                        yield Cut(tuple(carriers), scaled)

    def _numbers(self, size: int) -> list[Path]:
        """The integer arguments that may be the size of dims of `size`: they equal it, also in the small sample
        call."""
        pairs = zip(self.call.actual, self.call.shapes, strict=True)
        shrunk = {small for actual, shape in pairs for n, small in zip(actual, shape, strict=True) if n == size}
        return [p for p, n in self.call.given.items() if n == size and (shrunk or {size}) == {self.call.numbers[p]}]

    def _units(self) -> list[list[int]]:
        """Groups of operands that are cut alike: the tensors of a list if they have one shape; others stand alone."""
        units: list[list[int]] = []
        for value in (*self.call.args, *self.call.kwargs.values()):
            if isinstance(value, SampleOperand):
                units.append([value.number])
            elif isinstance(value, list):
                members = [item.number for item in value if isinstance(item, SampleOperand)]  # type: ignore[misc]
                alike = len({self.call.actual[k] for k in members}) == 1
                units += [members] if alike else [[k] for k in members]
        return units

    def _compatible(self, splits: Sequence[Split]) -> list[Split]:
        """Splits that hold together, chosen greedily: first those that cut more results, then those that cut fewer
        operands."""

        def order(split: Split) -> tuple[int, int, int]:
            cut = sum(isinstance(how, int) for how in split.hows)
            return -cut, "same" in split.hows, sum(dim is not None for dim in split.cut.carriers)

        chosen: list[Split] = []
        for split in sorted(splits, key=order):
            if any(_conflicting(split, other) for other in chosen) or self._sizes([*chosen, split]) is None:
                continue
            pairs = all(self._together([split, other]) for other in chosen)
            if pairs and _reads([*chosen, split], len(self.call.results)) is not None:
                chosen.append(split)
        while len(chosen) > 2 and not self._together(chosen[:5]):
            chosen.pop()
        return chosen

    def _together(self, splits: Sequence[Split]) -> bool:
        return not self.checker.difference([s.cut for s in splits], [s.hows for s in splits])

    def _written(self, splits: list[Split], linear: list[frozenset[int]]) -> Learned:
        """The rule as text. Factors are named in the order of the operands' dims."""
        splits = sorted(splits, key=lambda s: [(type(d) is not int, d) for d in (*s.cut.carriers, *s.hows)])
        names = _names()
        factors = [next(names) for _ in splits]
        reductions = {
            name: next((h for h in s.hows if h in FOLDS), "sum") for name, s in zip(factors, splits, strict=True)
        }

        def dims(shape: Sequence[int] | None, name_of: Mapping[int, str]) -> str:
            return "_" if shape is None else " ".join(
                "1" if n == 1 else name_of.get(d) or f"{next(names)}!" for d, n in enumerate(shape)
            )  # fmt: skip

        operands = [
            dims(shape, {s.cut.carriers[k]: _marked(name, str(reductions[name]))
                         for name, s in zip(factors, splits, strict=True)
                         if s.cut.carriers[k] is not None})  # type: ignore[misc]
            for k, shape in enumerate(self.call.actual)
        ]  # fmt: skip
        results = [
            dims(shape, {h: name for name, s in zip(factors, splits, strict=True) if isinstance(h := s.hows[i], int)})
            for i, shape in enumerate(self.call.results)
        ]
        text = f"{', '.join(operands)} -> {', '.join(results)}" if operands else f"-> {', '.join(results)}"
        if not splits:
            free = any(n > 1 for shape in (*self.call.actual, *(r for r in self.call.results if r)) for n in shape)
            why = "no split of its operands gives its results" if free else ""
            return Learned(text, tuple(linear), replicated=why)
        reads = _reads(splits, len(results))
        sizes = self._sizes(splits, factors)
        assert reads is not None and sizes is not None
        same = any("same" in s.hows for s in splits)
        return Learned(text, tuple(linear), reads if same else None, sizes)

    def _sizes(self, splits: Sequence[Split], names: Sequence[str] | None = None) -> dict[int, Size] | None:
        """The integer arguments that become local, as the `sizes` of a rule; None if these cannot express them."""
        names = names or [str(i) for i in range(len(splits))]
        factor_of = {path: name for name, s in zip(names, splits, strict=True) for path in s.cut.scaled}
        if len(factor_of) < sum(len(s.cut.scaled) for s in splits):
            return None
        sizes: dict[int, Size] = {}
        for position, place in factor_of:
            if place is None:
                sizes[position] = factor_of[position, None]
                continue
            values: list[Any] = self.call.args[position]
            if not all(type(value) is int for value in values):
                return None
            places = [(position, i) for i in range(len(values))]
            sizes[position] = tuple(factor_of[p] if p in factor_of else values[p[1]] for p in places)
        return sizes


def _straight(choices: Sequence[Sequence[int | None]]) -> list[tuple[int | None, ...]]:
    """One choice for each operand, in all combinations; first those with the same dim of all operands.

    If there are more than 65536 combinations, the others are left out.
    """
    combinations = list(itertools.islice(itertools.product(*choices), 1 << 16))
    return sorted(combinations, key=lambda dims: len({dim for dim in dims if dim is not None}))


def _marked(name: str, reduction: str) -> str:
    return name if reduction == "sum" else f"{name}:{reduction}"


def _checkers(samples: Sequence[SampleCall]) -> Iterator[Checker]:
    """A checker for each sample call that runs on made-up inputs; a brief one at the program's sizes."""
    for call in samples:
        try:
            yield Checker(call, brief=call.shapes == call.actual)
        except Unrunnable:
            continue


def _confirms(checker: Checker, split: Split) -> bool:
    """Whether the factor also holds on another sample call. It does not if it cannot be cut there."""
    try:
        options = checker.options(split.cut)
    except ValueError:  # an integer argument that differs from the size of the dims here
        return False
    return options is not None and all(how in seen for how, seen in zip(split.hows, options, strict=True))


def _chosen(options: Sequence[set[How]]) -> tuple[How, ...] | None:
    """One option for each result: cut, else the same, else partial by a reduction that all partial results share."""
    partial = [seen for seen in options if not any(isinstance(how, int) for how in seen) and "same" not in seen]
    shared = set[How](FOLDS).intersection(*partial)
    reduction = next((reduction for reduction in FOLDS if reduction in shared), None)
    hows: list[How] = []
    for seen in options:
        dims = sorted(how for how in seen if isinstance(how, int))
        how = dims[0] if dims else "same" if "same" in seen else reduction
        if how is None:
            return None
        hows.append(how)
    return tuple(hows)


def _conflicting(one: Split, other: Split) -> bool:
    """Whether two factors use the same dim of an operand or result, or the same integer."""
    operands = any(a is not None and a == b for a, b in zip(one.cut.carriers, other.cut.carriers, strict=True))
    results = any(isinstance(a, int) and a == b for a, b in zip(one.hows, other.hows, strict=True))
    return operands or results or bool(one.cut.scaled & other.cut.scaled)


def _reads(splits: Sequence[Split], results: int) -> tuple[frozenset[int], ...] | None:
    """For each result, the operands that it reads: all but those with a factor of which it is independent.

    None if a result would then be partial over a factor without reading an operand that carries it.
    """
    reads: list[frozenset[int]] = []
    for index in range(results):
        carriers = [frozenset(k for k, dim in enumerate(s.cut.carriers) if dim is not None) for s in splits]
        unread = frozenset[int]().union(*(c for c, s in zip(carriers, splits, strict=True) if s.hows[index] == "same"))
        for carrying, split in zip(carriers, splits, strict=True):
            if split.hows[index] in FOLDS and carrying <= unread:
                return None
        everything = frozenset(range(len(splits[0].cut.carriers))) if splits else frozenset[int]()
        reads.append(everything - unread)
    return tuple(reads)
