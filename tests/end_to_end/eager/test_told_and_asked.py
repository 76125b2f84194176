"""What forward tells the user and asks of the world outside: in every call anew, as on one device."""

from __future__ import annotations

import datetime
import functools
import logging
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime as moment
from time import time as clock
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import ShardcError

LOGGER = logging.getLogger(__name__)
COUNT: ContextVar[int] = ContextVar("COUNT", default=0)


class Tells(nn.Module):
    """Tells something in each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        self.calls += 1
        print("call", self.calls, y.detach().sum() > 1000, {"rows": len(x)}, sep="|")
        print("aside", file=sys.stderr)
        sys.stdout.write("written\n")
        LOGGER.warning("call %d, %s", self.calls, y.detach().sum() > 1000)
        LOGGER.debug("not told: %s", y)
        warnings.warn("old", FutureWarning, stacklevel=1)
        once("only in the first call")
        return y


@functools.lru_cache
def once(text: str) -> None:
    print(text)


def test_messages_are_told_in_every_call(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    seen: list[Any] = []
    for model in (Tells(), shardc.shard(Tells(), mesh="a=2")):
        once.cache_clear()
        caplog.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(3):
                model(torch.ones(4, 8))
        own = [(str(one.message), one.filename, one.category) for one in warned if one.category is FutureWarning]
        logged = [one.getMessage() for one in caplog.records if one.name == LOGGER.name]
        seen.append((*capsys.readouterr(), logged, own))
    # what is told once is told while the model is traced, before the rest
    assert sorted(seen[0][0].split("\n")) == sorted(seen[1][0].split("\n")) and seen[0][1:] == seen[1][1:]
    assert seen[0][0].count("call|3") == 1 and len(seen[0][3]) == 3


class Overwrites(nn.Module):
    """Tells what it writes over afterwards, and an exception that it catches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        parts = [h, self.seen]
        print(h, parts, {"x": x})
        h.add_(1)
        self.seen += 1
        parts.clear()
        x.mul_(3)
        try:
            raise ValueError("caught")
        except ValueError:
            LOGGER.exception("of %s", h)
        return h


def test_what_is_told_is_what_stood_there_then(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    for model in (Overwrites(), shardc.shard(Overwrites(), mesh="a=2")):
        caplog.clear()
        for number in range(3):
            model(torch.full((2, 2), float(number)))
        records = [one for one in caplog.records if one.name == LOGGER.name]
        texts = [logging.Formatter().format(one).splitlines() for one in records]
        seen.append((capsys.readouterr().out, [(lines[0], lines[-1]) for lines in texts]))
    assert seen[0] == seen[1] and len(seen[0][1]) == 3


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(4, 8)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + self.table


def test_a_plain_tensor_of_the_model_that_is_the_input_in_some_calls() -> None:
    model = shardc.shard(Added(), mesh="a=2")
    for x in (model.table, torch.zeros(4, 8), model.table, torch.full((4, 8), 5.0)):
        torch.testing.assert_close(model(x), x * 2 + 1)


def test_nothing_is_told_by_a_call_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def forward(x: Tensor) -> Tensor:
        print("told")
        return x if x.sum() > 0 else -x

    with pytest.raises(ShardcError, match="branches on"):
        shardc.shard(forward, mesh="a=2")(torch.ones(4))
    assert capsys.readouterr().out == ""


def test_repeated_layers_tell_each(capsys: pytest.CaptureFixture[str]) -> None:
    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            print("layer")
            return super().forward(input)

    shardc.shard(nn.Sequential(*(Layer(8, 8) for _ in range(7))), mesh="a=2")(torch.ones(4, 8))
    assert capsys.readouterr().out == "layer\n" * 7


class Asks(nn.Module):
    """Asks for the time and for new names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.clock = nn.Linear(8, 8), time.monotonic
        self.begun = self.ended = self.last = 0.0
        self.times: list[Any] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.begun = time.perf_counter()
        y = self.up(x)
        self.last, self.day = clock() * 1000, moment.now().isoformat()
        COUNT.set(COUNT.get() + 1)
        self.times.append((self.clock(), uuid.uuid4().hex, datetime.datetime.now()))
        self.ended = time.perf_counter()
        return {"y": y, "at": time.time()}


def test_clocks_and_names_are_asked_in_every_call() -> None:
    model, programs = shardc.shard(Asks(), mesh="a=2"), list[Any]()
    for call in range(1, 4):
        before = time.time()
        out = model(torch.ones(4, 8))
        assert before <= out["at"] <= time.time() and before * 1000 <= model.last <= time.time() * 1000
        assert 0 < model.ended - model.begun < time.time() - before + 0.01
        assert moment.fromisoformat(model.day).timestamp() >= before
        assert len(set(model.times)) == len({one[1] for one in model.times}) == call
        assert [type(one) for one in model.times[-1]] == [float, str, moment] and call == COUNT.get()
        programs.append(model.compiled)
    assert programs[1] is programs[2]


class Shared(nn.Module):
    """Counts in a dict and in a list that the training loop writes to as well."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.info, self.counts = nn.Linear(8, 8), {"step": 0, "rate": 1.0}, [0, 0.5]

    def forward(self, x: Tensor) -> Tensor:
        self.info["calls"] = self.info.get("calls", 0) + 1
        self.counts[0] += 1
        return self.up(x) * self.info["rate"]


def test_a_dict_that_the_training_loop_shares_is_no_reason_to_compile_anew() -> None:
    model, programs = shardc.shard(Shared(), mesh="a=2"), list[Any]()
    with torch.no_grad():
        for step in range(6):
            model.info["step"], model.info["rate"] = step, 0.5 if step > 3 else 1.0
            x = torch.randn(4, 8)
            torch.testing.assert_close(model(x), model.up(x) * model.info["rate"])
            programs.append(model.compiled)
    assert (model.info, model.counts) == ({"step": 5, "rate": 0.5, "calls": 6}, [6, 0.5])
    assert programs[2] is programs[3] and programs[4] is programs[5] is not programs[3]


def measures(x: Tensor) -> Tensor:
    begun = time.time()
    y = x * 2
    return y * (time.time() - begun)


def waits(x: Tensor) -> Tensor:
    return x * 2 if time.monotonic() > 0 else x


def seeds(x: Tensor) -> Tensor:
    torch.manual_seed(int(clock()))
    return x + torch.rand(4)


SHAPES: list[int] = []


@functools.lru_cache
def noted(size: int) -> float:
    SHAPES.append(size)
    return 2.0


def notes_once(x: Tensor) -> Tensor:
    return x * noted(len(x))


@pytest.mark.parametrize("function", [measures, waits, seeds, notes_once])
def test_what_a_run_cannot_ask_is_refused_with_its_line(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ShardcError, match=r"test_told_and_asked\.py:\d+"):
        shardc.shard(function, mesh="a=2")(torch.ones(4))
    assert not SHAPES and not noted.cache_info().currsize


def test_a_buffer_that_is_the_input_and_is_written() -> None:
    class Writes(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.register_buffer("table", torch.ones(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            self.table.add_(1)
            return self.up(x) * (2 if x is self.table else 1)

    single = Writes()
    many = shardc.shard(Writes(), mesh="a=2")
    many.load_state_dict(single.state_dict())
    for given in (None, torch.ones(4, 8), None):
        losses = [model(model.table if given is None else given).square().mean() for model in (single, many)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(many.up.weight.grad, single.up.weight.grad)
