"""Attributes that code names by what it computes: `getattr(self, f"head_{i}")`, `getattr(self, self.kind)`.

A name may be put together from a fixed piece, or be a string that stands somewhere. So attributes with such a piece,
and attributes that some string names, count as named. Code that goes through all attributes at once names all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from shardc.capture.side_effects.code import parts_of
from shardc.capture.side_effects.holders import Attributes, Holder, Items, Slots


class ComputedNames:
    """What is known of the names that code computes."""

    def __init__(self) -> None:
        self.looks_up = False
        """Whether some code looks up attributes by names which it computes."""
        self.all_at_once = False
        """Whether some code goes through the attributes of objects."""
        self.pieces: set[str] = set()

    def named(self, holders: Iterable[Holder]) -> Iterator[str]:
        """The attributes of objects that such code may name; marks the objects of which all attributes are read."""
        if not self.looks_up:
            return
        contents = [(holder, holder.get()) for holder in holders]
        strings = {text for _, held in contents for value in held.values() for text in _texts(value)}
        strings.update(key for holder, held in contents if type(holder) is Items for key in held if type(key) is str)
        for holder, held in contents:
            if isinstance(holder, (Attributes, Slots)):
                whole = self.all_at_once and not isinstance(holder.owner, nn.Module)
                if whole and isinstance(holder, Attributes):
                    holder.whole = True
                for name in held:
                    if whole or name in strings or any(piece in name for piece in self.pieces):
                        yield name


def _texts(value: Any) -> Iterable[str]:
    if type(value) is str:
        return parts_of(value)
    if isinstance(value, tuple):
        return [text for item in value for text in _texts(item)]
    return ()
