"""The folders of checkpoints: what is complete, what is whole, and what is removed.

checkpoints/
  step-100/           complete: it has its name since everything in it was written
    manifest.json     sizes and checksums of the other files
    .metadata         where every tensor lies, as torch.distributed.checkpoint writes it
    __0_0.distcp      what rank 0 wrote
    plan.json         the plan by which the model ran
  step-120.partial/   being written, or left by a run that was killed
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
PARTIAL = ".partial"
_COMPLETE = re.compile(r"step-(\d+)(\.\d+)?")


class File(NamedTuple):
    """What a manifest says of one file."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> File:
        """Of a file as it is on disk."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(path.stat().st_size, digest)


class Manifest(NamedTuple):
    """What a checkpoint is made of. `number` counts the checkpoints of a folder in the order in which they were saved;
    `ranks` is how many saved it."""

    step: int
    number: int
    ranks: int
    files: Mapping[str, File]

    def write(self, folder: Path) -> None:
        """Write it, with a checksum of its own."""
        body = self._asdict() | {"files": {name: file._asdict() for name, file in sorted(self.files.items())}}
        sealed = {"sha256": _seal(body), **body}
        with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(sealed, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """ValueError where it cannot be read, or is not as it was written."""
        try:
            body: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            seal = body.pop("sha256")
            files = {str(name): File(**file) for name, file in body["files"].items()}
            if seal != _seal(body):
                raise ValueError(f"{MANIFEST} is not as it was written")
            if any(Path(name).name != name for name in files):
                raise ValueError(f"{MANIFEST} names a file that is not in the folder")
            return Manifest(body["step"], body["number"], body["ranks"], files)
        except OSError as error:
            raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{MANIFEST} is truncated or corrupt") from error

    def faults(self, folder: Path, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong with the files, each by its name. All sizes are looked at, and of the checksums those of one
        part of the files."""
        wrong: list[str] = []
        for index, (name, expected) in enumerate(sorted(self.files.items())):
            try:
                size = (folder / name).stat().st_size
                if size != expected.bytes:
                    wrong.append(f"{name} has {size} bytes, {expected.bytes} were written")
                elif index % parts == part and File.of(folder / name) != expected:
                    wrong.append(f"{name} is corrupt: its checksum is not the one that was written")
            except OSError as error:
                wrong.append(f"{name} cannot be read: {error.strerror}")
        return wrong


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a folder has the name of a complete checkpoint."""
    return bool(_COMPLETE.fullmatch(folder.name)) and folder.is_dir()


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the one saved last first. Those whose manifest cannot be read go first:
    nobody knows when they were saved."""

    def order(path: Path) -> tuple[float, int]:
        named = _COMPLETE.fullmatch(path.name)
        step = int(named[1]) if named else -1
        try:
            return Manifest.read(path).number, step
        except ValueError:
            return float("inf"), step

    found = [path for path in folder.iterdir() if is_complete(path)] if folder.is_dir() else []
    return sorted(found, key=order, reverse=True)


def begin(folder: Path, step: int) -> Path:
    """An empty folder beside the complete ones, into which a checkpoint is written. Rank 0 calls it. What earlier
    runs left unfinished is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(left)
    aside = partial(folder, step)
    aside.mkdir()
    return aside


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return folder / f"step-{step}{PARTIAL}"


def commit(aside: Path, step: int, ranks: int, written: Mapping[str, File], keep: int | None) -> Path:
    """Make the checkpoint in `aside` a complete one; its folder. Rank 0 calls it when all ranks have written.

    `written` are the files of the ranks, by name. An older checkpoint of the same step is removed after that, and so
    are all but the last `keep`. FileNotFoundError where a rank's file is not here.
    """
    missing = next((name for name in written if not (aside / name).exists()), None)
    if missing is not None:
        raise FileNotFoundError(
            f"{missing} was written by another rank, but rank 0 does not see it: the folder must be one that all ranks "
            "share"
        )
    others = {path.name: File.of(path) for path in aside.iterdir() if path.name not in written}
    folder = aside.parent
    earlier = complete(folder)
    numbers = [number for number in map(_number, earlier) if number is not None]
    Manifest(step, 1 + max(numbers, default=0), ranks, {**written, **others}).write(aside)
    _sync(aside)
    names = (f"step-{step}{'.' * bool(again)}{again or ''}" for again in range(len(earlier) + 1))
    place = next(folder / name for name in names if not (folder / name).exists())
    aside.rename(place)
    _sync(folder)
    replaced = [path for path in earlier if re.fullmatch(rf"step-{step}(\.\d+)?", path.name)]
    kept = [path for path in earlier if path not in replaced]
    for path in replaced + (kept[keep - 1 :] if keep is not None else []):
        shutil.rmtree(path, ignore_errors=True)
    return place


def _number(path: Path) -> int | None:
    try:
        return Manifest.read(path).number
    except ValueError:
        return None


def _sync(folder: Path) -> None:
    """A rename is on disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
