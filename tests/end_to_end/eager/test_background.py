"""What the loop around a model and other threads change, and forward does not read: no reason to compile again, and no
effect of the call."""

from __future__ import annotations

import ctypes
import multiprocessing
import random
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardc import shard
from shardc.errors import CaptureError


class Trained(nn.Module):
    """Counts for its training loop, in attributes that only its constructor names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.step, self.history = nn.Linear(6, 6), 0, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("seen once in each place", stacklevel=1)
        return self.layer(x)


class Renewed(Trained):
    """Makes another of its kind, whose constructor runs in forward."""

    start = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.factor = self.start

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * type(self)().factor


@pytest.mark.filterwarnings("ignore:seen once")
def test_what_the_loop_counts_is_no_reason_to_compile_again() -> None:
    model: Any = shard(Trained(), mesh="a=2")
    compiled = set[int]()
    for step in range(4):
        model(torch.ones(2, 6))
        model.step, model.history = step, [*model.history, 0.5]
        compiled.add(id(model.compiled))
    assert len(compiled) == 1 and model.step == 3 and len(model.history) == 4


def test_what_a_constructor_reads_counts_where_forward_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shard(Renewed(), mesh="a=2"), torch.ones(2, 6)
    before = model(x)
    monkeypatch.setattr(Renewed, "start", 2.0)
    torch.testing.assert_close(model(x), 2 * before)


def drawing(stop: threading.Event) -> None:
    while not stop.is_set():
        random.random(), np.random.rand()
        time.sleep(1e-4)


def test_other_threads_may_draw() -> None:
    class Draws(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * float(np.random.rand())

    stop = threading.Event()
    thread = threading.Thread(target=drawing, args=(stop,), daemon=True)
    thread.start()
    try:
        shard(nn.Linear(6, 6), mesh="a=2")(torch.ones(2, 6))
        with pytest.raises(CaptureError, match=r"draws from .* at .*test_background.py:\d+"):
            shard(Draws(6, 6), mesh="a=2")(torch.ones(2, 6))
    finally:
        stop.set()
        thread.join()


event, shared, number = threading.Event(), multiprocessing.Value("i", 0), ctypes.c_int(0)
READ: dict[str, tuple[Callable[[], Any], Callable[[], object]]] = {
    "event": (event.is_set, event.set),
    "shared": (lambda: shared.value, lambda: setattr(shared, "value", 1)),
    "ctypes": (lambda: number.value, lambda: setattr(number, "value", 1)),
}


@pytest.mark.parametrize("name", READ)
def test_what_forward_reads_of_other_threads_counts(name: str) -> None:
    read, change = READ[name]

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if read() else 3 * x

    model, x = shard(Reads(), mesh="a=2"), torch.ones(2, 6)
    assert model(x)[0, 0] == 3
    change()
    assert model(x)[0, 0] == 2
