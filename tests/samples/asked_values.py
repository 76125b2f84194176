"""What forward may ask that is no value of a tensor: one class a kind."""

from __future__ import annotations

import math
import operator
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from samples.kept_values import Kind


class AsksForParameters(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        weight = model.first.weight
        found = sum(isinstance(value, nn.Parameter) for value in (weight, h, *model.first.parameters()))
        return h * found * (2.0 if weight.is_leaf and weight.grad_fn is None else 3.0)


class AsksForGradients(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return h * (2.0 if model.first.weight.requires_grad else 3.0)


class AsksWhetherItCompiles(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * (2.0 if torch.compiler.is_compiling() else 3.0)


class ChecksValues(Kind):
    """Traced as the code asks for: with what depends on values left out."""

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        if not torch.compiler.is_compiling():
            assert bool((h == h).all())
        return h


class AttributeOfTensor(Kind):
    def set_up(self, model: Any) -> None:
        model.first.bias.scale = 2.0

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * model.first.bias.scale * getattr(model.second.bias, "factor", 1.0)

    def between(self, model: Any, step: int) -> None:
        model.first.bias.scale = 2.0 + step // 2
        if step:
            model.second.bias.factor = 3.0


class AttributeOfInput(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        h.called = "hidden"  # type: ignore[attr-defined]
        batch["named"] = h
        return h * getattr(batch["mask"], "scale", 1.0)

    def seen(self, model: Any) -> Any:
        return None


class ComputesNames(Kind):
    def set_up(self, model: Any) -> None:
        for index in range(2):
            setattr(model, f"head_{index}", 1.0)
        model.kinds_of_scale, model.other = ["oth" + "er"], 1.0

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        for index in range(2):
            h = h * getattr(model, f"head_{index}")
        return h * getattr(model, model.kinds_of_scale[0])

    def between(self, model: Any, step: int) -> None:
        model.head_1 = 1.0 + step
        setattr(model, "oth" + "er", 2.0 + step // 2)


class ReadsAllAttributes(Kind):
    def set_up(self, model: Any) -> None:
        model.settings = types.SimpleNamespace()

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        for name, value in vars(model.settings).items():
            h = (h + 0.01 * len(name)) * value
        return h

    def between(self, model: Any, step: int) -> None:
        setattr(model.settings, f"factor{'s' * (step % 3)}", 1.0 + 0.1 * step)


class OrderOfDict(Kind):
    def set_up(self, model: Any) -> None:
        model.order = {"a": 0.5, "b": 0.5}

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * (2.0 if next(iter(model.order)) == "a" else 3.0)

    def between(self, model: Any, step: int) -> None:
        if step == 1:
            model.order["a"] = model.order.pop("a")


class ManyObjects(Kind):
    def set_up(self, model: Any) -> None:
        model.many = [[1.0] for _ in range(1500)]

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * model.many[1400][0]

    def between(self, model: Any, step: int) -> None:
        model.many[1400][0] = 1.0 + step // 2


class ReplacedFunction(Kind):
    """The user puts a function of his own in the place of one of torch's, between two calls."""

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return torch.sinc(h)

    def between(self, model: Any, step: int) -> None:
        torch.sinc = _twice if step == 1 else _SINC


_SINC = torch.sinc


def _twice(h: Tensor) -> Tensor:
    return _SINC(h) * 2


class AsksForTypes(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        kinds = {Tensor: 1, nn.Parameter: 2, nn.Linear: 3, dict: 4}
        found = [kinds[type(value)] for value in (h, model.first.weight, model.first, batch)]
        named = type(model).__name__ == "Model" and isinstance(Tensor, type) and type(model) is model.__class__
        return h * (sum(found) * 0.1) if named else h


class CallsByName(Kind):
    def set_up(self, model: Any) -> None:
        model.inner = types.SimpleNamespace(scale=1.0)
        model.get = operator.attrgetter("inner.scale")

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * model.get(model) * globals()["FACTOR"] * eval("model.inner.scale + 1")

    def between(self, model: Any, step: int) -> None:
        model.inner.scale = 1.0 + step // 2
        globals()["FACTOR"] = 1.0 + step


class AppearsLater(Kind):
    def set_up(self, model: Any) -> None:
        model.choices = types.SimpleNamespace()

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * getattr(model.choices, "bonus", 1.0) * (2.0 if hasattr(model, "extra") else 1.0)

    def between(self, model: Any, step: int) -> None:
        if step == 1:
            model.choices.bonus = 0.5
        if step == 2:
            model.extra, model.choices = True, types.SimpleNamespace()


class MinusZero(Kind):
    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        return h * math.copysign(1.0, model.signed)

    def between(self, model: Any, step: int) -> None:
        model.signed = 0.0 if step % 2 else -0.0


class MovesToTheEnd(Kind):
    def set_up(self, model: Any) -> None:
        model.recent = OrderedDict(a=1.0, b=0.5)

    def forward(self, model: Any, h: Tensor, batch: dict[str, Any]) -> Tensor:
        model.recent.move_to_end(next(iter(model.recent)))
        return h * next(iter(model.recent.values()))

    def seen(self, model: Any) -> Any:
        return list(model.recent)


KINDS: tuple[type[Kind], ...] = (
    AsksForParameters, AsksForGradients, AsksWhetherItCompiles, ChecksValues, AttributeOfTensor, AttributeOfInput,
    ComputesNames, ReadsAllAttributes, OrderOfDict, ManyObjects, ReplacedFunction, AsksForTypes, CallsByName,
    AppearsLater, MinusZero, MovesToTheEnd,
)  # fmt: skip
