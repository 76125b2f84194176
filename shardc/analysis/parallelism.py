"""Parallelism: what the axes of a mesh do in a plan, in the words of the field. `axis_roles.py` reads it off a program.

dp: batch (data parallel); 8 of 9 weights stored split, gathered before use (fully sharded)
tp: columns, then rows of weights, heads of attention (tensor parallel), sequence between them (sequence parallel)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class AxisRole(StrEnum):
    """What an axis does, by the field's name for it."""

    DATA = "data"
    TENSOR = "tensor"
    SEQUENCE = "sequence"
    CONTEXT = "context"
    EXPERT = "expert"
    STORAGE = "fully sharded"


COLUMNS, ROWS = "columns of weights", "rows of weights"


@dataclass(frozen=True)
class Use:
    """One thing that an axis does: its role, `how` in a few words, and the paths of the `weights` it does it to."""

    role: AxisRole
    how: str
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class AxisUse:
    """What an axis of `ways` ranks does in most of a program. Of `weights` that are read, `gathered` are stored split
    over it, and gathered over it before they are used."""

    axis: str
    ways: int
    uses: tuple[Use, ...] = ()
    gathered: int = 0
    weights: int = 0

    @property
    def roles(self) -> tuple[AxisRole, ...]:
        """Its roles, each once."""
        return tuple(dict.fromkeys(use.role for use in self.uses))

    def __str__(self) -> str:
        told = [
            f"{_joined([use.how for use in self.uses if use.role is role])} ({role} parallel)"
            for role in self.roles if role is not AxisRole.STORAGE
        ]  # fmt: skip
        text = ", ".join(told)
        if self.gathered:
            some = (
                "all weights are" if self.gathered == self.weights else f"{self.gathered} of {self.weights} weights are"
            )
            text += f"{'; ' if text else ''}{some} stored split, and gathered before use (fully sharded)"
        return f"{self.axis}: {text or 'splits nothing that takes time'}"


def _joined(hows: list[str]) -> str:
    if COLUMNS in hows and ROWS in hows:
        hows = ["columns, then rows of weights", *(how for how in hows if how not in (COLUMNS, ROWS))]
    return ", ".join(hows)


@dataclass(frozen=True)
class Block:
    """What the axes do in `count` equal layers of a model (`layers.*`, `layers.0-30`), or in what is in none ("")."""

    name: str
    count: int
    uses: Mapping[str, tuple[Use, ...]]


@dataclass(frozen=True)
class Parallelism:
    """What the axes of a mesh do: each in most of the program, and in every block. `print` shows a line an axis."""

    axes: tuple[AxisUse, ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def lines(self) -> list[str]:
        """A line an axis."""
        return [str(axis) for axis in self.axes]

    def __str__(self) -> str:
        return "\n".join(self.lines)
