"""Whether every value is the very object that it was: for all values at once, and for each dict that has changed.

same = SameObjects(values, watched, whole, facts)
same.hold()                     # False: nobody has looked yet
same = SameObjects(values, watched, whole, facts, same.versions)
same.hold()                     # True, and again True until somebody changes a dict, a list or a variable

After a run, nothing of a model's objects is in the processor's cache. To bring in one line of memory after the other
takes longer than all comparisons, so each object is met once, and nearly all in one call (`ObjectNumbers`).
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain, compress
from types import CellType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shardc.capture.guards.guarded_values import MetValues, call
from shardc.capture.torch_patches.object_numbers import CONTENTS, LENGTH, VERSION, NumberKind, ObjectNumbers


class DictCondition(Protocol):
    """A dict, and whether its contents do. That is asked when its version says that it has changed."""

    target: dict[Any, Any]

    def holds(self) -> bool: ...


class SameObjects:
    """The values that were met in all holders, the dicts that are watched, what holds nothing but certain keys,
    as pairs of a container and its keys, and `facts` about further objects: what number of which kind each should have.
    `versions` are those of the first dicts when they were as they should be; None where nobody has looked. The dicts
    behind these do as they are."""

    def __init__(
        self,
        values: Sequence[MetValues],
        watched: Sequence[DictCondition],
        whole: Sequence[tuple[Any, Sequence[Any]]],
        facts: Sequence[tuple[Any, NumberKind, int]] = (),
        versions: NDArray[np.int64] | None = None,
    ) -> None:
        self._watched = watched
        dicts = {id(one.target) for one in watched}
        in_cells = [type(one.target) is CellType and not isinstance(one.expected[0], Tensor) for one in values]
        cells = list(compress(values, in_cells))
        others = [
            one for one, is_cell in zip(values, in_cells, strict=True) if not is_cell and id(one.target) not in dicts
        ]
        single, several = ([one for one in others if one.single is bare] for bare in (True, False))
        self._single = [one.getter for one in single], [one.target for one in single]
        self._several = [one.getter for one in several], [one.target for one in several]
        self._expected = [item for one in (*single, *several) for item in one.expected]
        self._touched = [*self._single[1], *self._several[1], *self._expected]
        self._ordered = [(target, keys) for target, keys in whole if len(keys) > 1 and isinstance(target, OrderedDict)]
        """Those whose order may change when nothing else does."""
        # a parameter that becomes a DTensor is replaced in lists, so cells with tensors are compared one by one
        self._alive = contents = tuple(one.expected[0] for one in cells)
        """What cells hold, so that no other object can have the identity of one."""
        self._numbers = ObjectNumbers(
            [
                *((value, kind) for value, kind, _ in facts),
                *((target, LENGTH) for target, _ in whole),
                *((one.target, CONTENTS) for one in cells),
                *((one.target, VERSION) for one in watched),
            ]
        )
        fixed = [*(number for _, _, number in facts), *(len(keys) for _, keys in whole), *map(id, contents)]
        self._fixed = np.array(fixed, np.int64)
        now = self._numbers.now()
        self._good: bytes | None = None
        """The numbers when all was as it should be."""
        if versions is not None:
            now[: len(fixed)] = self._fixed
            now[len(fixed) : len(fixed) + len(versions)] = versions
            self._good = now.tobytes()
        self._good_versions = now[len(fixed) :]
        self.versions = self._good_versions
        """Of the dicts, when they were last looked at."""

    def hold(self) -> bool:
        """Whether everything is the very object that it was. There are others that would do: this says False then."""
        now = self._numbers.now()
        if now.tobytes() != self._good and not self._changed_dicts_hold(now):
            return False
        if self._ordered and not all(list(target) == keys for target, keys in self._ordered):
            return False
        self._touched.copy()  # brings all into the processor's cache at once, not one after the other as they are met
        try:
            return all(map(operator.is_, self._others(), self._expected))
        except (LookupError, AttributeError, ValueError):
            return False

    def _others(self) -> Iterator[Any]:
        """What stands now where no number tells of it."""
        return chain(map(call, *self._single), chain.from_iterable(map(call, *self._several)))

    def _changed_dicts_hold(self, now: NDArray[np.int64]) -> bool:
        self.versions = now[len(self._fixed) :]
        if self._good is None or not np.array_equal(now[: len(self._fixed)], self._fixed):
            return False
        (changed,) = (self.versions != self._good_versions).nonzero()
        if not all(self._watched[index].holds() for index in changed.tolist()):
            return False
        self._good, self._good_versions = now.tobytes(), self.versions
        return True
