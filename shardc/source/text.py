"""Lines of Python as `ruff format` leaves them: on one line where they fit; else arguments on a line of their own, and
what does not fit there, or is no argument, one item a line with a comma behind it.

    x = aten.mm.default(a, b)  # f32[32@dp, 64]

    x = all_reduce_bucket(
        [a, b],
        axis="dp",
    )

Many names fill lines, which the formatter then leaves alone:

    (
        input_norm_cast, input_norm_rsqrt, input_norm, attn_v, attn_add, attn_add_2, attn_item, post_attn_norm_cast,
        post_attn_norm_rsqrt, mlp_gate_mm,
    ) = given  # fmt: skip
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 120
STEP = 4
"""Columns of a line, and by how many what is inside of something is indented."""

MANY = 6
"""Names that fill lines, rather than stand on a line each."""

_SKIP = "  # fmt: skip"


@dataclass(frozen=True)
class Brackets:
    """Items between brackets. With `bare`, the brackets are only written where the items do not fit on a line."""

    open: str
    items: tuple[Item, ...]
    close: str
    bare: bool = False

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.items))
        if len(self.items) == 1 and self.open == "(":
            inner += ","
        if self.bare:
            return inner
        return f"{self.open}{inner}{self.close}"


@dataclass(frozen=True)
class Arguments(Brackets):
    """The arguments of a call, or the parameters of a function: a single one has no comma behind it."""

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


Item = str | Brackets


def values(items: Iterable[Item], bare: bool = False) -> Brackets:
    """A tuple."""
    return Brackets("(", tuple(items), ")", bare)


def tuple_of(items: Sequence[Item]) -> Item:
    """Several items without brackets, or the only one by itself."""
    return values(items, bare=True) if len(items) != 1 else items[0]


def listed(items: Iterable[Item]) -> Brackets:
    """A list."""
    return Brackets("[", tuple(items), "]")


def arguments(items: Iterable[Item]) -> Brackets:
    """What stands behind the name of a function."""
    return Arguments("(", tuple(items), ")")


def fits(parts: Sequence[Item], level: int) -> bool:
    """Whether a statement fits on a line."""
    return len(" " * STEP * level + "".join(map(str, parts))) <= WIDTH


def written(parts: Sequence[Item], level: int, comment: str = "") -> list[str]:
    """The lines of one statement, `level` steps to the right. The comment stands behind it if it fits there, else
    above."""
    indent = " " * STEP * level
    line = indent + "".join(map(str, parts))
    if comment and len(f"{line}  # {comment}") <= WIDTH:
        return [f"{line}  # {comment}"]
    above = remark(comment, level) if comment else []
    if len(line) <= WIDTH:
        return [*above, line]
    groups = [number for number, part in enumerate(parts) if isinstance(part, Brackets) and part.items]
    for broken in (groups[-1:], groups[:1], groups):
        lines = _broken(parts, set(broken), level)
        if all(len(one) <= WIDTH for one in lines):
            break
    if line.startswith("from "):  # imports are sorted by a linter that wants them a line each
        return [*above, *lines]
    filled = _broken(parts, set(broken), level, fill=True)
    filled[-1] += _SKIP
    if (len(filled) < len(lines) and all(len(one) <= WIDTH for one in filled)) or max(map(len, lines)) > WIDTH:
        return [*above, *filled]
    return [*above, *lines]


def _broken(parts: Sequence[Item], broken: set[int], level: int, fill: bool = False) -> list[str]:
    """The statement with some groups one item a line; with `fill`, many names on as few lines as hold them."""
    indent, done = " " * STEP * level, list[str]()
    current = indent
    for number, part in enumerate(parts):
        if number not in broken or isinstance(part, str):
            current += str(part)
            continue
        done.append(current + part.open)
        inner = " " * STEP * (level + 1) + ", ".join(map(str, part.items))
        if isinstance(part, Arguments) and len(inner) <= WIDTH:
            done.append(inner)
        elif fill and _many(part):
            done += _full(inner, level + 1)
        else:
            for item in part.items:
                done += _item(item, level + 1, fill)
        current = indent + part.close
    return [*done, current]


def _many(group: Brackets) -> bool:
    """Whether a group is of many names, or of one text that is too long for a line."""
    texts = [item for item in group.items if isinstance(item, str) and '"' not in item]
    return len(texts) == len(group.items) and (len(texts) >= MANY or max(map(len, texts)) > WIDTH - STEP)


def _full(inner: str, level: int) -> list[str]:
    """Lines that are as full as they may be, each of which ends behind a comma."""
    indent, lines = " " * STEP * level, list[str]()
    for text in f"{inner.strip()},".split(", "):
        word = text if text.endswith(",") else f"{text},"
        if lines and len(lines[-1]) + 1 + len(word) <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines


def _item(item: Item, level: int, fill: bool) -> list[str]:
    if not isinstance(item, Brackets) or len(" " * STEP * level + f"{item},") <= WIDTH or not item.items:
        return [" " * STEP * level + f"{item},"]
    lines = _broken([item], {0}, level, fill)
    return [*lines[:-1], f"{lines[-1]},"]


def remark(text: str, level: int) -> list[str]:
    """A comment on lines of its own."""
    indent = " " * STEP * level
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip
