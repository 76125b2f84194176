"""Strategies and layouts as a person reads and edits them, and back.

m@dp, n@tp                   dp splits factor m, tp splits n
d0.1@(dp,tp)                 dp and then tp split the second piece of factor d0
k@tp, again                  tp splits k; backward runs the operator again
q@cp, k@cp, variant ring     cp splits both, and the variant `ring` runs
+sum@tp                      sums over tp pass through
whole                        every rank makes all of it
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from shardc.errors import LayoutError, ShardcError
from shardc.ir.layout import Layout, describe
from shardc.ir.mesh import Mesh
from shardc.ir.program import tensor_of
from shardc.ir.splits import Splits
from shardc.planning.constraints import Constraint, check_constraint, demanded_leaves
from shardc.rules.factors.factored import Factor, Factored, Form, Value
from shardc.rules.factors.strategy import PLAIN, Strategy

WHOLE = "whole"
_SPLIT = re.compile(r"([^\s@]+)@(?:\(([^)]*)\)|(\S+))")
_PASSES = re.compile(r"\+sum@(\S+?)(?: of group (\d+))?")


def strategy_text(factors: Sequence[Factor], strategy: Strategy) -> str:
    """A strategy as text; `factors` are those of its operator."""
    parts = [
        f"{label}@{axes[0]}" if len(axes) == 1 else f"{label}@({','.join(axes)})"
        for label, axes in zip(_labels(factors), strategy.split, strict=True)
        if axes
    ]
    parts += [f"+sum@{axis}" + (f" of group {group}" if group else "") for axis, group in strategy.passes]
    parts += [f"variant {strategy.variant}"] if strategy.variant != PLAIN else []
    return ", ".join([*(parts or [WHOLE]), *(["again"] if strategy.again else [])])


def parsed_strategy(factors: Sequence[Factor], text: str, mesh: Mesh) -> Strategy:
    """Inverse of `strategy_text`. Raises ShardcError for a part that cannot be read; what is read need not be legal."""
    places = {label: index for index, label in enumerate(_labels(factors))}
    split: list[tuple[str, ...]] = [() for _ in factors]
    passes, variant, again = dict[str, int](), PLAIN, False
    for part in re.split(r",\s+", text.strip()):
        if match := _PASSES.fullmatch(part):
            passes[match[1]] = int(match[2] or 0)
        elif (match := _SPLIT.fullmatch(part)) and match[1] in places:
            split[places[match[1]]] = tuple(axis.strip() for axis in (match[2] or match[3]).split(","))
        elif part.startswith("variant "):
            variant = part.removeprefix("variant ").strip()
        elif part == "again":
            again = True
        elif part != WHOLE:
            raise ShardcError(
                f"cannot read {part!r}; write which axes split which of its factors ({', '.join(places) or 'none'}), "
                f"like 'm@dp, n@tp', or '{WHOLE}'"
            )
    unknown = {axis for axes in split for axis in axes if axis not in mesh.ranks} | (passes.keys() - set(mesh.names))
    if unknown:
        raise ShardcError(f"mesh {mesh} has no axis {min(unknown)!r}; it has {', '.join(mesh.names)}")
    return Strategy(tuple(split), tuple((a, passes[a]) for a in mesh.names if a in passes), again, variant)


def _labels(factors: Sequence[Factor]) -> list[str]:
    """The names of factors, with a number where one has several pieces."""
    pieces = Counter(factor.name for factor in factors)
    return [factor.name if pieces[factor.name] == 1 else f"{factor.name}.{factor.index}" for factor in factors]


class LayoutTexts:
    """Layouts of the values of a program as text, and back. What is alike is written and read once."""

    def __init__(self, factored: Factored, mesh: Mesh) -> None:
        self._factored, self._mesh = factored, mesh
        self._written: dict[object, str] = {}
        self._read: dict[tuple[Form, str], Splits] = {}

    def write(self, value: Value, splits: Splits) -> str:
        """`f32[256@tp, 64]`: a value, where its base value lies as `splits`. Where the value is a view that does not
        show all of it, its base value."""
        value, dtype = self._telling(value), tensor_of(value.key).dtype
        known = dtype, value.form, splits
        if known not in self._written:
            exact = value.form.layout_on(splits.axes, splits.partial)
            text = describe(tensor_of(value.key), exact.simplify(self._mesh))
            if self.read(value, text, text) != splits:  # another split of its pieces prints alike
                text = describe(tensor_of(value.key), exact)
            self._written[known] = text
        return self._written[known]

    def read(self, value: Value, text: str, label: str) -> Splits:
        """Inverse of `write`. Raises LayoutError and InfeasibleError, which begin with `label`."""
        value = self._telling(value)
        known = value.form, text
        if known not in self._read:
            self._read[known] = self._parsed(value, text, label)
        return self._read[known]

    def _telling(self, value: Value) -> Value:
        """The value, if its atoms are those of its base value; else that."""
        same = sorted(place for place in value.form.places if place is not None) == [*range(len(value.form.base))]
        return value if same and None not in value.form.places else self._factored.base[value.key]

    def _parsed(self, value: Value, text: str, label: str) -> Splits:
        try:
            layout = Layout.parse(text)
            layout.check(self._mesh)
        except LayoutError as error:
            raise LayoutError(f"{label}: {error}") from error
        dims = tuple(tuple(axis for atom in dim for axis in atom.axes) for dim in layout.dims)
        constraint = Constraint(value.key, value, dims, label, layout)
        check_constraint(constraint, self._mesh, value.form.layout_on(((),) * len(value.form.base)).shape)
        axes: list[tuple[str, ...]] = [() for _ in value.form.base]
        for leaf, dealt in demanded_leaves(self._factored, self._mesh, constraint):
            axes[leaf] = dealt
        partial = dict(layout.partial)
        return Splits(tuple(axes), tuple((axis, partial[axis]) for axis in self._mesh.names if axis in partial))
