"""Classes and methods that are replaced between calls: a program is for those that the trace has met."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shardc import shard


class Scale:
    def factor(self) -> float:
        return 2.0

    @property
    def shift(self) -> float:
        return 1.0


class Other(Scale):
    def factor(self) -> float:
        return 3.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Linear(4, 4), Scale()

    def activated(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(self.up(x)) * self.scale.factor() + self.scale.shift


def test_methods_and_classes_that_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    single = Scaled()
    many = shard(copy.deepcopy(single), mesh="a=2")
    changes: list[Callable[[Scaled], None]] = [
        lambda model: None,
        lambda model: setattr(model.scale, "__class__", Other),
        lambda model: monkeypatch.setattr(Other, "factor", lambda self: 5.0),
        lambda model: monkeypatch.setattr(Scale, "shift", property(lambda self: 7.0)),
        lambda model: monkeypatch.setattr(Scaled, "activated", lambda self, x: x.tanh()),
        lambda model: setattr(model.scale, "__class__", Scale),
    ]
    x = torch.randn(3, 4)
    for change in changes:
        for model in (single, many):
            change(model)
        torch.testing.assert_close(many(x), single(x))
