"""Generated modules for many sizes: one source, compiled once and run for the sizes of every call.

SIZES = {'batch': 4}              for_sizes(source)({'batch': 6})    the module, with 6 in this line
batch = SIZES['batch']
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType

from shardc.runtime.errors import GENERATED, RankError
from shardc.runtime.execute.lines import Lines


def for_sizes(source: str) -> Callable[[Mapping[str, int]], ModuleType]:
    """A function that makes the generated module for sizes, by name. Its lines are those of the source in tracebacks.

    Raises RankError where the source has no line SIZES.
    """
    without, found = re.subn(r"^SIZES = .*$", "", source, count=1, flags=re.MULTILINE)
    if not found:
        raise RankError("the source has no line SIZES: it is for one set of sizes; use shardc.runtime.load")
    title = f"shardc-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    name = f"<{title}>"
    lines = Lines(name, source)
    code = compile(without, name, "exec")

    def module(sizes: Mapping[str, int]) -> ModuleType:
        made = ModuleType(title.replace("-", "_"))
        made.__file__ = name
        vars(made).update({GENERATED: True, "SIZES": dict(sizes)})
        lines.hold(vars(made))
        exec(code, vars(made))
        return made

    return module
