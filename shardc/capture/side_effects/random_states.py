"""Random numbers of a forward that sets a seed, or draws from other generators than torch's.

    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise = torch.randn(4, 8)       # the same at every call: a constant of the program

What is drawn after a seed was set in forward is drawn while the model is traced. Draws from Python's and NumPy's
generators differ from call to call, and are refused.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardc.capture.side_effects.code import names
from shardc.capture.torch_patches.fake_tensors import untraced
from shardc.capture.user_frames import is_known, user_frame
from shardc.errors import CaptureError

_FILLED = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "log_normal_", "cauchy_"}
_MADE = {"rand", "randn", "randint", "randperm"}
_LIKE = {"rand_like", "randn_like", "randint_like"}
_OTHERS = {
    "multinomial",
    "bernoulli",
    "poisson",
    "binomial",
    "rrelu",
    "alpha_dropout",
    "feature_alpha_dropout",
    "normal",
}


class Seeds:
    """torch's default generator in one run of the model: whether it was seeded there, and what is drawn then."""

    def __init__(self) -> None:
        self.start = torch.get_rng_state()
        self._seed = torch.initial_seed()
        self._touched = False
        self._drawn = False

    @property
    def seeded(self) -> bool:
        """Whether the model has set the generator's state to another than it had. Draws of a trace do not move it."""
        if not self._touched and torch.initial_seed() == self._seed:
            return False
        with untraced():
            return not torch.equal(torch.get_rng_state(), self.start)

    def draw(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function of torch that draws after a seed was set, as a constant; None for all others.

        Raises CaptureError where what is drawn depends on values.
        """
        name = getattr(function, "__name__", "")
        random_function = name in _FILLED | _MADE | _LIKE | _OTHERS or function is F.dropout
        if not random_function or kwargs.get("generator") is not None:
            return None
        if not self.seeded:
            self._drawn = True
            return None
        if name in _MADE:
            with untraced():
                return function(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Tensor) and name in _FILLED | _LIKE and not _tensors(args[1:], kwargs):
            shape, dtype = tuple(first.shape), first.dtype
            with untraced():
                made = function(torch.empty(shape, dtype=dtype), *args[1:], **kwargs)
            return made if name in _LIKE else first.copy_(made)
        if function is F.dropout and isinstance(first, Tensor):
            shape, dtype = tuple(first.shape), first.dtype
            with untraced():
                mask = function(torch.ones(shape, dtype=dtype), *args[1:], **{**kwargs, "inplace": False})
            return first * mask
        if function is torch.normal and set(kwargs) <= {"mean", "std"}:
            mean, std = (*args, *kwargs.values())
            shape = torch.broadcast_shapes(*(part.shape for part in (mean, std) if isinstance(part, Tensor)))
            with untraced():
                noise = torch.empty(shape, dtype=next(p.dtype for p in (mean, std) if isinstance(p, Tensor))).normal_()
            return noise * std + mean
        raise CaptureError(
            f"forward sets the seed of torch's generator and then calls {name}, whose draws depend on values: "
            "set the seed outside of the model"
        )

    @contextmanager
    def watched(self) -> Generator[None]:
        """Notice that the state is set, and refuse one that it had before draws: they would not be repeated."""
        set_state, on_cuda = torch.set_rng_state, torch.cuda.manual_seed_all

        def seeded(seed: int) -> None:
            self._touched = True
            on_cuda(seed)

        def guarded(state: Tensor) -> None:
            self._touched = True
            with untraced():
                again = torch.equal(state, self.start)
            if self._drawn and not self.seeded and again:
                raise CaptureError(
                    "forward draws random numbers and then sets the generator back to where it was, to draw them "
                    "again: keep the numbers that were drawn, and use them twice"
                )
            set_state(state)

        with ExitStack() as stack:
            for module in (torch, torch.random):
                stack.enter_context(patch.object(module, "set_rng_state", guarded))
            # torch.manual_seed, by whatever name it is called, passes the seed on to this function
            stack.enter_context(patch.object(torch.cuda, "manual_seed_all", seeded))
            yield


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))


class Generators:
    """The random generators of Python and NumPy, those of the libraries and the `given` ones, by name."""

    def __init__(self, given: Sequence[tuple[str, Any]]) -> None:
        self._all = [("Python's random module", _PYTHON), ("NumPy", _NUMPY), *given]
        self._states = [_state(generator) for _, generator in self._all]

    def moved(self) -> str:
        """The name of one from which was drawn; "" if there is none."""
        for (name, generator), state in zip(self._all, self._states, strict=True):
            if _differ(_state(generator), state):
                return name
        return ""

    def restore(self) -> None:
        """Set all back to where they were."""
        for (_, generator), state in zip(self._all, self._states, strict=True):
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif isinstance(generator, np.random.RandomState):
                generator.set_state(state)
            else:
                generator.setstate(state)

    def refuse_draws(self, run: Callable[[], Any]) -> None:
        """Raise CaptureError if forward has moved one. `run` calls the model again, to find the line.

        Other threads draw as well, while the model is traced; of them nothing is seen in this thread's profile."""
        name = self.moved()
        if not name:
            return
        line = _calling_line(run, {id(generator) for _, generator in self._all})
        if not line and threading.active_count() == 1:
            line = ", ".join(sorted(self._moving_lines(run)))
        elif not line:  # only NumPy's are left; what stands still in one run was moved by another thread
            lines = set.intersection(*(self._moving_lines(run, _DRAWING) for _ in range(3)))
            if not lines:
                return
            line = ", ".join(sorted(lines))
        raise CaptureError(
            f"forward draws from {name}{f' at {line}' if line else ''}: a compiled program would use the same numbers "
            "at every call. Draw with torch.rand in the model, or draw outside and pass the numbers in as a tensor"
        )

    def _moving_lines(self, run: Callable[[], Any], named: Collection[str] = ()) -> set[str]:
        """The lines of user code at which one moves, in a run by this thread; all are set back then. Only code counts
        that uses one of the names, if some are `named`."""
        self.restore()
        moving, last, before = set[str](), "", self._states

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last, before
            if is_known(frame.f_code.co_filename) or frame.f_code.co_filename.startswith("<"):
                return None
            now = [_state(generator) for _, generator in self._all]
            if last and any(map(_differ, now, before)):
                moving.add(last)
            if named and names(frame.f_code).isdisjoint(named):
                last = ""
                return on_line
            before, last = now, f"{frame.f_code.co_filename}:{frame.f_lineno}"
            return on_line

        _observed(run, sys.settrace, sys.gettrace(), on_line)
        now = [_state(generator) for _, generator in self._all]
        if last and any(map(_differ, now, before)):
            moving.add(last)
        self.restore()
        return moving


_DRAWING = frozenset(name for name in (*dir(np.random.Generator), *dir(np.random.RandomState)) if name[0] != "_")
_PYTHON = random.getrandbits.__self__  # type: ignore[attr-defined]
_NUMPY = np.random.mtrand._rand  # type: ignore[attr-defined]  # the generator behind np.random.rand; it has no other name


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return not np.array_equal(one, other)
    if isinstance(one, dict):
        return any(_differ(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and len(one) < 10:
        return any(_differ(a, b) for a, b in zip(one, other, strict=True))
    return bool(one != other)


def _calling_line(run: Callable[[], Any], generators: Collection[int]) -> str:
    """The line of user code that calls one of the generators, given by identity, in a run by this thread; "" also for
    those of NumPy, whose calls Python does not tell."""
    culprit = ""

    def on_call(frame: FrameType, event: str, called: Any) -> None:
        nonlocal culprit
        if event == "c_call" and not culprit and id(getattr(called, "__self__", None)) in generators:
            user = user_frame(frame)
            culprit = "" if user is None else f"{user.f_code.co_filename}:{user.f_lineno}"

    _observed(run, sys.setprofile, sys.getprofile(), on_call)
    return culprit


def _observed(run: Callable[[], Any], install: Callable[[Any], None], before: Any, observer: Any) -> None:
    install(observer)
    try:
        run()
    except Exception:  # the model has run once: what counts is the line
        pass
    finally:
        install(before)
