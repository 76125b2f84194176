"""The store of the process group, asked by a thread of its own: a store whose keeper is stopped never answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Answer = TypeVar("Answer")

PROMPT = 2.0
"""Seconds in which a store answers that is alive: what is only told, and need not be known, waits no longer."""


class StoreSilent(Exception):
    """The store did not answer in time."""


class AskedStore:
    """Texts under keys. Every method takes the seconds to wait for an answer, and raises StoreSilent after them."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[tuple[Any, Exception | None]]]]
        self._asked = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True, name="shardc asks the store").start()

    def _answer(self) -> None:
        while True:
            question, answers = self._asked.get()
            try:
                answers.put((question(), None))
            except Exception as error:
                answers.put((None, error))

    def _ask(self, question: Callable[[], Answer], seconds: float) -> Answer:
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        if not self._lock.acquire(timeout=seconds):  # somebody still waits
            raise StoreSilent(f"the store of the process group gave no answer within {seconds:.0f} s")
        try:
            self._asked.put((question, answers))
            answer, error = answers.get(timeout=seconds)
        except queue.Empty:
            raise StoreSilent(f"the store of the process group gave no answer within {seconds:.0f} s") from None
        finally:
            self._lock.release()
        if error is not None:
            raise error
        return answer

    def set(self, key: str, text: str, seconds: float = PROMPT) -> None:
        """Put a text under a key."""
        self._ask(lambda: self._store.set(key, text), seconds)

    def get(self, keys: Sequence[str], seconds: float = PROMPT) -> list[str] | None:
        """The texts of keys, None unless all are there."""

        def question() -> list[str] | None:
            there = self._store.check(list(keys))
            return [text.decode() for text in self._store.multi_get(list(keys))] if there else None

        return self._ask(question, seconds)

    def delete(self, key: str, seconds: float = PROMPT) -> None:
        """Remove a key."""
        self._ask(lambda: self._store.delete_key(key), seconds)
