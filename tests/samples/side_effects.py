"""What forward may do beside computing its result: one class a kind, to be combined at random."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.asked_values import KINDS as ASKED
from samples.kept_values import (
    WIDTH,
    Appends,
    AverageOfNumbers,
    CountsCalls,
    CountsInConfig,
    EveryOther,
    Features,
    FreshEveryTime,
    Kind,
    Last,
    Queue,
    ReadsQueue,
    ReadsWhatItAppends,
    Set,
    Table,
    TableGiven,
    TableInPlace,
    WarmsUp,
)


class Buffer(Kind):
    def set_up(self, model: Any) -> None:
        model.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.mean = model.mean * 0.5 + h.detach().mean(0) * 0.5
        return h - model.mean


class MakesBuffer(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        if not hasattr(model, "offset"):
            model.register_buffer("offset", torch.arange(float(h.shape[1])))
        return h + model.offset


class Teacher(Kind):
    def set_up(self, model: Any) -> None:
        model.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            for old, new in zip(model.teacher.parameters(), model.first.parameters(), strict=True):
                old.data = old.data * 0.9 + new.data * 0.1
            target = model.teacher(h)
        return h * target


class TeacherInPlace(Teacher):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        for old, new in zip(model.teacher.parameters(), model.first.parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)
        return h + model.teacher(h.detach())


class ClampsWeights(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            model.first.bias.clamp_(-0.05, 0.05)
        return h + model.first.bias


class Hook(Kind):
    """A hook on a part of the model, which keeps or counts."""

    def set_up(self, model: Any) -> None:
        model.store = store = {"calls": 0}

        def hook(part: nn.Module, args: Any, output: Tensor) -> None:
            store["value"] = output
            store["calls"] += 1

        model.first.register_forward_hook(hook)

    def seen(self, model: Any) -> Any:
        return model.store


class HookThatPops(Kind):
    def set_up(self, model: Any) -> None:
        kept: list[Tensor] = []
        model.first.register_forward_hook(lambda part, args, output: kept.append(output))
        self.kept = model.popped = kept

    def seen(self, model: Any) -> Any:
        return model.popped.pop()


class HookThatChanges(Kind):
    def set_up(self, model: Any) -> None:
        model.first.register_forward_pre_hook(lambda part, args: (args[0] * 2,))
        model.first.register_forward_hook(lambda part, args, output: output + args[0])


class HookAddedLater(Kind):
    def between(self, model: Any, step: int) -> None:
        if step == 1:
            model.first.register_forward_hook(lambda part, args, output: output * 3)


class HookOfTensor(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 0.5)
        return h * 2


class KeyOfInput(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        batch["hidden"] = h.detach()
        batch["calls"].append(len(batch))
        return h


class InputInPlace(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        batch["mask"].mul_(2)
        return h + batch["mask"]


class CachedMask(Kind):
    def set_up(self, model: Any) -> None:
        @functools.lru_cache
        def mask(size: int) -> Tensor:
            return torch.tril(torch.ones(size, size))

        model.mask = mask

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h @ model.mask(h.shape[1])


class Memo(Kind):
    def set_up(self, model: Any) -> None:
        memo: dict[int, Tensor] = {}

        def positions(size: int) -> Tensor:
            if size not in memo:
                memo[size] = torch.arange(float(size))
            return memo[size]

        model.positions = positions

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h + model.positions(h.shape[1])


COUNT, SCALE = 0, 1.0


def _globals(h: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return h * SCALE


class Globals(Kind):
    def set_up(self, model: Any) -> None:
        model.space = {"COUNT": 0, "SCALE": 1.0}
        model.with_globals = types.FunctionType(_globals.__code__, model.space)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return model.with_globals(h)

    def between(self, model: Any, step: int) -> None:
        model.space["SCALE"] = 1.0 + step // 2

    def seen(self, model: Any) -> Any:
        return {name: model.space[name] for name in ("COUNT", "SCALE")}


class Closure(Kind):
    def set_up(self, model: Any) -> None:
        count = 0

        def counted(h: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return h + count if count > 2 else h

        model.counted, model.count = counted, lambda: count

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return model.counted(h)

    def seen(self, model: Any) -> Any:
        return model.count()


class NumPyScalar(Kind):
    def set_up(self, model: Any) -> None:
        model.weight_of = np.float64(0.5)
        model.weights = np.ones(WIDTH)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * float(model.weight_of) * float(model.weights.sum())

    def between(self, model: Any, step: int) -> None:
        model.weight_of = np.float64(0.5 + step // 2)
        model.weights[0] = step


class Seeded(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return h + torch.randn(h.shape)


class SetsSeed(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        noise = torch.rand(WIDTH)
        torch.manual_seed(3)
        return h + noise + torch.rand_like(h)


class Drops(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return F.dropout(h, 0.5, model.training)


class Switches(Kind):
    def set_up(self, model: Any) -> None:
        model.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return model.norm(h)

    def between(self, model: Any, step: int) -> None:
        model.train(step != 1)


class Freezes(Kind):
    def between(self, model: Any, step: int) -> None:
        model.first.weight.requires_grad_(step != 1)


class LeavesItAlone(Kind):
    """What the user keeps in the model, and forward never names."""

    def between(self, model: Any, step: int) -> None:
        model.unrelated = step


class ForwardOfObject(Kind):
    def set_up(self, model: Any) -> None:
        before = model.forward
        model.forward = lambda batch: {**before(batch), "twice": True}


class PythonRandom(Kind):
    """To be refused: `np.random` is drawn from at every call."""

    refused = True

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * float(np.random.rand())


class KeptByIterator(Kind):
    """To be refused: nobody can put a tensor into an iterator again."""

    refused = True

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.iterator = iter([h])
        return h


class MarksWeight(Kind):
    """To be refused: an attribute of a tensor is not set again."""

    refused = True

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.first.weight.calls = getattr(model.first.weight, "calls", 0) + 1
        return h


KINDS: tuple[type[Kind], ...] = (
    CountsCalls, WarmsUp, EveryOther, CountsInConfig, AverageOfNumbers, Appends, ReadsWhatItAppends, Queue, ReadsQueue,
    Features, Set, Last, FreshEveryTime, Table, TableInPlace, TableGiven, Buffer, MakesBuffer, Teacher, TeacherInPlace,
    ClampsWeights, Hook, HookThatPops, HookThatChanges, HookAddedLater, HookOfTensor, KeyOfInput, InputInPlace,
    CachedMask, Memo, Globals, Closure, NumPyScalar, Seeded, SetsSeed, Drops, Switches, Freezes, LeavesItAlone,
    ForwardOfObject, *ASKED,
)  # fmt: skip
REFUSED: tuple[type[Kind], ...] = (PythonRandom, KeptByIterator, MarksWeight)


class Model(nn.Module):
    """Two linear layers, and between them what the kinds do."""

    def __init__(self, kinds: list[Kind]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kinds = kinds
        for kind in kinds:
            kind.set_up(self)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        h = self.first(batch["x"])
        for kind in self.kinds:
            h = kind.forward(self, h, batch)
        return {"y": self.second(h), "x": batch["x"]}
