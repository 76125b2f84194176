"""A progress line for work of unknown length: it appears after two seconds, of many ranks on the first, and, on
a terminal, counts the time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def working(what: str, patience: float = 2.0) -> Generator[None]:
    """Show `what` and the seconds gone on stderr while the block runs, if it runs longer than `patience` seconds."""
    done = threading.Event()
    watcher = threading.Thread(target=_tick, args=(what, patience, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _tick(what: str, patience: float, done: threading.Event) -> None:
    if done.wait(patience) or os.environ.get("RANK", "0") != "0":
        return
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        return
    with tqdm(desc=what, bar_format="{desc} {bar:12} {elapsed}", total=20, leave=False, initial=0) as bar:
        while not done.wait(0.2):
            bar.n = (bar.n + 1) % 21
            bar.refresh()
