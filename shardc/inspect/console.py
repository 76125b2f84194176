"""What commands print: plain text into files and pipes, colours and columns that fit on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table as Grid
from rich.text import Text as Styled
from rich.theme import Theme

from shardc.ir.report import Columns, Report

NARROW = 16
"""A column of at most so many characters is never broken."""


class Highlights(RegexHighlighter):
    """Finds what stands out in a plan: layouts, amounts, how sure a figure is."""

    base_style = "plan."
    highlights: ClassVar[Sequence[str]] = (
        r"(?P<layout>\b[a-z]+\d*\[[^\]]*\](?: \+\w+@\w+)*)",
        r"(?P<amount>(?<![\w.])\d+(?:\.\d+)? (?:[KMG]iB|B|s|ms|us|ns)\b)",
        r"(?P<good>\bproven optimal\b|\boptimal\b)",
        r"(?P<fair>\bwithin [\d.]+% of the proven bound\b|\bno bound proven\b)",
    )


THEME = Theme(
    {"plan.layout": "cyan", "plan.amount": "magenta", "plan.good": "green", "plan.fair": "yellow", "plan.title": "bold"}
)


def show(what: Report | str, console: Console | None = None) -> None:
    """Print a report or a text, by default to stdout."""
    console = console or Console(theme=THEME)
    if not console.is_terminal:
        print(what, file=console.file)
    elif isinstance(what, str):
        _line(console, what)
    else:
        _lay_out(console, what)


def show_code(code: str, console: Console | None = None) -> None:
    """Print Python, by default to stdout."""
    console = console or Console(theme=THEME)
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default"), soft_wrap=True)
    else:
        print(code, file=console.file)


def _lay_out(console: Console, report: Report) -> None:
    for line in report.head:
        _line(console, line)
    for section in report.sections:
        console.print()
        if section.title:
            console.print(Styled(section.title, "plan.title"))
        if isinstance(section.content, Columns):
            console.print(Padding(_grid(section.content), (0, 0, 0, 2)))
        else:
            for line in section.content:
                _line(console, f"  {line}")
    if report.tail:
        console.print()
    for line in report.tail:
        _line(console, line)


def _line(console: Console, text: str) -> None:
    """The terminal breaks what is too long, so that it is copied whole."""
    console.print(Highlights()(text), soft_wrap=True)


def _grid(table: Columns) -> Grid:
    """The columns; where they need more than the terminal has, wide ones are broken."""
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for side, cells in zip(table.aligned, zip(*table.rows, strict=True), strict=True):
        narrow = max(map(len, cells)) <= NARROW
        grid.add_column(justify="left" if side == "<" else "right", no_wrap=narrow, overflow="fold")
    for row in table.rows:
        grid.add_row(*(Highlights()(cell) for cell in row))
    return grid
