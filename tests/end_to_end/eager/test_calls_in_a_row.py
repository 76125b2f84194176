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


class Same(Model):
    """Asks which of its arguments are one, and one with what the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH, WIDTH))
        self.settings = {"scale": 2.0}

    def forward(self, a: Any, b: Any) -> Tensor:
        if isinstance(a, list):
            a.append(len(b))
            return self.up(a[0] + b[0]) * (2.0 if a is b else 3.0) * len(b)
        if isinstance(b, dict):
            b["calls"] = 1
            return self.up(a) * len(self.settings) * (2.0 if b is self.settings else 3.0)
        self.mean.mul_(0.5)
        return self.up(a + b) * (2.0 if a is b else 3.0) * (5.0 if a is self.mean else 7.0)


def one_tensor_twice(model: Any, step: int) -> Any:
    x = torch.randn(WIDTH, WIDTH, requires_grad=True)
    model(x, x if step == 1 else x.detach().clone()).sum().backward()
    return x.grad


def the_models_own_tensor(model: Any, step: int) -> Any:
    x = torch.randn(WIDTH, WIDTH)
    return model(model.mean if step == 1 else x, x), model.mean


def one_list_twice(model: Any, step: int) -> Any:
    a = [torch.randn(WIDTH, WIDTH)]
    b = a if step == 1 else list(a)
    return model(a, b), a, b


def the_models_own_dict(model: Any, step: int) -> Any:
    settings = model.settings if step == 1 else dict(model.settings)
    return model(torch.randn(WIDTH, WIDTH), settings), dict(settings), dict(model.settings)


class Returns(Model):
    """Returns containers that it keeps, that exist, that were given, or that come twice."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.grown = ["a"], list[Tensor]()

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["h"] = self.up(batch["x"])
        self.last = {"h": batch["h"]}
        self.batch = batch
        self.grown.append(batch["h"].detach().sum())
        return {
            "batch": batch, "inner": batch["inner"], "last": self.last, "again": (self.last,), "names": self.names,
            "grown": self.grown, "new": [batch["h"] * 2],
        }  # fmt: skip


def containers_that_others_hold(model: Any, step: int) -> Any:
    batch = {"x": torch.randn(WIDTH, WIDTH), "inner": [1]}
    out = model(batch)
    same = (
        out["batch"] is batch, out["inner"] is batch["inner"], out["last"] is model.last, out["again"][0] is model.last,
        out["names"] is model.names, out["grown"] is model.grown, model.batch is batch,
    )  # fmt: skip
    out["names"].append(step)
    return {**out, "same": same, "kept": model.last}


CALLS: list[tuple[type[Model], Callable[[Any, int], Any]]] = [
    (Counts, backward_from_a_further_output), (Same, one_tensor_twice), (Same, the_models_own_tensor),
    (Same, one_list_twice), (Same, the_models_own_dict), (Returns, containers_that_others_hold),
]  # fmt: skip


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
