"""`progress`: how fast a training step is, beside what the plan predicted.

step 20: 12.3 ms (predicted 10.1 ms), 83,200 tokens a second, MFU 3.2% (predicted 3.9%)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from shardc.errors import ShardcError
from shardc.explain.summary import Summary
from shardc.ir.printing import in_seconds

T = TypeVar("T")


@dataclass(frozen=True)
class StepSpeed:
    """How fast steps were up to `step`, as measured: `seconds` each. `planned` is what the plan predicts of one."""

    step: int
    seconds: float
    planned: Summary

    @property
    def rate(self) -> float:
        """Tokens or samples a second (`planned.unit` says which), of all devices together."""
        return self.planned.rows / self.seconds

    @property
    def mfu(self) -> float:
        """The model FLOPs utilisation: that of the plan, by how much longer a step takes."""
        return self.planned.mfu * self.planned.seconds / self.seconds

    def __str__(self) -> str:
        told = [f"step {self.step}: {in_seconds(self.seconds)} (predicted {in_seconds(self.planned.seconds)})"]
        if self.planned.rows:
            told.append(f"{self.rate:,.0f} {self.planned.unit} a second")
        if self.planned.flops:
            told.append(f"MFU {self.mfu:.1%} (predicted {self.planned.mfu:.1%})")
        return ", ".join(told)


def progress(
    items: Iterable[T], model: nn.Module, *, every: int = 10, show: Callable[[StepSpeed], None] | None = None
) -> Iterator[T]:
    """The items of a loader, one a step of a sharded model. Every so many steps, and at last, it shows how fast they
    were.

    Measured is the whole turn of the loop, with data and optimizer; the plan predicts forward and backward. The first
    step, which compiles, does not count. `show` gets a `StepSpeed`; without it, rank 0 prints it to stderr.

    Raises ShardcError for a model that is not sharded, and where `every` is no step.
    """
    if "_shardc" not in vars(model) or every < 1:
        raise ShardcError(
            "progress: name a sharded model, and every=1 or more: progress(loader, shard(model), every=10)"
        )
    return _timed(items, model, every, show or _print)


def _timed(items: Iterable[T], model: nn.Module, every: int, show: Callable[[StepSpeed], None]) -> Iterator[T]:
    since, counted, steps = 0.0, 0, 0

    def tell() -> None:
        nonlocal since, counted
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if counted:
            program: Any = model
            show(StepSpeed(steps, (now - since) / counted, program.plan.summary))
        since, counted = now, 0

    for item in items:
        if steps == 1 or counted == every:
            tell()
        yield item
        counted += 1 if steps else 0
        steps += 1
    tell()


def _print(speed: StepSpeed) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(speed, file=sys.stderr, flush=True)
