"""Processes that judge operators, so that one that hangs or crashes takes only itself along."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

import torch

from opinfo.database import entries
from opinfo.judge import Record, judge


def judged(names: Sequence[str], jobs: int, samples: int, timeout: float) -> Iterator[Record]:
    """The records of the operators called `names`, each as soon as it is there, from `jobs` processes.

    One that takes longer than `timeout` seconds, or that brings its process down, gets a record that says so.
    """
    own = threading.local()

    def one(name: str) -> Record:
        if not hasattr(own, "worker"):
            own.worker = Worker(samples, timeout)
        return own.worker.judge(name)

    with ThreadPoolExecutor(jobs) as threads:
        for future in as_completed([threads.submit(one, name) for name in names]):
            yield future.result()


class Worker:
    """A process that judges one operator after another; a new one takes its place when it hangs or dies."""

    def __init__(self, samples: int, timeout: float, device: str = "cpu") -> None:
        self.samples, self.timeout, self.device = samples, timeout, device
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, self.samples, self.device), daemon=True)
        self.process.start()
        there.close()
        self.here.recv()  # it is ready

    def judge(self, name: str) -> Record:
        """The record of the operator called `name`."""
        self.here.send(name)
        status = "timeout"
        try:
            if self.here.poll(self.timeout):
                return Record.read(self.here.recv())
        except EOFError:
            status = "crash"
        self.process.kill()
        self.process.join()
        self._start()
        return Record(name, status)

    def close(self) -> None:
        """End the process."""
        self.here.close()
        self.process.join()


def _serve(connection: Connection, samples: int, device: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20, 50)  # most objects are those of torch, and stay
    known = entries()
    connection.send("ready")
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        record = judge(known[name], samples, device)
        record.seconds = round(time.perf_counter() - start, 2)
        connection.send(record.plain())
