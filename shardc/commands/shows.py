"""What every command takes that prints: whether it prints text or JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shardc.errors import ShardcError
from shardc.inspect.console import show
from shardc.inspect.data import data
from shardc.ir.report import Report


@dataclass(frozen=True, kw_only=True)
class Shows:
    """A command that shows something."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON in place of text."""

    def show(self, text: Report | str, what: object) -> None:
        """Print `text`, or with `--json` what it tells of."""
        if self.json:
            print(json.dumps(data(what), indent=2, ensure_ascii=False))
        else:
            show(text)

    def say(self, line: str) -> None:
        """Print a line about what was done, which is no part of the JSON."""
        print(line, file=sys.stderr if self.json else sys.stdout)


def check_folder(path: Path) -> None:
    """Refuse a file that could not be written, before work is done for it."""
    if not path.absolute().parent.is_dir():
        raise ShardcError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise ShardcError(f"cannot write {path}: it is a folder; name a file")
