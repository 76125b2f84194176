"""A text in sections, some of them tables. `str` gives it plain, `html` is for notebooks; `shardc.inspect.console` lays
it out on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

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

    def html(self) -> str:
        """What a notebook shows: the same, with tables. All text is escaped."""
        parts = [as_html(self.head)]
        for section in self.sections:
            title = f"<b>{escape(section.title)}</b>" if section.title else ""
            content = section.content
            parts.append(title + (_table(content) if isinstance(content, Columns) else as_html(content)))
        return "".join([*parts, as_html(self.tail)])


def as_html(lines: Iterable[str]) -> str:
    """Lines as they are, for a notebook; escaped."""
    text = escape("\n".join(lines))
    return f"<pre>{text}</pre>" if text else ""


def _table(table: Columns) -> str:
    sides = ["left" if side == "<" else "right" for side in table.aligned]
    rows = [
        "".join(
            f'<td style="text-align: {side}">{escape(cell)}</td>' for side, cell in zip(sides, row, strict=True)
        )
        for row in table.rows
    ]  # fmt: skip
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
