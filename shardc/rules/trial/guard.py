"""Trials that may crash: compiled kernels, torch's own too, believe that shapes fit each other and that integers are
indices in range, and parts of a call are calls that nobody foresaw. They run in a child of this process: it may die."""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import select
import signal
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def survivors(function: Callable[[Item], Answer], items: Sequence[Item], patience: float = 60.0) -> list[Answer | None]:
    """`function` of every item, an answer that can be pickled; None for an item on which the process dies or raises.

    After `patience` seconds without an answer the child is taken to hang: a lock may have been held when it was forked.
    """
    answers: list[Answer | None] = [None] * len(items)
    start = 0
    while start < len(items):
        child, pipe = _child(function, items[start:])
        start += _collect(child, pipe, answers, start, patience) + 1
    return answers


def _child(function: Callable[[Item], Answer], items: Sequence[Item]) -> tuple[int, int]:
    """A child that works through the items and writes its answers to the pipe."""
    pipe, end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no threads, and may hang
        child = os.fork()
    if child:
        os.close(end)
        return child, pipe
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the last words of a broken heap
        for item in items:
            try:
                answer = pickle.dumps(function(item))
            except Exception:  # whatever an operator raises
                answer = pickle.dumps(None)
            os.write(end, len(answer).to_bytes(4, "big") + answer)
    finally:
        os._exit(0)


def _collect(child: int, pipe: int, answers: list[Answer | None], start: int, patience: float) -> int:
    """Read answers until the child ends; how many there were."""
    count = 0
    with os.fdopen(pipe, "rb", buffering=0) as stream:
        while select.select([stream], [], [], patience)[0]:
            size = stream.read(4)
            if not size:
                break
            left, data = int.from_bytes(size, "big"), b""
            while len(data) < left:
                data += stream.read(left - len(data)) or b""
            answers[start + count] = pickle.loads(data)
            count += 1
        else:
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return count
