"""Files that the user named."""

from __future__ import annotations

from pathlib import Path

from shardc.errors import ShardcError


def write_file(path: str | Path, text: str) -> None:
    """Write a text as a file. Raises ShardcError where it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ShardcError(f"cannot write {path}: {error.strerror}") from error
