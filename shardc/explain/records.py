"""Records in files: dataclasses as JSON, and back by the types of their fields.

MeshSearch(hardware="h100", ranked=(Candidate(...), ...), ...)   <->   {"hardware": "h100", "ranked": [{...}, ...], ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from shardc.ir.cached_files import keep_file, used

Record = TypeVar("Record")


def keep_record(path: Path, record: object) -> None:
    """Keep a record for later processes."""
    keep_file(path, json.dumps(_plain(record)))


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """The record of a kind that is kept in a file; None if there is none, or it is damaged."""
    try:
        found = _made(kind, json.loads(path.read_text(encoding="utf-8")))
        used(path)
        return found
    except Exception:  # whatever is wrong with the file, its record is made again
        return None


def _plain(what: object) -> Any:
    if is_dataclass(what):
        return {one.name: _plain(getattr(what, one.name)) for one in fields(what)}
    if isinstance(what, Mapping):
        return {key: _plain(value) for key, value in what.items()}  # type: ignore[misc]
    if isinstance(what, (list, tuple)):
        return [_plain(one) for one in what]  # type: ignore[misc]
    return what


def _made(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{one.name: _made(hints[one.name], value[one.name]) for one in fields(hint)})  # type: ignore[operator]
    inner = get_args(hint)
    if NoneType in inner:
        return None if value is None else _made(next(one for one in inner if one is not NoneType), value)
    if get_origin(hint) is tuple:
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_made(one, part) for one, part in zip(each, value, strict=True))
    if get_origin(hint) is Mapping:
        return {key: _made(inner[1], part) for key, part in value.items()}
    return hint(value) if isinstance(hint, type) and issubclass(hint, (Enum, float)) else value
