"""Progress, on stderr and on the first of many ranks: a line for work of unknown length, a bar for a known number."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

T = TypeVar("T")


@contextmanager
def working(what: str, patience: float = 2.0) -> Generator[None]:
    """Show `what` and the seconds gone while the block runs, if it runs longer than `patience` seconds. Where stderr is
    no terminal, one plain line."""
    progress = _progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress.add_task(what, total=None)
    begun = threading.Timer(patience, _begin, (what, progress))
    begun.daemon = True
    begun.start()
    try:
        yield
    finally:
        begun.cancel()
        begun.join()  # it may be about to show the line
        progress.stop()


def _begin(what: str, progress: Progress) -> None:
    if progress.console.is_terminal:
        progress.start()
    elif _first_rank():
        print(f"{what} ...", file=sys.stderr, flush=True)


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that tells how many are done, on a terminal only. `total` is for items without a length."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with _progress(*columns) as progress:
        yield from progress.track(items, total, description=what)


def _progress(*columns: SpinnerColumn | TextColumn | BarColumn | MofNCompleteColumn | TimeElapsedColumn) -> Progress:
    """A display that goes when it is done. What is printed meanwhile stands above it, if it goes to a terminal too."""
    console = Console(stderr=True)
    shown = console.is_terminal and _first_rank()
    return Progress(*columns, console=console, transient=True, disable=not shown, redirect_stdout=sys.stdout.isatty())


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
