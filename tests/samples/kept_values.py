"""What forward may keep in attributes of the model from call to call: one class a kind."""

from __future__ import annotations

import types
from collections import deque
from typing import Any

import torch
from torch import Tensor

WIDTH = 4


class Kind:
    """One thing that forward does. `set_up` prepares a model, `forward` runs within its forward and gives the next
    value, `between` is what the user does before call number `step`, and `seen` what is compared afterwards."""

    def set_up(self, model: Any) -> None: ...

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h

    def between(self, model: Any, step: int) -> None: ...

    def seen(self, model: Any) -> Any:
        return None


class Attribute(Kind):
    """Keeps something in an attribute of the model, which is compared."""

    name = ""

    def seen(self, model: Any) -> Any:
        return getattr(model, self.name, "nothing")


class CountsCalls(Attribute):
    name = "calls"

    def set_up(self, model: Any) -> None:
        model.calls = 0

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.calls += 1
        return h


class WarmsUp(CountsCalls):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.calls += 1
        return h * 0.5 if model.calls < 3 else h


class EveryOther(CountsCalls):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.calls = model.calls + 1
        return torch.tanh(h) if model.calls % 2 else h


class CountsInConfig(Kind):
    def set_up(self, model: Any) -> None:
        model.config = types.SimpleNamespace(seen=0, scale=1.0)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.config.seen += h.shape[0]
        return h * model.config.scale

    def between(self, model: Any, step: int) -> None:
        model.config.scale = 1.0 + step // 2

    def seen(self, model: Any) -> Any:
        return vars(model.config)


class AverageOfNumbers(Attribute):
    name = "average"

    def set_up(self, model: Any) -> None:
        model.average = 1.0

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.average = 0.9 * model.average + 0.1 * h.shape[1]
        return h


class Appends(Attribute):
    name = "kept"

    def set_up(self, model: Any) -> None:
        model.kept = []

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.kept.append(h.detach().mean())
        return h


class ReadsWhatItAppends(Appends):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.kept.append(h.detach().mean())
        return h + model.kept[0] * len(model.kept)


class Queue(Attribute):
    name = "queue"

    def set_up(self, model: Any) -> None:
        model.queue = deque(maxlen=2)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.queue.append(h.detach())
        return h


class ReadsQueue(Queue):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.queue.append(h.detach())
        return h + torch.stack(list(model.queue)).mean(0)


class Features(Attribute):
    name = "features"

    def set_up(self, model: Any) -> None:
        model.features = {}

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.features["hidden"] = h
        model.features["shape"] = tuple(h.shape)
        return h


class Set(Attribute):
    name = "sizes"

    def set_up(self, model: Any) -> None:
        model.sizes = set()

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.sizes.add(h.shape[0])
        return h


class Last(Attribute):
    name = "last"

    def set_up(self, model: Any) -> None:
        model.last = None

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        before, model.last = model.last, h.detach()
        return h if before is None else h + before


class FreshEveryTime(Attribute):
    name = "losses"

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.losses = []
        model.losses.append(("mean", h.mean()))
        return h


class Table(Attribute):
    name = "table"

    def set_up(self, model: Any) -> None:
        model.table = torch.linspace(1, 2, WIDTH)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.table = model.table * 0.9
        return h * model.table


class TableInPlace(Attribute):
    name = "decaying"

    def set_up(self, model: Any) -> None:
        model.decaying = torch.linspace(1, 2, WIDTH)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.decaying.mul_(0.9)
        return h * model.decaying


class TableGiven(Attribute):
    name = "given"

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * model.given

    def between(self, model: Any, step: int) -> None:
        model.given = torch.full((WIDTH,), 1.0 + step)
