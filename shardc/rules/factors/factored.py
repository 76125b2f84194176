"""A program seen through its rules: every operator with the atoms that its operands and results share.

Views do not count as operators. A view keeps refs into its base value, so if a strategy demands a layout of a view, it
demands one of the base. The solver never sees a view.

    %h = mm(%x, %w)            x: (0: 32) (1: 64)    w: (0: 64) (1: 16)    h: (0: 32) (1: 16)
    %v = view(%h, [32, 4, 4])  h: (0: 32) (1: 4, 2: 4), now that its last dim is two atoms; v: (0: 32) (1: 4) (2: 4)

Layers repeat. Equal values share one `Form`, and equal operators one `Kind`, so that facts which depend only on these
are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from torch import fx

from shardc.ir.facts import Key
from shardc.ir.layout import Atom, Layout
from shardc.ir.program import Program
from shardc.ir.splits import Folds
from shardc.rules.factors.atoms import Atoms, Ref
from shardc.rules.factors.fused import ALONE, Fused
from shardc.rules.notation import Rule
from shardc.rules.trial.trial import Learned


@dataclass(frozen=True, eq=False)
class Form:
    """The atoms of a value, shared by the values of equal layers. Equal forms of one program are one object.

    `dims` lists the atoms of each dim as (place, size), where place is the index among the atoms of the base value, or
    None for an atom that the base value lacks. `base` lists the sizes of the base value's atoms.
    """

    dims: tuple[tuple[tuple[int | None, int], ...], ...]
    base: tuple[int, ...]
    folds: Folds = ()

    @cached_property
    def atoms(self) -> tuple[tuple[int | None, int], ...]:
        """The atoms of all dims, in order."""
        return tuple(atom for dim in self.dims for atom in dim)

    @cached_property
    def places(self) -> tuple[int | None, ...]:
        return tuple([place for place, _ in self.atoms])

    @cached_property
    def flat(self) -> Form:
        """The form of a view in which every atom is a dim."""
        return Form(tuple([(atom,) for atom in self.atoms]), self.base, self.folds)

    @cached_property
    def _layouts(self) -> dict[object, Layout]:
        return {}

    def split_by(self, axes: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """The axes of its atoms, if `axes` split the atoms of the base value and no other atom is split."""
        return tuple([() if place is None else axes[place] for place in self.places])

    def layout(self, axes: Sequence[tuple[str, ...]], partial: tuple[tuple[str, str], ...] = ()) -> Layout:
        """The layout of a value whose atoms are split by `axes`, one entry for each atom."""
        rest = iter(axes)
        return _layout(tuple([tuple([(size, next(rest)) for _, size in dim]) for dim in self.dims]), partial)

    def layout_on(self, axes: tuple[tuple[str, ...], ...], partial: tuple[tuple[str, str], ...] = ()) -> Layout:
        """The layout of a value whose base value's atoms are split by `axes`."""
        if (axes, partial) not in self._layouts:
            self._layouts[axes, partial] = self.layout(self.split_by(axes), partial)
        return self._layouts[axes, partial]


@dataclass(slots=True)
class Value:
    """A tensor of the program. `key` names its base value: the value that it views, or itself. `dims` are refs per dim.

    `form` has its atoms, once they are final.
    """

    key: Key
    dims: list[list[Ref]]
    form: Form = field(init=False, repr=False)


@dataclass(slots=True)
class Operand:
    """One tensor argument of an operator: the graph node, its value, and the factor of each dim."""

    node: fx.Node
    value: Value
    names: tuple[str | None, ...]


@dataclass(slots=True)
class Result:
    """One tensor that an operator returns: its key, its value, and the factor of each dim."""

    key: Key
    value: Value
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Parting:
    """How a parted factor may be split.

    `size` is that of the dim. `parts` are the allowed numbers of parts, made by one axis (None: any, by any axes).
    """

    size: int
    parts: frozenset[int] | None


@dataclass(frozen=True)
class Factor:
    """An atom of an operator: piece number `index` of the factor that its rule calls `name`. `folds` are the
    axes that may deal it out folded."""

    name: str
    index: int
    size: int
    whole: bool
    parting: Parting | None = None
    folds: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Kind:
    """Facts that the operators of equal layers share: their factors as atoms, and the factor of each tensor's atoms.

    `carried` lists, per operand and then per result, the index of the factor that each of its atoms is (None: it is no
    factor). Operators of one program share one object if they have the same rule, literals, dtypes and forms.
    """

    factors: list[Factor]
    carried: list[list[int | None]]
    fused: Fused = ALONE


@dataclass(slots=True)
class Op:
    """An operator (or placeholder) with its rule. `learned` is set if trial found the rule, and `kind` once the atoms
    are final."""

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
    """A program with its atoms: `ops` in graph order, `values` of every tensor node, and `base` values by key."""

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

    def folds(self, key: Key) -> Folds:
        """Which axes may fold the atoms of a base value."""
        return self.base[key].form.folds


@lru_cache(maxsize=1 << 14)
def _layout(
    dims: tuple[tuple[tuple[int, tuple[str, ...]], ...], ...], partial: tuple[tuple[str, str], ...]
) -> Layout:  # fmt: skip
    """Equal layouts are one object, since a deep model has few, so that facts derived from one are computed once."""
    return Layout(tuple(tuple(Atom(*atom) for atom in dim) or (Atom(1),) for dim in dims), partial)
