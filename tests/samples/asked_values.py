"""What forward may ask that is no value of a tensor: one class a kind."""

from __future__ import annotations

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


KINDS: tuple[type[Kind], ...] = (
    AsksForParameters, AsksForGradients, AsksWhetherItCompiles, ChecksValues, AttributeOfTensor, AttributeOfInput,
)  # fmt: skip
