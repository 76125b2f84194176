"""Whether every value is the very object that it was: for all values at once, and for each dict that has changed.

same = SameObjects(values, watched, whole)
same.hold()                     # False: nobody has looked yet
same = SameObjects(values, watched, whole, same.versions)
same.hold()                     # True, and again True until somebody changes a dict, a list or a variable

After a run, nothing of a model's objects is in the processor's cache. To bring in one line of memory after the other
takes longer than all comparisons, so each object is met once, and all are brought in at once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain, compress
from typing import Any

from shardc.capture.guards.guarded_values import MetValues, WatchedDict, call
from shardc.capture.torch_patches.module_internals import dict_version


class SameObjects:
    """The values that were met in all holders, the plain dicts among these, and what holds nothing but certain keys, as
    pairs of a container and its keys. `versions` are those of the dicts when they were as they should be; None where
    nobody has looked."""

    def __init__(
        self,
        values: Sequence[MetValues],
        watched: Sequence[WatchedDict],
        whole: Sequence[tuple[Any, list[Any]]],
        versions: list[int] | None = None,
    ) -> None:
        self._watched, self._dicts = watched, [one.target for one in watched]
        self._good, self._sum = versions, None if versions is None else sum(versions)
        self.versions = versions
        """Of the dicts, when they were last looked at."""
        dicts = set(map(id, self._dicts))
        others = [one for one in values if id(one.target) not in dicts]
        single, several = ([one for one in others if one.single is bare] for bare in (True, False))
        self._single = [one.getter for one in single], [one.target for one in single]
        self._several = [one.getter for one in several], [one.target for one in several]
        self._expected = [item for one in (*single, *several) for item in one.expected]
        sized = [(target, keys) for target, keys in whole if keys and id(target) not in dicts]
        self._containers, self._lengths = [target for target, _ in sized], [len(keys) for _, keys in sized]
        self._ordered = [(target, keys) for target, keys in sized if len(keys) > 1 and isinstance(target, dict)]
        self.touched: list[Any] = [*self._dicts, *self._containers, *self._single[1], *self._several[1]]
        """All objects that `hold` looks at."""
        self.touched += self._expected

    def hold(self) -> bool:
        """Whether everything is the very object that it was. There are others that would do: this says False then."""
        # each change of any dict takes the next of one series of numbers, so no change leaves the sum as it was
        changes = sum(map(dict_version, self._dicts))
        if changes != self._sum:
            self.versions = list(map(dict_version, self._dicts))
            if self._good is None:
                return False
            changed = map(operator.ne, self.versions, self._good)
            if not all(one.holds() for one in compress(self._watched, changed)):
                return False
            self._good, self._sum = self.versions, sum(self.versions)
        if list(map(len, self._containers)) != self._lengths:
            return False
        if self._ordered and not all(list(target) == keys for target, keys in self._ordered):
            return False
        try:
            several = chain.from_iterable(map(call, *self._several))
            return all(map(operator.is_, chain(map(call, *self._single), several), self._expected))
        except (LookupError, AttributeError, ValueError):
            return False
