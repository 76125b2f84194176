"""Exceptions that leave forward: those of the model's own are what they are on one device."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import shard
from shardc.errors import CaptureError, ShardcError


class TooLongError(ValueError):
    """With arguments and attributes of its own."""

    def __init__(self, length: int, most: int) -> None:
        super().__init__(f"{length} rows, at most {most}")
        self.length, self.most = length, most


class Checked(nn.Module):
    """What goes wrong is said by `mode`."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.up, self.mode, self.calls = nn.Linear(4, 4), mode, 0
        self.settings, self.seen = {"scale": 2.0}, list[Tensor]()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        h = self.up(x)
        self.seen.append(h.detach())
        torch.rand(2)
        self.fail(x)
        if x.shape[0] > 6:
            raise TooLongError(x.shape[0], 6)
        return h

    def fail(self, x: Tensor) -> None:
        match self.mode:
            case "raise":
                raise ValueError("mode is 'raise'")
            case "assert":
                raise AssertionError(x.shape)
            case "key":
                self.settings["tau"]
            case "attribute":
                self.nothing  # noqa: B018 - what is tested
            case "argument":
                self.fail()  # type: ignore[call-arg]
            case "stop":
                next(iter(()))
            case "not implemented":
                raise NotImplementedError
            case "chained":
                try:
                    int("text")
                except ValueError as error:
                    raise LookupError("no number") from error
            case "caught":
                with contextlib.suppress(KeyError):
                    self.settings["tau"]
            case "interrupt":
                raise KeyboardInterrupt
            case _:
                pass


X = torch.ones(3, 4)

OWN = ["raise", "assert", "key", "attribute", "argument", "stop", "not implemented", "chained", "interrupt"]


def kept(model: Any) -> tuple[Any, ...]:
    return model.calls, model.mode, len(model.seen), float(model.count), dict(model.settings), torch.get_rng_state()


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("mode", OWN)
def test_exceptions_of_the_model_are_its_own(mode: str) -> None:
    plain, model = Checked(mode), shard(Checked(mode), mesh="tp=2")
    theirs, before = raised(lambda: plain(X)), kept(model)
    ours = raised(lambda: model(X))
    assert type(ours) is type(theirs) and ours.args == theirs.args
    assert type(ours.__cause__) is type(theirs.__cause__)
    after = kept(model)
    assert after[:-1] == before[:-1] and torch.equal(after[-1], before[-1])
    frames = [frame.name for frame in traceback.extract_tb(ours.__traceback__)]
    assert frames[frames.index("forward") :][:2] == ["forward", "fail"]
    if mode != "interrupt":
        (note,) = ours.__notes__
        assert "test_exceptions.py:" in note and "put back" in note and "its tensors" not in note


def test_later_calls_raise_what_one_device_raises_and_others_go_on() -> None:
    model: Any = shard(Checked(), mesh="tp=2")
    plain = Checked()
    plain.load_state_dict(model.state_dict())
    for mode, rows, error in [
        ("", 3, None), ("raise", 3, ValueError), ("caught", 3, None), ("", 4, None), ("", 7, TooLongError),
        ("key", 4, KeyError), ("", 5, None), ("", 8, TooLongError),
    ]:  # fmt: skip
        plain.mode = model.mode = mode
        x = torch.randn(rows, 4)
        if error is None:
            torch.testing.assert_close(model(x), plain(x))
        else:
            before = kept(model)[:4]
            found = raised(lambda: model(x))  # noqa: B023 - called at once
            assert type(found) is error and kept(model)[:4] == before
            if isinstance(found, TooLongError):
                assert (found.length, found.most) == (rows, 6)
    assert model.calls == plain.calls == 4


@pytest.mark.parametrize("given", [lambda x: x, lambda x: [x.sum()], lambda x: f"of {x}"])
def test_the_note_tells_of_tensors_that_have_no_values(given: Callable[[Tensor], Any]) -> None:
    def forward(x: Tensor) -> Tensor:
        raise LookupError(given(x))

    (note,) = raised(lambda: shard(forward, mesh="tp=2")(X)).__notes__
    assert "its tensors are those of the trace, which have no values" in note


def test_compiling_ahead_raises_it_too() -> None:
    with pytest.raises(TooLongError):
        shardc.compile(Checked(), "tp=2", (torch.ones(9, 4),))


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        size: Any = x.shape[0]
        if not isinstance(size, int):
            raise TypeError("sizes are ints")
        return x * size


def test_what_is_raised_at_symbols_alone_is_raised_nowhere() -> None:
    model = shard(Sizes(), mesh="tp=2")
    for rows in (3, 4, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(model(x), x * rows)


def _caught_read(x: Tensor) -> Tensor:
    try:
        return x * x.sum().item()
    except RuntimeError:
        raise ValueError("no number") from None


def _shape(x: Tensor) -> Tensor:
    return x @ x


def _ours(x: Tensor) -> Tensor:
    try:
        x.retain_grad()
    except Exception as error:
        raise ValueError("not kept") from error
    return x * 2


@pytest.mark.parametrize(
    ("function", "also", "message"),
    [
        (_shape, RuntimeError, r"test_exceptions\.py:\d+: the model cannot be traced: RuntimeError: .*\n.*x @ x"),
        (_caught_read, Exception, "a value that is only known when it runs"),
        (_ours, ValueError, "not kept"),
    ],
)
def test_what_the_trace_does_not_take_is_a_shardc_error(
    function: Callable[[Tensor], Tensor], also: type[Exception], message: str
) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        shard(function, mesh="tp=2")(X)
    assert isinstance(caught.value, ShardcError) and isinstance(caught.value, also)
    assert (_shape is function) == isinstance(caught.value, RuntimeError)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise ValueError("no backward")


def test_what_backward_raises_does_not_leave_forward_as_its_own() -> None:
    with pytest.raises(CaptureError, match="no backward"):
        shard(lambda x: Backward.apply(x).sum(), mesh="tp=2")(X.clone().requires_grad_())
