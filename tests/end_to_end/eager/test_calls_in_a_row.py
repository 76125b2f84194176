"""What three calls in a row give, with whatever happens between them: as one device gives it, identities included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc import shard

WIDTH = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)


class Counts(Model):
    """Two outputs: backward starts from the second, for which a program is compiled when it does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.scale, self.seen = 0, 1.0, list[Tensor]()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.seen.append(self.up(batch["x"]).detach().mean())
        batch["calls"] = batch.get("calls", 0) + 1
        h = self.up(batch["x"]) * self.scale * (2.0 if self.calls == 1 else 3.0) * len(self.seen) * batch["calls"]
        return h.sum(), h + self.seen[0]


def backward_from_a_further_output(model: Any, step: int) -> Any:
    batch = {"x": torch.randn(6, WIDTH)}
    loss, h = model(batch)
    model.scale = 7.0 + step  # what is changed before backward counts in the next call
    model.zero_grad()
    h.square().sum().backward()
    return loss, h, model.up.weight.grad, model.calls, model.seen, batch


CALLS: list[tuple[type[Model], Callable[[Any, int], Any]]] = [(Counts, backward_from_a_further_output)]


def history(model: Any, call: Callable[[Any, int], Any]) -> list[Any]:
    seen: list[Any] = []
    for step in range(3):
        torch.manual_seed(step)
        values = call(model, step)
        seen.append(pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, values))
    return seen


@pytest.mark.parametrize("kind,call", CALLS, ids=lambda value: value.__name__)
def test_calls_in_a_row_equal_single_device(kind: type[Model], call: Callable[[Any, int], Any]) -> None:
    histories: list[Any] = []
    for mesh in (None, "a=2"):
        torch.manual_seed(0)
        model = kind()
        histories.append(history(shard(model, mesh=mesh) if mesh else model, call))
    (expected, spec), (got, got_spec) = map(pytree.tree_flatten, histories)
    assert spec == got_spec
    for one, other in zip(expected, got, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        else:
            assert one == other
