"""Trials run in a child process, because they may crash.

Compiled kernels, also torch's, may assume that shapes fit each other and that indices are in range. A trial calls them
with parts of operands, for which nobody made them.
"""

from __future__ import annotations

import faulthandler
import gc
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
    """`function(item)` for every item; None for an item on which the child process dies or raises.

    Answers must be picklable. A child that does not answer for `patience` seconds is killed: it may hang on a lock that
    another thread held when it was forked.
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
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # forking with threads is safe enough: the child uses none, and may hang
        child = os.fork()
    if child:
        os.close(end)
        return child, pipe
    try:
        gc.disable()  # a collection writes to every object, and what is written to is copied
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # glibc writes to stderr when the heap is broken
        for item in items:
            try:
                answer = pickle.dumps(function(item))
            except Exception:  # an operator may raise anything
                answer = pickle.dumps(None)
            os.write(end, len(answer).to_bytes(4, "big") + answer)
    finally:
        os._exit(0)


def _collect(child: int, pipe: int, answers: list[Answer | None], start: int, patience: float) -> int:
    """Read answers until the child ends; their number."""
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
