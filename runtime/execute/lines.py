"""The lines of generated source in tracebacks, for as long as its code may run."""

from __future__ import annotations

import linecache
import weakref
from collections import Counter
from typing import Any


class Lines:
    """Who holds this has `source` shown as the text of the file `name`. Once nobody does, linecache forgets it: a
    process that compiles again and again would keep every source."""

    def __init__(self, name: str, source: str) -> None:
        # Without a modification time linecache never reads the file again.
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        _HOLDERS[name] += 1
        weakref.finalize(self, _forget, name).atexit = False

    def hold(self, space: dict[str, Any]) -> None:
        """Have the globals of generated code hold this: functions and tracebacks keep those alive."""
        space["__lines__"] = self


_HOLDERS = Counter[str]()


def _forget(name: str) -> None:
    _HOLDERS[name] -= 1
    if not _HOLDERS[name]:
        del _HOLDERS[name]
        linecache.cache.pop(name, None)
