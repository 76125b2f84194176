"""Operator rules as data: one line of einsum-like text an operator.

    "m k, k n -> m n"        letters are factors; one that no result carries is reduced there: the result is P(sum)
    "a k:max -> a"           a reduction other than sum
    "a s! -> a s!"           s stays whole on every axis
    "a s~ -> a s~"           s is parted: where it is split, the body of a `Variant` runs in the operator's place; it
                             gets the keyword s, a runtime `Part`, and talks to the other parts itself. A result that
                             does not carry s comes out complete, with `s:sum~` partial
    "v d, #v i -> i d"       operand 1 holds indices into factor v: when v is split they are rebased to the rank's
                             chunk and those outside point at a dummy row (taking: the row is zero, the result P;
                             putting: the row is dropped)
    "1"                      a dim of size one;  "_" an operand or result that is absent
    "-> n"                   a text that begins with the arrow has no operands; " -> n" has one of no dims

`linear` are groups of operands: with exactly the group's operands partial, the results are partial. An operand that
is in every group is additive: it must be partial where a factor is summed (the bias of addmm), unless it is among the
`multiplied`, of which every part of the sum needs the whole (a gradient alone in its group). `reads` lists the
operands that each result depends on; a result is partial over a factor only if it reads an operand that carries it.
`sizes` maps the position of a size-like argument to the result whose (local) shape it is, to the factor whose local
size it is, or to the factors (and plain numbers) of a list of sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.errors import RuleError
from shardc.runtime.collectives.collective import AnyCollective

Dims = tuple[str | None, ...]
Size = int | str | tuple[str | int, ...]
Body = Callable[..., Any]


@dataclass(frozen=True)
class Send:
    """One collective of a body: its local operand has `elements` for every point of `factors`, of `itemsize` bytes.

    It is sent only where the parted factor is in `parts` parts, if given, and the factors `beside` are split too.
    """

    collective: AnyCollective
    factors: tuple[str, ...]
    itemsize: int
    elements: int = 1
    parts: int | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workspace:
    """What a body allocates for itself and frees again: `elements` for every local point of `factors`, of `itemsize`
    bytes."""

    factors: tuple[str, ...]
    itemsize: int
    elements: int = 1


@dataclass(frozen=True)
class Variant:
    """One way to run an operator that has a parted factor split: `body` runs in the operator's place.

        Variant("all_gather", softmax_gathered, {"s": [Send(all_gather, rows, 4, elements=2)]})
        Variant("ring", ring_attention, {"s": [...]}, together=(("r", "s"),))

    `sends` says per parted factor what the body sends where that factor is split. `together` holds groups of parted
    factors: an axis that splits one factor of a group splits them all, and the body gets a `Part` for each. An operand
    or result that carries several factors of a group is split along the one that the group names first. A variant with
    groups runs only where one of its groups is split. Variants that cost the same are equal, whatever their bodies."""

    name: str
    body: Body = field(compare=False)
    sends: Mapping[str, Sequence[Send]] = field(default_factory=dict[str, Sequence[Send]], hash=False)
    together: tuple[tuple[str, ...], ...] = ()
    workspace: tuple[Workspace, ...] = ()


@dataclass(frozen=True)
class Rule:
    """An operator's factors for one call: `operands` and `results` hold a dim's factor name, None for size one."""

    operands: tuple[Dims | None, ...]
    results: tuple[Dims | None, ...]
    whole: frozenset[str] = frozenset()
    reductions: Mapping[str, str] = field(default_factory=dict[str, str])
    indices: Mapping[int, str] = field(default_factory=dict[int, str])
    linear: tuple[frozenset[int], ...] = ()
    reads: tuple[frozenset[int], ...] | None = None
    sizes: Mapping[int, Size] = field(default_factory=dict[int, Size])
    flops: tuple[str, ...] = ()
    parted: frozenset[str] = frozenset()
    variants: tuple[Variant, ...] = ()
    parts: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    even: bool = False
    multiplied: frozenset[int] = frozenset()
    repeated: bool = False

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


ONLY = "parted"
"""The name of a variant that is the only one of its rule."""


def parse(
    text: str,
    linear: Iterable[Iterable[int]] = (),
    reads: Iterable[Iterable[int]] | None = None,
    sizes: Mapping[int, Size] | None = None,
    flops: Iterable[str] = (),
    body: Body | None = None,
    sends: Mapping[str, Sequence[Send]] | None = None,
    variants: Sequence[Variant] = (),
    parts: Mapping[str, Iterable[int]] | None = None,
    even: bool = False,
    multiplied: Iterable[int] = (),
    repeated: bool = False,
) -> Rule:
    """Read the notation above. `flops`: matrix products, two flops per point of the factors named, as `m k n`.
    `body` with what it `sends` is the only variant; a rule that has several lists them as `variants`. `parts`: the
    numbers of parts that a parted factor admits; it is then split by one axis only. `even`: nothing is split unevenly,
    because the operator may fail on what padding holds. `repeated`: every rank makes all of the results, whatever is
    split, and keeps its part."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"rule {text!r} has no '->'")
    whole: set[str] = set()
    parted: set[str] = set()
    reductions: dict[str, str] = {}
    indices: dict[int, str] = {}

    def dims(piece: str, position: int | None) -> Dims | None:
        words = piece.split()
        if words == ["_"]:
            return None
        if words and words[0].startswith("#") and position is not None:
            indices[position] = words.pop(0)[1:]
        return tuple(factor(word) for word in words)

    def factor(word: str) -> str | None:
        match = re.fullmatch(r"(\w+)(?::(\w+))?([!~]?)", word)
        if not match:
            raise RuleError(f"cannot read {word!r} in rule {text!r}")
        name, reduction, mark = match.groups()
        if name == "1":
            return None
        if reduction:
            reductions[name] = reduction
        if mark:
            (whole if mark == "!" else parted).add(name)
        return name

    operands = tuple(dims(piece, i) for i, piece in enumerate(left.split(","))) if left else ()
    results = tuple(dims(piece, None) for piece in right.split(","))
    if body is not None and variants:
        raise RuleError(f"rule {text!r} has a body and variants; list the body among the variants")
    if body is not None:
        variants = [Variant(ONLY, body, sends or {})]
    _check_variants(text, variants, parted, results, reductions)
    return Rule(
        operands,
        results,
        frozenset(whole),
        reductions,
        indices,
        tuple(frozenset(group) for group in linear),
        tuple(frozenset(group) for group in reads) if reads is not None else None,
        sizes or {},
        tuple(flops),
        frozenset(parted),
        tuple(variants),
        {name: frozenset(given) for name, given in (parts or {}).items()},
        even,
        frozenset(multiplied),
        repeated,
    )


def _check_variants(
    text: str, variants: Sequence[Variant], parted: set[str], results: Sequence[Dims | None],
    reductions: Mapping[str, str],
) -> None:  # fmt: skip
    """RuleError if variants have no names of their own, or groups of factors that one axis cannot split together."""
    seen: set[str] = set()
    for variant in variants:
        if not variant.name or variant.name in seen:
            raise RuleError(f"rule {text!r} has a variant without a name of its own: {variant.name!r}")
        seen.add(variant.name)
        title = f"variant {variant.name!r} of rule {text!r}"
        grouped = [name for group in variant.together for name in group]
        unknown = [name for name in grouped if name not in parted]
        if unknown:
            raise RuleError(f"{title} splits {unknown[0]} together, which is no parted factor of it: mark it with `~`")
        if len(grouped) != len(set(grouped)) or any(len(group) < 2 for group in variant.together):
            raise RuleError(f"{title} splits {variant.together} together: a group has two factors or more, all its own")
        for group in variant.together:
            for index, dims in enumerate(results):
                summed = [name for name in group if name in reductions and name not in (dims or ())]
                kept = [name for name in group if name in (dims or ())]
                if dims is not None and summed and kept:
                    raise RuleError(
                        f"{title} splits {summed[0]} and {kept[0]} together: one axis would both split result {index} "
                        f"and make it partial; drop the reduction of {summed[0]}, and have the body complete it"
                    )


Maker = Callable[..., Rule]
_RULES: dict[Any, Maker] = {}
_NAMED: dict[str, Maker] = {}
_FAMILIES: list[tuple[Callable[[OpOverload], bool], Callable[[OpOverload], Maker]]] = []


def rule(*operators: OpOverload | Callable[..., Any]) -> Callable[[Maker], Maker]:
    """Register `maker(*args, **kwargs) -> Rule` (fake tensors in place of values) for operators; one owner each."""

    def register(maker: Maker) -> Maker:
        for operator in operators:
            if operator in _RULES:
                raise RuleError(f"{operator} has two rules; keep one")
            _RULES[operator] = maker
        return maker

    return register


def fixed(*operators: OpOverload, text: str, **given: Any) -> None:
    """Register a rule whose text is the same for every call."""
    parsed = parse(text, **given)
    rule(*operators)(lambda *_args, **_kwargs: parsed)


def family(belongs: Callable[[OpOverload], bool]) -> Callable[[Callable[[OpOverload], Maker]], None]:
    """Register a maker of makers for every operator without a rule of its own that `belongs`."""

    def register(make: Callable[[OpOverload], Maker]) -> None:
        _FAMILIES.append((belongs, make))

    return register


def named(name: str) -> Callable[[Maker], Maker]:
    """Register a rule for an operator of another package, by name: `transformers.grouped_mm_fallback.default`."""

    def register(maker: Maker) -> Maker:
        _NAMED[name] = maker
        return maker

    return register


def maker_of(operator: Any) -> Maker | None:
    """The rule maker of `operator`, None when it has no rule."""
    if operator in _RULES or not isinstance(operator, OpOverload):  # functions of the runtime may have rules too
        return _RULES.get(operator)
    if str(operator) in _NAMED:
        return _NAMED[str(operator)]
    return next((make(operator) for belongs, make in _FAMILIES if belongs(operator)), None)


def registered() -> list[str]:
    """The names of all operators that have a rule of their own."""
    return [*(str(o) if isinstance(o, OpOverload) else o.__name__ for o in _RULES), *_NAMED]


def letters(value: torch.Tensor, prefix: str = "d") -> list[str]:
    """One factor name a dim; `1` where the size is one, so that it never counts as a factor."""
    return [f"{prefix}{i}" if size != 1 else "1" for i, size in enumerate(value.shape)]


def mark(names: list[str], dims: Iterable[int], sign: str = "!") -> str:
    """The names as rule text, with the given dims kept whole, or marked with another sign."""
    chosen = {d % len(names) for d in dims} if names else set[int]()
    return " ".join(f"{n}{sign}" if i in chosen and n != "1" else n for i, n in enumerate(names))


def adds(x: torch.Tensor) -> bool:
    """Whether parts of `x` may be summed after its type has changed: the sum of booleans is a disjunction."""
    return x.dtype is not torch.bool
