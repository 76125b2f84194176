"""A program seen through its rules: every operator with the atoms that its operands and results share.

Views are no operators here. A value that is a view keeps refs into its base value, so a strategy's demand on a view
is a demand on the base, and the solver never meets a view.

    %h = mm(%x, %w)            x: (0: 32) (1: 64)    w: (0: 64) (1: 16)    h: (0: 32) (1: 16)
    %v = view(%h, [32, 4, 4])  h: (0: 32) (1: 4, 2: 4), now that its last dim is two atoms; v: (0: 32) (1: 4) (2: 4)

Layers repeat: equal values have one `Form`, equal operators one `Kind`, and what depends on nothing else is worked out
once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from torch import fx

from shardc.ir.layout import Atom, Layout
from shardc.ir.program import Program
from shardc.rules.factors.atoms import Atoms, Ref
from shardc.rules.notation import Rule
from shardc.rules.trial.trial import Learned

Key = tuple[fx.Node, int]


@dataclass(frozen=True, eq=False)
class Form:
    """What the values of equal layers have in common: per dim the atoms it consists of, each with its place among those
    of the base value (None: it is not one of them) and its size; and the sizes of the base value's atoms. Equal forms
    of one program are one object."""

    dims: tuple[tuple[tuple[int | None, int], ...], ...]
    base: tuple[int, ...]

    @cached_property
    def atoms(self) -> tuple[tuple[int | None, int], ...]:
        """Those of all dims, in order."""
        return tuple(atom for dim in self.dims for atom in dim)

    @cached_property
    def places(self) -> tuple[int | None, ...]:
        return tuple([place for place, _ in self.atoms])

    @cached_property
    def flat(self) -> Form:
        """That of a view in which every atom is a dim."""
        return Form(tuple([(atom,) for atom in self.atoms]), self.base)

    @cached_property
    def _layouts(self) -> dict[object, Layout]:
        return {}

    def split_by(self, axes: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """The axes of its atoms where those of the base value are split by `axes`, and no others."""
        return tuple([() if place is None else axes[place] for place in self.places])

    def layout(self, axes: Sequence[tuple[str, ...]], partial: tuple[tuple[str, str], ...] = ()) -> Layout:
        """The layout of a value whose atoms are split by `axes`, one entry each."""
        rest = iter(axes)
        return _layout(tuple([tuple([(size, next(rest)) for _, size in dim]) for dim in self.dims]), partial)

    def layout_on(self, axes: tuple[tuple[str, ...], ...], partial: tuple[tuple[str, str], ...] = ()) -> Layout:
        """The same where `axes` are those of the base value's atoms."""
        if (axes, partial) not in self._layouts:
            self._layouts[axes, partial] = self.layout(self.split_by(axes), partial)
        return self._layouts[axes, partial]


@dataclass(slots=True)
class Value:
    """A tensor of the program: `key` is the base value it views (its own if it is no view), `dims` its refs per dim.
    `form` tells what its atoms are, when they are final."""

    key: Key
    dims: list[list[Ref]]
    form: Form = field(init=False, repr=False)


@dataclass(slots=True)
class Operand:
    """One tensor argument of an operator: the graph node passed, its value, and the factor of each of its dims."""

    node: fx.Node
    value: Value
    names: tuple[str | None, ...]


@dataclass(slots=True)
class Result:
    """One tensor that an operator makes."""

    key: Key
    value: Value
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Parting:
    """How a parted factor may be split: the `size` of the dim it stands for, and the numbers of parts that one axis may
    make of it (None: any, over any axes)."""

    size: int
    parts: frozenset[int] | None


@dataclass(frozen=True)
class Factor:
    """An atom of an operator: piece number `index` of the factor called `name` in its rule."""

    name: str
    index: int
    size: int
    whole: bool
    parting: Parting | None = None


@dataclass(frozen=True, eq=False)
class Kind:
    """What operators of equal layers have in common: their factors as atoms, and per operand, then per result, which of
    them each of its atoms is, if any. Operators of one program have the same kind, as an object, if they are the same
    call but for the values that they are given: of one rule, with the same literals, types and forms."""

    factors: list[Factor]
    carried: list[list[int | None]]


@dataclass(slots=True)
class Op:
    """An operator (or placeholder) with its rule; `learned` if trial found the rule. It has a kind when the atoms are
    final."""

    node: fx.Node
    rule: Rule
    operands: list[Operand]
    results: list[Result]
    learned: Learned | None = None
    kind: Kind = field(init=False, repr=False)

    @property
    def factors(self) -> list[Factor]:
        return self.kind.factors

    @property
    def items(self) -> list[Operand | Result]:
        return [*self.operands, *self.results]


@dataclass
class Factored:
    """`ops` in graph order, placeholders first; `values` for every tensor node; `base` the refs of every base value."""

    program: Program
    atoms: Atoms
    ops: list[Op]
    values: dict[fx.Node, Value]
    base: dict[Key, Value]

    def leaves(self, value: Value) -> list[Ref]:
        """The atoms of a value, in order."""
        return [leaf for dim in value.dims for leaf in self.atoms.leaves(dim)]

    def sizes(self, key: Key) -> tuple[int, ...]:
        return self.base[key].form.base


@lru_cache(maxsize=1 << 16)
def _layout(
    dims: tuple[tuple[tuple[int, tuple[str, ...]], ...], ...], partial: tuple[tuple[str, str], ...]
) -> Layout:  # fmt: skip
    """Equal layouts are one object: a deep model has few, and what is derived from one is derived once."""
    return Layout(tuple(tuple(Atom(*atom) for atom in dim) or (Atom(1),) for dim in dims), partial)
