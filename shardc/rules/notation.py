"""Operator rules as data: one line of einsum-like text an operator.

    "m k, k n -> m n"        letters are factors; one that no result carries is reduced there: the result is P(sum)
    "a k:max -> a"           a reduction other than sum
    "a s! -> a s!"           s stays whole on every axis
    "a s~ -> a s~"           s is parted: where it is split, the body of a `Variant` runs in the operator's place. The
                             body gets the keyword s, a runtime `Part`, and communicates with the other parts. A
                             result without s is complete; with `s:sum~` it is partial
    "v d, #v i -> i d"       operand 1 holds indices into factor v. If v is split, they are rebased to the rank's chunk.
                             Indices into other chunks point at a dummy row. It reads as zeros, so that the result is
                             partial; what is written to it is dropped
    "1"                      a dim of size one
    "_"                      an absent operand or result
    "-> n"                   a text that begins with the arrow has no operands; " -> n" has one without dims

`linear` lists groups of operands. If exactly the operands of a group are partial, the results are partial. An operand
in every group is additive: where a factor is summed, it must be partial (the bias of addmm). The exceptions are listed
as `multiplied`: every part of the sum needs the whole operand (a gradient alone in its group).

`reads` lists, for each result, the operands that it depends on. A result is partial over a factor only if it reads an
operand that carries the factor.

`sizes` is for arguments that are sizes and become local. It maps the position of an argument to the result whose shape
it is, to the factor whose size it is, or, for a list, to the factors (and plain numbers) of its entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.errors import RuleError
from shardc.rules.drawn import Drawn
from shardc.rules.ring import Ring
from shardc.runtime.collectives.collective import AnyCollective

Dims = tuple[str | None, ...]
Size = int | str | tuple[str | int, ...]
Body = Callable[..., Any]


class Travel(Enum):
    """When a body sends."""

    ONCE = "once"
    """When it has computed; it waits for what arrives."""
    ROUND = "round"
    """From one step of a ring to the next, while a rank computes the step before."""
    HOME = "home"
    """What a step of a ring has made: to the next step, while a rank computes that; after the last, to its owner."""


@dataclass(frozen=True)
class Send:
    """One collective of a body: its local operand has `elements` for every point of `factors`, of `itemsize` bytes.

    It is sent only where the parted factor is in `parts` parts (None: any number), and the factors `beside` are split.
    What goes round a ring (see `Travel`) is sent as often as the ring has steps to go to: see `Band`.
    """

    collective: AnyCollective
    factors: tuple[str, ...]
    itemsize: int
    elements: int = 1
    parts: int | None = None
    beside: tuple[str, ...] = ()
    travel: Travel = Travel.ONCE


@dataclass(frozen=True)
class Band:
    """The pairs of two factors that an operator computes: row i and column j where `j <= i`, if `causal`; and, where
    `window` is not 0, where `i - window < j`, and `j < i + window` if not causal.

    A matrix product with both factors counts these pairs alone, as many as the rank with most of them has. A ring over
    both goes to the parts of the columns, and leaves out those that no rank reads.
    """

    rows: str
    columns: str
    causal: bool = False
    window: int = 0
    balanced: bool = False
    """Whether ranks count as if every sequence that may be folded was folded: see `shardc/planning/folding.py`."""


@dataclass(frozen=True)
class Workspace:
    """Memory that an operator or a body allocates and frees again: `elements` for every local point of `factors`, of
    `itemsize` bytes, but `most` bytes at most. `bound` says how many rows there may be, each with so much memory;
    without it, one.

    It is allocated only where all factors of `beside` are split, each into `parts` parts at least. What is not there at
    the same time has different numbers of a `stage`; the largest stage counts.
    """

    factors: tuple[str, ...]
    itemsize: int
    elements: float = 1
    most: int | None = None
    beside: tuple[str, ...] = ()
    stage: int = 0
    parts: int = 2
    bound: RowBound | None = None


@dataclass(frozen=True)
class RowBound:
    """The rows for which there is room at the local points of factor `to` (experts), where each point of `of` (tokens)
    sends a row to `each` of the points of `to`: `capacity` times the mean, but no more than can come at worst.
    """

    of: str
    to: str
    each: int
    total: int
    capacity: float


@dataclass(frozen=True)
class Variant:
    """One way to run an operator that has a parted factor split: `body` runs in the operator's place.

        Variant("all_gather", softmax_gathered, {"s": [Send(all_gather, rows, 4, elements=2)]})
        Variant("ring", ring_attention, {"s": [...]}, together=(("r", "s"),))

    `sends` lists, per parted factor, the collectives of the body if that factor is split.

    `together` holds groups of parted factors. An axis that splits one factor of a group splits them all, and the body
    gets a `Part` for each. An operand or result with several factors of a group is split along the one that the group
    names first. A result with one factor of a group is complete over the others: that is the body's work. A variant
    with groups runs only where one of its groups is split.

    `folds` are the parted factors that an axis may deal out folded: the body asks for their `Part.runs`.

    `exchange` names two factors, such as experts and tokens, whose parts the body exchanges. An axis that splits the
    first, which is parted, splits the second too; others may split the second alone. A result with one of the two is
    split along it and complete.

    With a `ring`, the variant runs where one axis splits two factors that are not parted.

    The slowest rank computes and sends `imbalance` times what the mean does.

    Variants that cost the same are equal, whatever their bodies.
    """

    name: str
    body: Body = field(compare=False)
    sends: Mapping[str, Sequence[Send]] = field(default_factory=dict[str, Sequence[Send]], hash=False)
    together: tuple[tuple[str, ...], ...] = ()
    workspace: tuple[Workspace, ...] = ()
    folds: frozenset[str] = frozenset()
    exchange: tuple[str, str] | None = None
    ring: Ring | None = None
    imbalance: float = 1.0


@dataclass(frozen=True)
class Rule:
    """An operator's factors for one call. `operands` and `results` hold the factor name of each dim, None for size one.

    The module's docstring explains the fields up to `sizes`, and `parse` the others.
    """

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
    drawn: Drawn | None = None
    band: Band | None = None
    workspace: tuple[Workspace, ...] = ()

    def variant(self, name: str) -> Variant:
        """The variant called `name`."""
        return next(variant for variant in self.variants if variant.name == name)


ONLY = "parted"
"""The name of the variant of a rule that has just one."""


def parse(
    text: str,
    linear: Iterable[Iterable[int]] = (),
    reads: Iterable[Iterable[int]] | None = None,
    sizes: Mapping[int, Size] | None = None,
    flops: Iterable[str] = (),
    body: Body | None = None,
    sends: Mapping[str, Sequence[Send]] | None = None,
    folds: Iterable[str] = (),
    variants: Sequence[Variant] = (),
    parts: Mapping[str, Iterable[int]] | None = None,
    even: bool = False,
    multiplied: Iterable[int] = (),
    drawn: Drawn | None = None,
    band: Band | None = None,
    workspace: Sequence[Workspace] = (),
) -> Rule:
    """The rule that `text`, in the notation above, and the other arguments describe.

    - `flops`: matrix products such as `m k n`; each counts two flops for every point of its factors, or a part of the
      points: `2/8 t e d`.
    - `body` with its `sends` and `folds` is the only variant. A rule with several variants lists them as `variants`.
    - `parts`: the numbers of parts into which a parted factor may be split. Only one axis may then split it.
    - `even`: nothing is split unevenly, because the operator may fail on the contents of padding.
    - `drawn`: the random numbers that a rank draws.
    - `band`: the pairs of two factors that are computed at all.
    - `workspace`: what the operator itself allocates, where no variant runs.

    RuleError if the text cannot be read, or its variants do not fit it.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"rule {text!r} has no '->' between operands and results")
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
            raise RuleError(
                f"cannot read {word!r} in rule {text!r}; a dim is written as k, k:max, k! or k~, see notation.py"
            )
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
        variants = [Variant(ONLY, body, sends or {}, folds=frozenset(folds))]
    _check_variants(text, variants, parted, band)
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
        {name: frozenset(counts) for name, counts in (parts or {}).items()},
        even,
        frozenset(multiplied),
        drawn,
        band,
        tuple(workspace),
    )


def _check_variants(text: str, variants: Sequence[Variant], parted: set[str], band: Band | None) -> None:
    """RuleError if two variants share a name, one axis cannot split a group of factors together, or what goes round a
    ring has no ring."""
    seen: set[str] = set()
    for variant in variants:
        if not variant.name or variant.name in seen:
            raise RuleError(f"rule {text!r} has a variant whose name is empty or used twice: {variant.name!r}")
        seen.add(variant.name)
        place = getattr(variant.body, "__qualname__", "")
        if "<" in place and not variant.body.__module__.startswith("shardc.runtime"):
            raise RuleError(
                f"rule {text!r}: the body of variant {variant.name!r} is {place}, which generated code cannot import; "
                "write it as a function of its module"
            )
        title = f"variant {variant.name!r} of rule {text!r}"
        grouped = [name for group in variant.together for name in group]
        unknown = [name for name in grouped if name not in parted]
        if unknown:
            raise RuleError(f"{title} splits {unknown[0]} together, which is not a parted factor: mark it with `~`")
        if len(grouped) != len(set(grouped)) or any(len(group) < 2 for group in variant.together):
            raise RuleError(
                f"{title} splits {variant.together} together: groups have two or more factors and share none"
            )
        travels = any(send.travel is not Travel.ONCE for sends in variant.sends.values() for send in sends)
        if travels and (band is None or (band.rows, band.columns) not in variant.together):
            raise RuleError(
                f"{title} sends round a ring: the rule needs a band, whose rows and columns the variant splits together"
            )
        if variant.exchange is not None and (variant.exchange[0] not in parted or variant.exchange[1] in parted):
            raise RuleError(f"{title} exchanges {variant.exchange}: only the first may be parted, and must be")


Maker = Callable[..., Rule]
_RULES: dict[Any, Maker] = {}
_NAMED: dict[str, Maker] = {}
_FAMILIES: list[tuple[Callable[[OpOverload], bool], Callable[[OpOverload], Maker]]] = []


def rule(*operators: OpOverload | Callable[..., Any]) -> Callable[[Maker], Maker]:
    """Register `maker(*args, **kwargs) -> Rule` for operators; it gets fake tensors. RuleError for a second rule."""

    def register(maker: Maker) -> Maker:
        for operator in operators:
            if operator in _RULES:
                raise RuleError(f"{operator} has two rules; keep one")
            _RULES[operator] = maker
        return maker

    return register


def fixed(*operators: OpOverload, text: str, **options: Any) -> None:
    """Register a rule that is the same for every call; `options` are those of `parse`."""
    parsed = parse(text, **options)
    rule(*operators)(lambda *_args, **_kwargs: parsed)


def family(belongs: Callable[[OpOverload], bool]) -> Callable[[Callable[[OpOverload], Maker]], None]:
    """Register a function from operator to maker, for every operator without a rule for which `belongs` is true."""

    def register(make: Callable[[OpOverload], Maker]) -> None:
        _FAMILIES.append((belongs, make))

    return register


def named(name: str) -> Callable[[Maker], Maker]:
    """Register a maker for an operator of another package, by name: `transformers.grouped_mm_fallback.default`."""

    def register(maker: Maker) -> Maker:
        _NAMED[name] = maker
        return maker

    return register


def maker_of(operator: Any) -> Maker | None:
    """The rule maker of `operator`, None if it has no rule."""
    if operator in _RULES or not isinstance(operator, OpOverload):  # functions of the runtime may have rules too
        return _RULES.get(operator)
    if str(operator) in _NAMED:
        return _NAMED[str(operator)]
    return next((make(operator) for belongs, make in _FAMILIES if belongs(operator)), None)


def registered() -> list[str]:
    """The names of all operators with a rule, except those of families."""
    return [*(str(o) if isinstance(o, OpOverload) else o.__name__ for o in _RULES), *_NAMED]


def letters(value: torch.Tensor, prefix: str = "d") -> list[str]:
    """One factor name for each dim; `1` if its size is one, so that it never counts as a factor."""
    return [f"{prefix}{i}" if size != 1 else "1" for i, size in enumerate(value.shape)]


def named_dims(value: torch.Tensor, names: Iterable[str]) -> str:
    """The names of its dims as rule text; `1` where the size is one."""
    return " ".join("1" if size == 1 else name for size, name in zip(value.shape, names, strict=True))


def mark(names: list[str], dims: Iterable[int], sign: str = "!") -> str:
    """The names as rule text; those of `dims` get the `sign`, which by default keeps them whole."""
    chosen = {d % len(names) for d in dims} if names else set[int]()
    return " ".join(f"{n}{sign}" if i in chosen and n != "1" else n for i, n in enumerate(names))


def adds(x: torch.Tensor) -> bool:
    """Whether addends of `x` still sum to it after a cast: the sum of booleans is a disjunction, so theirs do not."""
    return x.dtype is not torch.bool
