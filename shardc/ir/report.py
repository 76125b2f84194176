"""A text in sections, some of them tables. `str` gives it plain; `shardc.inspect.console` lays it out on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardc.ir.printing import columns


@dataclass(frozen=True)
class Columns:
    """Rows of cells, and a sign a column: `<` for one that is aligned left, `>` for right."""

    rows: Sequence[Sequence[str]]
    aligned: str


@dataclass(frozen=True)
class Section:
    """Lines or a table under a title; without a title (`""`) under an empty line alone."""

    title: str
    content: Sequence[str] | Columns

    @property
    def lines(self) -> Sequence[str]:
        return columns(self.content.rows, self.content.aligned) if isinstance(self.content, Columns) else self.content


@dataclass(frozen=True)
class Report:
    """Lines, sections that are set apart from them, and lines at the end."""

    head: Sequence[str]
    sections: Sequence[Section]
    tail: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [*self.head]
        for section in self.sections:
            lines += ["", *([section.title] if section.title else []), *(f"  {line}" for line in section.lines)]
        return "\n".join([*lines, *(("", *self.tail) if self.tail else ())])
