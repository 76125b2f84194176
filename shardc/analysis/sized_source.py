"""One generated source for all sizes, found by comparing the sources for some.

    batch=4:  y = reshape(x, [24, 64])                 SIZES = {'batch': 4}
    batch=6:  y = reshape(x, [36, 64])           ->    batch = SIZES['batch']
    batch=9:  y = reshape(x, [54, 64])                 y = reshape(x, [6 * batch, 64])

The sources may differ in numbers only. A number that differs is a polynomial of the sizes of degree two at most, which
as many sources determine as it has terms; the sources beyond these check it. Sizes of parts are polynomials too, among
sizes that leave one remainder when they are divided by the size of the mesh.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

Sizes = Mapping[str, int]

_TOKEN = re.compile(r"#[^\n]*|'[^'\n]*'|\"[^\"\n]*\"|[A-Za-z_]\w*|\d+(?:\.\d*)?(?:e[+-]?\d+)?|\s+|.", re.ASCII)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d*)?(?:e[+-]?\d+)?(?![\w.])")


def samples(base: Sizes, steps: Sizes, wide: int) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Sizes at which sources determine all polynomials, and sizes to check them at. Both start at `base`, which is
    checked, too, and go up by multiples of `steps`. A check stands at least `wide` steps away."""

    def at(**multiples: int) -> dict[str, int]:
        return {name: base[name] + multiples.get(name, 0) * steps[name] for name in base}

    chosen = [at(), *(at(**{name: 1}) for name in base), *(at(**{name: 2}) for name in base)]
    chosen += [at(**{one: 1, other: 1}) for one, other in itertools.combinations(base, 2)]
    return chosen, [at(**{name: wide + 3 + i for i, name in enumerate(base)})]


def alike(one: str, other: str) -> bool:
    """Whether two sources differ in numbers only."""
    return _NUMBER.sub("0", one) == _NUMBER.sub("0", other)


def sized_source(sources: Sequence[str], sizes: Sequence[Sizes], known: int) -> str | None:
    """The source for all sizes, which reads them from its line SIZES; None where there is none.

    `sizes` are those of every source. The first `known` of them determine the polynomials (see `samples`).
    """
    rows = list(zip(*map(_TOKEN.findall, sources), strict=False))
    if len({len(_TOKEN.findall(source)) for source in sources}) > 1:
        return None
    words = {token for row in rows for token in row if token[0].isalpha()}
    names = {name: _variable(name, words) for name in sizes[0]}
    fitted = _Fitted(sizes, known, names)
    parts: list[str] = []
    for row, after in itertools.zip_longest(rows, rows[1:], fillvalue=("",)):
        part = row[0] if row.count(row[0]) == len(row) else fitted.comment(row) or fitted.token(row, parts, after[0])
        if part is None:
            return None
        parts.append(part)
    return _with_sizes("".join(parts), sizes[0], names)


def _variable(name: str, taken: set[str]) -> str:
    variable = re.sub(r"\W", "_", name, flags=re.ASCII)
    variable = variable if variable.isidentifier() else f"size_{variable}"
    while variable in taken:
        variable += "_"
    taken.add(variable)
    return variable


def _with_sizes(source: str, sizes: Sizes, names: Mapping[str, str]) -> str | None:
    """The source with the line SIZES and the variables behind the head of the module."""
    head, line, rest = source.partition("\nRANDOM = ")
    random, _, rest = rest.partition("\n")
    if not line or re.search(r"\bSIZES\b", source):
        return None
    lines = [f"SIZES = {dict(sizes)}", *(f"{variable} = SIZES[{name!r}]" for name, variable in names.items())]
    return "\n".join([f"{head}{line}{random}", *lines, rest])


class _Fitted:
    """The polynomials behind numbers, of which every source has one value."""

    def __init__(self, sizes: Sequence[Sizes], known: int, names: Mapping[str, str]) -> None:
        variables = list(names)
        degrees = (0, 1, 2)
        self._terms = [t for d in degrees for t in itertools.combinations_with_replacement(variables, d)]
        self._rows = [[math.prod(at[name] for name in term) for term in self._terms] for at in sizes]
        self._names, self._known = names, known
        self._inverse = _inverse([list(map(Fraction, row)) for row in self._rows[:known]])
        self._found: dict[tuple[str, ...], str | None] = {}

    def comment(self, row: Sequence[str]) -> str | None:
        """A comment for all sizes; None for what is no comment, or has numbers of which nothing is known."""
        if not all(token.startswith("#") for token in row):
            return None
        texts, numbers = [_NUMBER.split(token) for token in row], [_NUMBER.findall(token) for token in row]
        if any(text != texts[0] for text in texts):
            return None
        found = [self.number(column) for column in zip(*numbers, strict=True)]
        pairs = itertools.zip_longest(texts[0], found, fillvalue="")
        return None if None in found else "".join(f"{text}{number}" for text, number in pairs)

    def token(self, row: Sequence[str], before: Sequence[str], after: str) -> str | None:
        """A number for all sizes, as it is written between tokens; None for what is no number."""
        if not all(_NUMBER.fullmatch(token) for token in row):
            return None
        found = self.number(row)
        previous = next((token for token in reversed(before) if not token.isspace()), "")
        alone = previous in ("(", "[", ",", "=") and after[:1] in (",", ")", "]", "\n", "")
        return found if found is None or found.isidentifier() or alone else f"({found})"

    def number(self, row: Sequence[str]) -> str | None:
        """The expression behind the values of a number; None where there is none."""
        key = tuple(row)
        if key not in self._found:
            self._found[key] = row[0] if len(set(row)) == 1 else self._number(row)
        return self._found[key]

    def _number(self, row: Sequence[str]) -> str | None:
        if all(token.isdigit() for token in row):
            return self._polynomial(list(map(int, row)))
        values = list(map(float, row))
        if all(value.is_integer() for value in values):
            found = self._polynomial(list(map(int, values)))
            return f"float({found})" if found else None
        inverses = [round(1 / value) if value else 0 for value in values]
        if all(inverse and 1 / inverse == value for inverse, value in zip(inverses, values, strict=True)):
            found = self._polynomial(inverses)
            return f"1 / ({found})" if found else None
        return None

    def _polynomial(self, values: list[int]) -> str | None:
        factors = [sum(a * b for a, b in zip(row, values, strict=False)) for row in self._inverse]
        for row, value in zip(self._rows, values, strict=True):
            if sum(a * b for a, b in zip(row, factors, strict=True)) != value:
                return None
        below = math.lcm(*(factor.denominator for factor in factors))
        return _written([int(factor * below) for factor in factors], self._terms, below, self._names)


def _written(factors: Sequence[int], terms: Sequence[tuple[str, ...]], below: int, names: Mapping[str, str]) -> str:
    """`2 * batch * seq + 1`; with a denominator, `(batch + 1) // 2`."""
    text = ""
    for factor, term in sorted(zip(factors, terms, strict=True), key=lambda pair: -len(pair[1])):
        if factor:
            parts = [names[name] for name in term]
            parts = [str(abs(factor)), *parts] if abs(factor) != 1 or not parts else parts
            sign = (" - " if factor < 0 else " + ") if text else ("-" if factor < 0 else "")
            text += sign + " * ".join(parts)
    text = text or "0"
    if below == 1:
        return text
    return f"{text} // {below}" if text.isidentifier() else f"({text}) // {below}"


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """The inverse of a square matrix, which has one."""
    size = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for at in range(size):
        pivot = next(i for i in range(at, size) if rows[i][at])
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = [value / rows[at][at] for value in rows[at]]
        for i in range(size):
            if i != at and rows[i][at]:
                rows[i] = [value - rows[i][at] * unit for value, unit in zip(rows[i], rows[at], strict=True)]
    return [row[size:] for row in rows]
