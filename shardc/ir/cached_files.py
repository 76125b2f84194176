"""Files that shardc keeps for later processes: found by a key, written in one step, and never trusted."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept: `$XDG_CACHE_HOME/shardc/KIND`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardc" / kind


def keep_file(path: Path, text: str) -> None:
    """Write a file in one atomic step, so that no other process reads half of it. A full disk is not an error."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
