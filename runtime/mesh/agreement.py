"""Ranks agree before they compute, and tell what the others do where they cannot.

    agree(Note("the first call of MLP", {"inputs": "float32[4, 64]", "gradients": "on"}))

Every rank notes what it brings in the store of the process group. Rank 0 compares the notes and writes its verdict, so
that no rank waits in a collective for one that never comes. A thread of every rank tells, twice a second, what its
rank does: that is how a rank that waits knows that another is elsewhere.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.mesh.store import AskedStore, StoreSilent

BEAT = 0.5
"""Seconds between two words of a rank on what it does, and between two looks at what others do."""
STUCK = 1.0
"""Seconds in one collective of the user's after which a rank counts as not coming."""
SILENT = 10.0
"""Seconds without a word after which a rank counts as ended: native code may keep its thread waiting for a while."""


class Sums(NamedTuple):
    """What tells one tensor's values from another's: a checksum, and two sums for what may be off by rounding."""

    name: str
    checksum: int
    absolute: float
    weighted: float

    @staticmethod
    def of(name: str, tensor: Tensor) -> Sums:
        """Of a plain tensor; nothing is summed of what is not of floating point."""
        with torch.no_grad():
            flat = tensor.detach().reshape(-1).cpu()
            values: Any = flat.view(torch.uint8).numpy()
            checksum = zlib.crc32(values) if flat.numel() else 0
            if not flat.is_floating_point():
                return Sums(name, checksum, 0.0, 0.0)
            flat = flat.double()
            weights = torch.arange(flat.numel(), dtype=torch.float64).cos_()
            return Sums(name, checksum, float(flat.abs().sum()), float(flat @ weights))

    def near(self, other: Sums) -> bool:
        """Whether the values are the same, or differ by no more than rounding."""
        if self.checksum == other.checksum:
            return True
        off = max(abs(self.absolute - other.absolute), abs(self.weighted - other.weighted))
        return 0 < off <= 1e-5 * self.absolute

    def __str__(self) -> str:
        return f"{self.name} with checksum {self.checksum:08x}"


class Note(NamedTuple):
    """What a rank brings to an agreement: `facts` that must be equal on all ranks, and `sums` of its inputs, equal on
    the ranks that bring the same `part` of the batch. `advice` ends the message where they are not."""

    what: str
    facts: Mapping[str, str] = {}
    part: str = ""
    sums: Sequence[Sums] = ()
    advice: str = ""

    @staticmethod
    def parse(text: str) -> Note:
        """The inverse of `json.dumps`."""
        what, facts, part, sums, advice = json.loads(text)
        return Note(what, facts, part, [Sums(*one) for one in sums], advice)


class Board:
    """What the ranks of one process group tell each other. One a group; `board()` gives it."""

    def __init__(self, group: Any) -> None:
        default: Any = dist.distributed_c10d
        self.group = group
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
        self.patience: float = self.group._get_backend(device).options._timeout.total_seconds()
        store = default._get_default_store().clone()
        store.set_timeout(timedelta(seconds=2))
        # the store of torchrun outlives a group that is destroyed, and ranks that it starts again: what was told counts
        # no more
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = AskedStore(default.PrefixStore(f"shardc/{attempt}/{next(_numbers)}", store))
        self.agreed = 0
        self.calls = 0
        self.doing = ""
        self._watched = threading.get_ident()
        self._last: dict[int, tuple[str, float]] = {}
        self._beats = threading.Thread(target=self._beat, daemon=True, name="shardc tells what this rank does")
        self._ended = threading.Event()
        atexit.register(self._end)
        self._beats.start()

    def _beat(self) -> None:
        told, since = "", time.monotonic()
        while not self._ended.wait(BEAT):
            at, waits = place(sys._current_frames().get(self._watched))
            now = json.dumps([self.calls, self.doing, at, waits])
            if now != told:
                told, since = now, time.monotonic()
            if not self._tell(f"[{now}, {time.monotonic() - since:.1f}, {time.monotonic():.1f}]"):
                return

    def _tell(self, text: str) -> bool:
        """False where the store is gone, or this group."""
        try:
            self._store.set(f"doing/{self.rank}", text)
            return dist.is_initialized() and dist.group.WORLD is self.group
        except StoreSilent:  # it may be busy
            return True
        except Exception:
            return False

    def _end(self) -> None:
        self._ended.set()
        if dist.is_initialized():  # else the process that keeps the store may have ended, which is logged as a failure
            self._tell('"ended"')

    def agree(self, note: Note) -> None:
        """RankError on every rank unless all bring the same."""
        number, self.agreed = self.agreed, self.agreed + 1
        self._store.set(f"{number}/{self.rank}", json.dumps(note), self.patience)
        if self.rank == 0:
            verdict = self._verdict(number)
            self._store.set(f"{number}/verdict", verdict, self.patience)
        else:
            verdict = self._awaited(f"{number}/verdict", [0])
        if number > 1:  # every rank has read it, else it would not have come to the next
            self._store.delete(f"{number - 2}/{self.rank}", self.patience)
        if verdict:
            raise RankError(verdict, rank=self.rank)

    def _verdict(self, number: int) -> str:
        """What is wrong with what the ranks bring, as rank 0 sees it."""
        brought: dict[int, Note] = {}
        waiting = Waiting(self)
        while len(brought) < self.world:
            for rank in range(self.world):
                if rank not in brought and (texts := self._store.get([f"{number}/{rank}"], self.patience)) is not None:
                    brought[rank] = Note.parse(texts[0])
            missing = [rank for rank in range(self.world) if rank not in brought]
            wrong = _difference(brought) or (waiting.in_vain(missing) if missing else "")
            if wrong:
                return wrong
        return ""

    def _awaited(self, key: str, by: Sequence[int]) -> str:
        waiting = Waiting(self)
        while True:
            texts = self._store.get([key], self.patience)
            if texts is not None:
                return texts[0]
            wrong = waiting.in_vain(by)
            if wrong:
                raise RankError(wrong, rank=self.rank)

    def words(self, rank: int) -> tuple[int, str, bool, float] | None:
        """What a rank does: its calls so far, in words, whether it waits in a collective of the user's, and for how
        long. None before its first word."""
        texts = self._store.get([f"doing/{rank}"])
        if texts is None:
            return None
        if texts[0] == '"ended"':
            return 0, "has ended", False, -1.0
        (calls, doing, at, waits), seconds, stamp = json.loads(texts[0])
        last, seen = self._last.get(rank, ("", 0.0))
        if last != str(stamp):
            self._last[rank] = str(stamp), time.monotonic()
        elif time.monotonic() - seen > SILENT:
            return calls, f"said nothing for {SILENT:.0f} s; it was {doing or at}", False, -1.0
        return calls, doing or at, waits and not doing, seconds

    def stamp(self, rank: int) -> str:
        """What tells the last word of a rank from the one before."""
        return self._last.get(rank, ("", 0.0))[0]

    def others(self) -> str:
        """What every other rank was last known to do, a line each."""
        lines: list[str] = []
        for rank in range(self.world):
            words = self.words(rank) if rank != self.rank else None
            if words is not None:
                lines.append(f"rank {rank} {words[1]}")
        return "; ".join(lines[:8])


class Waiting:
    """One wait for other ranks: short sleeps at first, and a look at what they do twice a second."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._start = time.monotonic()
        self._looked = self._start
        self._stamps: dict[int, str] = {}

    def in_vain(self, ranks: Sequence[int]) -> str:
        """Sleep a little; why these ranks will not come, or nothing."""
        waited = time.monotonic() - self._start
        time.sleep(min(0.02, 0.0005 + waited / 10))
        if time.monotonic() - self._looked < BEAT:
            return ""
        self._looked = time.monotonic()
        for rank in ranks:
            try:
                words = self._board.words(rank)
            except StoreSilent:  # it may be busy
                words = None
            if words is None:
                continue
            calls, doing, waits, seconds = words
            gone = seconds < 0
            ahead = calls > self._board.calls and doing.startswith("runs ")
            # a word from before may be old: the rank may have come on its way since
            stuck = waits and seconds >= STUCK
            stuck = stuck and self._stamps.setdefault(rank, self._board.stamp(rank)) != self._board.stamp(rank)
            if gone or ahead or stuck:
                return (
                    f"rank {self._board.rank} {self._board.doing or 'waits'}, but rank {rank} {doing}. "
                    "Every rank must call the same model with the same kind of inputs, in the same order"
                )
        if waited > self._board.patience:
            return f"rank {ranks[0]} did not come within {self._board.patience:.0f} s: {self._board.others()}"
        return ""


def _difference(brought: Mapping[int, Note]) -> str:
    """Who differs in what: the first fact on which ranks differ."""
    ranks = sorted(brought)
    whats = {rank: brought[rank].what for rank in ranks}
    if len(set(whats.values())) > 1:
        return (
            f"the ranks are at different places: {_by_rank(whats)}. Every rank must make the same calls, in one order"
        )
    for name in dict.fromkeys(name for rank in ranks for name in brought[rank].facts):
        facts = {rank: brought[rank].facts.get(name, "absent") for rank in ranks}
        if len(set(facts.values())) > 1:
            advice = brought[ranks[0]].advice if name == "inputs" else ""
            return f"the ranks disagree at {whats[ranks[0]]}, in {name}: {_by_rank(facts)}{advice}"
    for part in dict.fromkeys(note.part for note in brought.values()):
        peers = [rank for rank in ranks if brought[rank].part == part]
        for at, sums in enumerate(brought[peers[0]].sums):
            if not all(sums.near(brought[rank].sums[at]) for rank in peers):
                values = {rank: str(brought[rank].sums[at]) for rank in peers}
                advice = brought[ranks[0]].advice
                return f"the ranks give different values at {whats[ranks[0]]}: {_by_rank(values)}{advice}"
    return ""


def _by_rank(values: Mapping[int, str]) -> str:
    by: dict[str, list[int]] = {}
    for rank, value in values.items():
        by.setdefault(value, []).append(rank)
    return ", ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {value[:300]}"
        for value, ranks in by.items()
    )


_HIDDEN = (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep,
)
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep


def place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is in the user's code, and whether it waits in one of torch's collectives."""
    collective = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("distributed_c10d.py") and not frame.f_code.co_name.startswith("_"):
            collective = frame.f_code.co_name
        library = name.startswith(_LIBRARY) and "site-packages" not in name
        if not (library or name.startswith(("<", *_HIDDEN))):
            at = f"{os.path.basename(name)}:{frame.f_lineno}"
            return (f"waits in {collective} at {at}" if collective else f"is at {at}"), bool(collective)
        frame = frame.f_back
    return "runs", False


_boards: list[Board] = []
_numbers = itertools.count()


def board() -> Board:
    """The board of the default process group."""
    group = dist.group.WORLD
    assert group is not None
    if not _boards or _boards[0].group is not group:
        _boards[:] = [Board(group)]
    return _boards[0]


def agree(note: Note) -> None:
    """RankError on every rank unless all ranks call it with the same. It tells who differs in what.

    A rank that is late is waited for, as long as the process group would wait. One that is known to be elsewhere (in
    another program, in a collective of the user's, or ended) is told of at once.
    """
    shared = board()
    if shared.world > 1:
        before, shared.doing = shared.doing, f"is at {note.what}"
        try:
            with meeting(note.what):
                shared.agree(note)
        finally:
            shared.doing = before


@contextmanager
def running(what: str) -> Generator[None]:
    """Note that this rank runs a program. It costs a counter and an assignment."""
    shared = board()
    shared.calls += 1
    shared.doing = f"runs {what}"
    try:
        yield
    finally:
        shared.doing = ""


def others() -> str:
    """What the other ranks were last known to do."""
    try:
        return _boards[0].others() if _boards else ""
    except Exception:  # the store is gone with the rank that kept it
        return ""


def with_others(error: RankError) -> RankError:
    """The error, with what the other ranks were last known to do."""
    text, known = str(error), others()
    if not known or _KNOWN in text:
        return error
    return RankError(f"{text}\n  {_KNOWN} {known}", rank=error.rank, axis=error.axis, line=error.line)


_KNOWN = "the other ranks, as far as is known:"


@contextmanager
def meeting(what: str) -> Generator[None]:
    """Where ranks meet outside of generated code. If torch.distributed fails in it, since a rank was killed, stopped or
    cut off, RankError says in what, where in the user's code, and what the others were last known to do."""
    shared = _boards[0] if _boards else None
    before = "" if shared is None else shared.doing
    try:
        if shared is not None:  # so that nobody takes it for a collective of the user's
            shared.doing = before or f"is in {what}"
        yield
    except (RuntimeError, StoreSilent) as error:
        lost = isinstance(error, (StoreSilent, dist.DistError)) or "gloo" in str(error)
        if isinstance(error, RankError) or not lost:
            raise
        rank = dist.get_rank() if dist.is_initialized() else None
        at = place(sys._getframe())[0]
        named = RankError(f"rank {rank} failed in {what}, and {at}\n  {type(error).__name__}: {error}", rank=rank)
        raise with_others(named) from error
    finally:
        if shared is not None:
            shared.doing = before
