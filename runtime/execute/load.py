"""From generated source to a module."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

from shardc.runtime.errors import GENERATED
from shardc.runtime.execute.lines import Lines


def load(path_or_source: str | Path) -> ModuleType:
    """The generated module in a file, or in a source text (any string with a line break).

    Tracebacks show the lines of the code that ran, even if the file has changed.
    """
    if isinstance(path_or_source, str) and "\n" in path_or_source:
        source = path_or_source
        name = f"<shardc-{hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    else:
        path = Path(path_or_source)
        source, name = path.read_text(), str(path)
    module = ModuleType(Path(name).stem if name.endswith(".py") else name.strip("<>").replace("-", "_"))
    module.__file__ = name
    setattr(module, GENERATED, True)
    Lines(name, source).hold(vars(module))
    exec(compile(source, name, "exec"), module.__dict__)
    return module
