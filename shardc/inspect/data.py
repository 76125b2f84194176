"""What commands show, as plain data for JSON: records by their fields, meshes by their axes, layouts as they print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from shardc.explain.plan import Plan
from shardc.explain.plan_file.as_json import as_json
from shardc.explain.summary import Summary
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.collective import Collective


def data(what: object) -> Any:
    """Plain data: dicts, lists, texts, numbers (None where they are not finite)."""
    match what:
        case None | bool() | int() | str():
            return what.value if isinstance(what, Enum) else what
        case float():
            return what if math.isfinite(what) else None
        case Plan():
            return {**as_json(what), "summary": data(what.summary)}
        case Mesh():
            return dict(what.sizes)
        case Layout():
            return str(what)
        case Collective():
            return what.name
        case Mapping():
            return {str(data(key)): data(value) for key, value in what.items()}  # type: ignore[misc]
        case list() | tuple() | set() | frozenset():
            return [data(one) for one in what]  # type: ignore[misc]
        case _ if is_dataclass(what):
            told = {one.name: data(getattr(what, one.name)) for one in fields(what)}
            return told | ({"rate": what.rate, "binds": what.binds} if isinstance(what, Summary) else {})
        case _:
            return str(what)
