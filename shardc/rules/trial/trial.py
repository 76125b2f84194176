"""Rules found by trial: an operator without a rule is run on small inputs, whole and in parts.

A factor is a set of operand dims that, cut together, give results that are the cut results, equal on every part, or
parts of a sum (max, min, product). What is found is a rule like any other, as text. Where nothing recombines, or
nothing could be tried, every dim stays whole: the rule of an operator that runs on gathered operands."""

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
MOST_LINEAR = 6
"""With more floating operands than this, only single ones and all together are tried for linearity."""


@dataclass(frozen=True)
class Learned:
    """What trial found about one call: a rule as text, or why all dims stay whole (`replicated`), or why there can be
    no rule (`refused`)."""

    text: str
    linear: tuple[frozenset[int], ...] = ()
    reads: tuple[frozenset[int], ...] | None = None
    sizes: Mapping[int, Size] = field(default_factory=dict[int, Size])
    replicated: str = ""
    refused: str = ""

    def rule(self) -> Rule:
        return parse(self.text, self.linear, self.reads, self.sizes, even=True)

    def __str__(self) -> str:
        linear = f", linear={[set(group) for group in self.linear]}" if self.linear else ""
        reads = f", reads={[set(group) for group in self.reads]}" if self.reads is not None else ""
        sizes = f", sizes={dict(self.sizes)}" if self.sizes else ""
        return f'"{self.text}"{linear}{reads}{sizes}'


class Split(NamedTuple):
    """A factor that holds: how it cuts, and what the cut does to every result."""

    cut: Cut
    hows: tuple[How, ...]

    @property
    def reduces(self) -> bool:
        return any(how in FOLDS for how in self.hows)


def learn(operator: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Learned:
    """Find the rule of one call; `args` and `kwargs` as the operator takes them, fake tensors in place of tensors."""
    call = SampleCall.of(operator, args, kwargs)
    refused = refusal(operator)
    if refused:
        return Learned("", refused=refused)
    found = sample_calls(call)
    shapes = found[0].results if found else call.fake()
    if shapes is None:
        return Learned("", refused="its fake kernel does not accept this call")
    if not found:
        return _whole(call, "too large to be tried, and not to be made smaller")
    (answer,) = survivors(_attempt, [found], patience=300.0)
    return answer or _whole(call, "it does not survive a trial")


def _attempt(found: Sequence[SampleCall]) -> Learned:
    """The trial itself, on specimens of a call; this is the part that may crash."""
    with undisturbed():
        try:
            return _Trial(Checker(found[0]), found[1:]).learned()
        except Unrunnable:
            return _whole(found[0], "it does not run on made-up inputs")
        except Unfit as error:
            return Learned("", refused=str(error))


def refusal(operator: OpOverload) -> str:
    """Why an operator can have no rule at all; empty if nothing speaks against one."""
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "it draws random numbers, which would differ from rank to rank"
    if operator._schema.is_mutable:
        return "it changes its arguments; return new tensors instead"
    if torch.Tag.dynamic_output_shape in operator.tags or torch.Tag.data_dependent_output in operator.tags:
        return "the shape of its result, or the result itself, is a value that only a run would know"
    if "as_strided" in operator._schema.name:
        return "its results depend on how its operand lies in memory; use views that name dims"
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
    """The search for the factors of one call on a bench, and their confirmation on other specimens."""

    def __init__(self, bench: Checker, others: Sequence[SampleCall]) -> None:
        self.bench, self.call = bench, bench.call
        self.others = list(_benches(others))

    def learned(self) -> Learned:
        linear: list[frozenset[int]] = []
        for group in self._groups():
            # an operand that may join a group, or not, is not read
            if not any(smaller < group for smaller in linear) and self.bench.additive(group):
                linear.append(group)
        additive = frozenset.intersection(*linear) if linear else frozenset[int]()
        plain = self._found(frozenset())
        if additive:
            shared = self._found(additive)
            plain_only = self._compatible(plain)
            with_linear = self._compatible([s for s in plain if not (s.reduces and self._lacks(s, additive))] + shared)
            if len(with_linear) >= len(plain_only):
                return self._written(with_linear, linear)
            return self._written(plain_only, [])
        return self._written(self._compatible(plain), linear)

    def _lacks(self, split: Split, additive: frozenset[int]) -> frozenset[int]:
        """The additive operands that do not carry the factor: a strategy demands them as addends."""
        return frozenset(k for k in additive if split.cut.carriers[k] is None)

    def _groups(self) -> Iterator[frozenset[int]]:
        floats = [k for k, d in enumerate(self.bench.dtypes) if d.is_floating_point or d.is_complex]
        sizes = range(1, len(floats) + 1) if len(floats) <= MOST_LINEAR else (1, len(floats))
        for size in sizes:
            yield from (frozenset(group) for group in itertools.combinations(floats, size))

    def _found(self, additive: frozenset[int]) -> list[Split]:
        """Every cut that recombines; with `additive` those that reduce, with these operands as addends."""
        cuts: list[Cut] = []
        for cut in itertools.islice(self._cuts(), MOST_HYPOTHESES):
            shares = frozenset(k for k in additive if cut.carriers[k] is None)
            if shares or not additive:
                cuts.append(cut._replace(shares=shares))
        tried = survivors(self._tried, cuts)
        return [split for split in tried if split is not None and (split.reduces or not additive)]

    def _tried(self, cut: Cut) -> Split | None:
        options = self.bench.options(cut)
        hows = _chosen(options) if options is not None else None
        if hows is None:
            return None
        split = Split(cut, hows)
        return split if all(_confirms(bench, split) for bench in self.others) else None

    def _cuts(self) -> Iterator[Cut]:
        """All hypotheses: per size, a dim of that size (or none) of every operand, and the integers that equal it."""
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
        """The integer arguments that may be the size of dims of `size`: they equal it, and did when it was shrunk."""
        pairs = zip(self.call.actual, self.call.shapes, strict=True)
        shrunk = {small for actual, shape in pairs for n, small in zip(actual, shape, strict=True) if n == size}
        return [p for p, n in self.call.given.items() if n == size and (shrunk or {size}) == {self.call.numbers[p]}]

    def _units(self) -> list[list[int]]:
        """Operands that are cut alike: the tensors of a list, if they have one shape."""
        found: list[list[int]] = []
        for value in (*self.call.args, *self.call.kwargs.values()):
            if isinstance(value, SampleOperand):
                found.append([value.number])
            elif isinstance(value, list):
                own = [item.number for item in value if isinstance(item, SampleOperand)]  # type: ignore[misc]
                alike = len({self.call.actual[k] for k in own}) == 1
                found += [own] if alike else [[k] for k in own]
        return found

    def _compatible(self, found: Sequence[Split]) -> list[Split]:
        """As many as go together, those first that cut more results, and of these the ones that need fewer operands."""

        def order(split: Split) -> tuple[int, int, int]:
            cut = sum(isinstance(how, int) for how in split.hows)
            return -cut, "same" in split.hows, sum(dim is not None for dim in split.cut.carriers)

        chosen: list[Split] = []
        for split in sorted(found, key=order):
            if any(_clash(split, other) for other in chosen) or self._sizes([*chosen, split]) is None:
                continue
            pairs = all(self._together([split, other]) for other in chosen)
            if pairs and _reads([*chosen, split], len(self.call.results)) is not None:
                chosen.append(split)
        while len(chosen) > 2 and not self._together(chosen[:5]):
            chosen.pop()
        return chosen

    def _together(self, splits: Sequence[Split]) -> bool:
        return not self.bench.difference([s.cut for s in splits], [s.hows for s in splits])

    def _written(self, splits: list[Split], linear: list[frozenset[int]]) -> Learned:
        """The rule as text, factors named in the order in which the operands have them."""
        splits = sorted(splits, key=lambda s: [(type(d) is not int, d) for d in (*s.cut.carriers, *s.hows)])
        names = _names()
        own = [next(names) for _ in splits]
        kinds = {name: next((h for h in s.hows if h in FOLDS), "sum") for name, s in zip(own, splits, strict=True)}

        def dims(shape: Sequence[int] | None, held: Mapping[int, str]) -> str:
            return "_" if shape is None else " ".join(
                "1" if n == 1 else held.get(d) or f"{next(names)}!" for d, n in enumerate(shape)
            )  # fmt: skip

        operands = [
            dims(shape, {s.cut.carriers[k]: _marked(name, str(kinds[name])) for name, s in zip(own, splits, strict=True)
                         if s.cut.carriers[k] is not None})  # type: ignore[misc]
            for k, shape in enumerate(self.call.actual)
        ]  # fmt: skip
        results = [
            dims(shape, {h: name for name, s in zip(own, splits, strict=True) if isinstance(h := s.hows[i], int)})
            for i, shape in enumerate(self.call.results)
        ]
        text = f"{', '.join(operands)} -> {', '.join(results)}" if operands else f"-> {', '.join(results)}"
        if not splits:
            free = any(n > 1 for shape in (*self.call.actual, *(r for r in self.call.results if r)) for n in shape)
            why = "no split of its operands gives its results" if free else ""
            return Learned(text, tuple(linear), replicated=why)
        reads = _reads(splits, len(results))
        sizes = self._sizes(splits, own)
        assert reads is not None and sizes is not None
        same = any("same" in s.hows for s in splits)
        return Learned(text, tuple(linear), reads if same else None, sizes)

    def _sizes(self, splits: Sequence[Split], names: Sequence[str] | None = None) -> dict[int, Size] | None:
        """The integer arguments that become local, as a rule says it; None if it cannot be said."""
        names = names or [str(i) for i in range(len(splits))]
        held = {path: name for name, s in zip(names, splits, strict=True) for path in s.cut.scaled}
        if len(held) < sum(len(s.cut.scaled) for s in splits):
            return None
        sizes: dict[int, Size] = {}
        for position, place in held:
            if place is None:
                sizes[position] = held[position, None]
                continue
            values: list[Any] = self.call.args[position]
            if not all(type(value) is int for value in values):
                return None
            places = [(position, i) for i in range(len(values))]
            sizes[position] = tuple(held[p] if p in held else values[p[1]] for p in places)
        return sizes


def _straight(choices: Sequence[Sequence[int | None]]) -> list[tuple[int | None, ...]]:
    """All ways to choose, those first that take the same dim of all operands; where there are too many, only some."""
    ways = list(itertools.islice(itertools.product(*choices), 1 << 16))
    return sorted(ways, key=lambda way: len({dim for dim in way if dim is not None}))


def _marked(name: str, kind: str) -> str:
    return name if kind == "sum" else f"{name}:{kind}"


def _benches(others: Sequence[SampleCall]) -> Iterator[Checker]:
    for call in others:
        try:
            yield Checker(call, brief=call.shapes == call.actual)
        except Unrunnable:
            continue


def _confirms(bench: Checker, split: Split) -> bool:
    """Whether the factor holds on another specimen too, where it can be cut at all."""
    try:
        options = bench.options(split.cut)
    except ValueError:  # an integer that this specimen has not shrunk along
        return False
    return options is not None and all(how in seen for how, seen in zip(split.hows, options, strict=True))


def _chosen(options: Sequence[set[How]]) -> tuple[How, ...] | None:
    """Per result one option: cut, or the same everywhere, or partial in the one way that all such results share."""
    partial = [seen for seen in options if not any(isinstance(how, int) for how in seen) and "same" not in seen]
    shared = set[How](FOLDS).intersection(*partial)
    kind = next((kind for kind in FOLDS if kind in shared), None)
    hows: list[How] = []
    for seen in options:
        dims = sorted(how for how in seen if isinstance(how, int))
        how = dims[0] if dims else "same" if "same" in seen else kind
        if how is None:
            return None
        hows.append(how)
    return tuple(hows)


def _clash(one: Split, other: Split) -> bool:
    """Whether two factors want the same dim of an operand or result, or the same integer."""
    operands = any(a is not None and a == b for a, b in zip(one.cut.carriers, other.cut.carriers, strict=True))
    results = any(isinstance(a, int) and a == b for a, b in zip(one.hows, other.hows, strict=True))
    return operands or results or bool(one.cut.scaled & other.cut.scaled)


def _reads(splits: Sequence[Split], results: int) -> tuple[frozenset[int], ...] | None:
    """Per result the operands that it reads: none that carries a factor of which it is independent."""
    found: list[frozenset[int]] = []
    for index in range(results):
        carriers = [frozenset(k for k, dim in enumerate(s.cut.carriers) if dim is not None) for s in splits]
        unread = frozenset[int]().union(*(c for c, s in zip(carriers, splits, strict=True) if s.hows[index] == "same"))
        for own, split in zip(carriers, splits, strict=True):
            if split.hows[index] in FOLDS and own <= unread:
                return None
        everything = frozenset(range(len(splits[0].cut.carriers))) if splits else frozenset[int]()
        found.append(everything - unread)
    return tuple(found)
