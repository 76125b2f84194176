"""Files that shardc keeps for later processes: found by a key, written in one step, and never trusted."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept: `$XDG_CACHE_HOME/shardc/KIND`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardc" / kind


MOST_BYTES = 256 * 2**20
"""What a folder may hold. Of a larger one the files that were used longest ago are deleted, to half of that."""


def used(path: Path) -> None:
    """A file was read: it is now the last that is deleted."""
    with suppress(OSError):
        os.utime(path)


def _shrink(folder: Path) -> None:
    """Delete what was used longest ago from a folder that holds too much."""
    files: list[tuple[float, int, Path]] = []
    for entry in os.scandir(folder):
        with suppress(OSError):  # another process may delete it, too
            files.append(((known := entry.stat()).st_mtime, known.st_size, Path(entry.path)))
    held = sum(size for _, size, _ in files)
    if held <= MOST_BYTES:
        return
    for _, size, path in sorted(files):
        if held <= MOST_BYTES / 2:
            return
        with suppress(OSError):
            path.unlink()
        held -= size


def keep_file(path: Path, text: str) -> None:
    """Write a file in one atomic step, so that no other process reads half of it, and see that its folder does not grow
    for ever. A full disk is not an error."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        _shrink(path.parent)
    except OSError:
        with suppress(OSError):
            part.unlink()
