"""What everything reachable held before the model ran: what has changed since, and how to put it back.

snapshot = Snapshot(reachable)
model(x)                                # self.last = h; self.seen.append(h)
snapshot.changes()                      # [Change(model, before, now), Change(model.seen, [], [h])]
snapshot.restore()
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from shardc.capture.side_effects.holders import Contents, Holder


@dataclass(frozen=True)
class Change:
    """A holder whose contents differ from what they were."""

    holder: Holder
    before: Contents
    now: Contents

    @property
    def written(self) -> list[Any]:
        """The keys that have another value, or a value for the first time."""
        return [key for key, value in self.now.items() if key not in self.before or self.before[key] is not value]

    @property
    def deleted(self) -> list[Any]:
        """The keys that are gone."""
        return [key for key in self.before if key not in self.now]

    @property
    def differing(self) -> list[Any]:
        """The keys of all that differs; none where only the order does."""
        return [*self.written, *self.deleted]

    def only(self, keys: Collection[Any]) -> Change:
        """This change as far as it is of `keys`."""
        others = {key: value for key, value in self.before.items() if key not in keys}
        now = {key: value for key, value in self.now.items() if key in keys or key in others}
        return replace(self, now={key: others.get(key, value) for key, value in now.items()} | others)

    def names(self) -> Iterable[str]:
        """The places that changed, as the user would write them."""
        return [self.holder.name(key) for key in (*self.written, *self.deleted)]


class Snapshot:
    """The contents of `holders` at this moment."""

    def __init__(self, holders: Iterable[Holder]) -> None:
        self._before = [(holder, holder.get()) for holder in holders]

    def contents(self) -> Iterable[tuple[Holder, Contents]]:
        """The holders, and what they held."""
        return iter(self._before)

    def changes(self) -> list[Change]:
        """What differs now. Values are compared by identity: a value that was put back is no change."""
        changes: list[Change] = []
        for holder, before in self._before:
            now = holder.get()
            same = len(now) == len(before) and all(map(operator.is_, now.values(), before.values()))
            if not (same and list(now) == list(before)):
                changes.append(Change(holder, before, now))
        return changes

    def restore(self) -> list[Change]:
        """Put everything back; returns what had changed."""
        changes = self.changes()
        for change in changes:
            change.holder.put(change.before)
        return changes
