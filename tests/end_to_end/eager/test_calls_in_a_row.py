"""What three calls in a row give, with whatever happens between them: as one device gives it, identities included."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc import ShardcError, shard

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


class OfClass(Model):
    """Counts in its class, and calls what that has from its bases."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.__class__.scale = 1.0 + self.calls
        return super(self.__class__, self).__call__.__self__.up(x) * self.calls * self.__class__.scale


def counts_in_the_class(model: Any, step: int) -> Any:
    if not step:
        OfClass.calls = 0
    return model(torch.randn(WIDTH, WIDTH)), OfClass.calls, OfClass.scale, model.__class__ is OfClass


class Averages(Model):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


def averages_over_all_batches(model: Any, step: int) -> Any:
    model.train(step != 1)
    return model(torch.randn(6, WIDTH)), dict(model.state_dict())


class Padded(Model):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH)).eval()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(self.up(x), src_key_padding_mask=padding)


def padding_at_the_end_and_elsewhere(model: Any, step: int) -> Any:
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    padding[1, 0] = step == 1
    with torch.set_grad_enabled(step == 2):
        return model(torch.randn(2, 5, WIDTH), padding)


CALLS: list[tuple[type[Model], Callable[[Any, int], Any]]] = [
    (Counts, backward_from_a_further_output), (Same, one_tensor_twice), (Same, the_models_own_tensor),
    (Same, one_list_twice), (Same, the_models_own_dict), (Returns, containers_that_others_hold),
    (OfClass, counts_in_the_class), (Averages, averages_over_all_batches), (Padded, padding_at_the_end_and_elsewhere),
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


class TwoResults(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        return h, h.square().sum()


def test_a_gradient_that_stays_within_the_program_is_refused() -> None:
    h, _ = shard(TwoResults(), mesh="a=2")(torch.randn(6, WIDTH))
    with pytest.raises(ShardcError, match="retain_grad on a tensor from which"):
        h.retain_grad()


class Leaf(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * (2.0 if x.is_leaf else 3.0)


def test_an_input_whose_leaf_is_asked_for_is_refused() -> None:
    model = shard(Leaf(), mesh="a=2")
    model(torch.randn(6, WIDTH))
    with pytest.raises(ShardcError, match=r"test_calls_in_a_row\.py:\d+ whether input:0 is a leaf"):
        model(torch.randn(6, WIDTH, requires_grad=True))


def test_a_method_of_tensors_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Calls(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).erfinv()

    model, method = shard(Calls(), mesh="a=2"), Tensor.erfinv
    model(torch.randn(6, WIDTH))
    monkeypatch.setattr(Tensor, "erfinv", lambda x: method(x) * 2)
    with pytest.raises(ShardcError, match=r"torch\.Tensor\.erfinv was replaced by .*lambda"):
        model(torch.randn(6, WIDTH))


class Swaps(Model):
    """Buffers that take each other's values, and one whose old value is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(WIDTH))
        self.register_buffer("two", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        old = self.one.clone()
        self.one.copy_(self.two)
        self.two.copy_(old + 1)
        return self.up(x), old


def test_what_is_returned_is_not_what_a_call_without_gradients_changes() -> None:
    single, model = Swaps(), shard(Swaps(), mesh="a=1")
    with torch.no_grad():
        for _ in range(3):
            expected, got = single(torch.ones(2, WIDTH))[1], model(torch.ones(2, WIDTH))[1]
            assert torch.equal(expected, got)
            assert torch.equal(single.one, model.one) and torch.equal(single.two, model.two)


def test_a_class_that_notes_its_subclasses_is_not_told() -> None:
    noted: dict[str, type] = {}

    class Noting(Model):
        def __init_subclass__(cls) -> None:
            noted[cls.__name__] = cls

    class Noted(Noting):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * (2.0 if noted["Noted"] is type(self) else 3.0)

    model, x = Noted(), torch.randn(6, WIDTH)
    expected = model(x)
    torch.testing.assert_close(shard(model, mesh="a=2")(x), expected)
    assert noted["Noted"] is Noted and isinstance(model, Noted)


class Clock(threading.Thread):
    """A thread that writes to itself while the model runs, as the monitor of a progress bar does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.beats, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.beats += 1


class Reports(Model):
    def forward(self, x: Tensor) -> Tensor:
        if not CLOCK.is_alive():
            print("no clock since", CLOCK.beats)
        return self.up(x)


CLOCK = Clock()


def test_what_a_thread_writes_to_itself_is_not_a_change_of_the_call() -> None:
    model = Reports()
    sharded = shard(mesh="dp=2")(model)
    CLOCK.start()
    try:
        sharded(torch.randn(6, WIDTH)).sum().backward()
        first = sharded.compiled
        sharded(torch.randn(6, WIDTH)).sum().backward()
        assert sharded.compiled is first
    finally:
        CLOCK.stopped.set()
