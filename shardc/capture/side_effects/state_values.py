"""Values of the model's own small tensors that code asks for: they are known when a call begins, and guarded.

    if not self.started:                # a buffer of one element, False in this trace
        self.mean.copy_(x.mean(0))
        self.started.fill_(True)        # the next call finds True, and has a program of its own
    if self.steps < 1000:               # True in this trace, for all numbers of steps below

What is computed of such tensors alone is known as well, and the guard is about what code has asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from shardc.capture.side_effects.holders import Location
from shardc.capture.torch_patches.fake_tensors import untraced
from shardc.capture.torch_patches.module_internals import version
from shardc.capture.torch_patches.symbols import is_symbolic, number_of
from shardc.errors import ShardcError

MOST = 16
"""Elements of a tensor whose values may be asked for: every call compares them."""
LONGEST = 64
"""Functions that make a value that may be asked for: every call computes it."""

_ASKING = {
    "item", "tolist", "is_nonzero", "equal", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "__format__", "__repr__",
}  # fmt: skip
_COMPUTING = {
    "all", "any", "sum", "min", "max", "add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_not", "neg", "abs",
    "clamp", "clone", "detach", "squeeze", "unsqueeze", "view", "reshape", "flatten", "select", "unbind", "to", "long",
    "int", "bool", "float", "cpu", "isnan", "isinf", "minimum", "maximum",
    "__getitem__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__", "__sub__",
    "__rsub__", "__mul__", "__rmul__", "__truediv__", "__floordiv__", "__mod__", "__neg__", "__abs__", "__invert__",
    "__and__", "__or__",
}  # fmt: skip
_WRITING = {
    "add_",
    "sub_",
    "mul_",
    "div_",
    "fill_",
    "zero_",
    "copy_",
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
}

_CAPTURED: dict[int, Tensor] = {}
"""Values that tensors had when a program was captured, by their identity: see `as_captured`."""


@dataclass(frozen=True, eq=False)
class _Value:
    """What is known of a tensor: the value that stood in a place when the call began, or what a function makes of
    others, of which it holds no tensor of the trace."""

    place: Location | None = None
    function: Callable[..., Any] | None = None
    operands: Any = ()
    index: int | None = None
    writes: bool = False

    @property
    def length(self) -> int:
        """How many functions make it."""
        return 0 if self.place else 1 + sum(one.length for one in self._values())

    def _values(self) -> list[_Value]:
        return [one for one in pytree.tree_leaves(self.operands) if isinstance(one, _Value)]

    def places(self) -> list[Location]:
        """Where the values come from."""
        if self.place is not None:
            return [self.place]
        return [place for one in self._values() for place in one.places()]

    def of_this_call(self) -> _Value:
        """The same, where the sizes of inputs are those of this call, to which that fixes the trace."""
        if self.place is not None:
            return self
        return replace(self, operands=pytree.tree_map(_of_this_call, self.operands))

    def now(self, held: Mapping[Location, Tensor]) -> Any:
        """The value, where these values stand in the places."""
        if self.place is not None:
            return held[self.place]
        assert self.function is not None
        args, kwargs = pytree.tree_map(lambda one: one.now(held) if isinstance(one, _Value) else one, self.operands)
        if self.writes:
            args = (args[0].clone(), *args[1:])
        made = self.function(*args, **kwargs)
        return args[0] if self.writes else made if self.index is None else made[self.index]


@dataclass(frozen=True)
class FoundValue:
    """What code has found when it asked for a value. `held` is what stood in the places then, `answer` the text of what
    was found: texts tell 0.0 from -0.0, and nan is nan."""

    value: _Value
    held: Mapping[Location, Tensor]
    answer: str

    def broken(self) -> str:
        """Why it would find something else now; "" if it would not."""
        held = {place: _standing(place) for place in self.held}
        if any(value is None for value in held.values()):
            return f"{next(iter(held))} has no values any more, with which forward takes another branch"
        with torch.no_grad():
            now = self.value.now(held)  # type: ignore[arg-type]
        if repr(now) == self.answer:
            return ""
        return f"{next(iter(held))} is {next(iter(held.values()))}, with which forward takes another branch"


@contextmanager
def as_captured(conditions: Iterable[FoundValue]) -> Generator[None]:
    """In here, tensors have the values for which a program was captured, whatever has been written since."""
    before = dict(_CAPTURED)
    _CAPTURED.update({id(place.get()): value for one in conditions for place, value in one.held.items()})
    try:
        yield
    finally:
        _CAPTURED.clear()
        _CAPTURED.update(before)


class StateValues:
    """The tensors of one run of the model whose values are known. `asked` is called where code asks for one."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self._asked = asked
        self._known: dict[int, tuple[Tensor, int, _Value]] = {}
        """Tensors of the trace by identity, each with its version, which tells whether it was written since."""
        self._held: dict[Location, Tensor] = {}
        self.found: list[FoundValue] = []
        """What code has found."""

    def begin(self, tensors: Iterable[tuple[Tensor, Tensor, Location | None]]) -> None:
        """A run begins with these tensors of the trace, each with the model's and the place where that stands, None
        where its values are not known."""
        self.end()
        self.found = []
        for traced, users, place in tensors:
            if place is not None and users.numel() <= MOST and not users.requires_grad:
                with untraced():
                    value = _values(users)
                    copied = None if value is None else value.clone()
                if copied is not None:
                    self._held[place] = copied
                    self._known[id(traced)] = traced, version(traced), _Value(place)

    def end(self) -> None:
        """Let go of the tensors."""
        self._known, self._held = {}, {}

    def answer(self, function: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What a function that asks for values finds, as (value,); () where only a run knows."""
        known = self._operands((args, kwargs)) if name in _ASKING and self._known else None
        if known is None:
            return ()
        self._asked()
        value = _Value(None, function, known).of_this_call()
        held = {place: self._held[place] for place in value.places()}
        with untraced():
            answer = value.now(held)
        self.found.append(FoundValue(value, held, repr(answer)))
        return (answer,)

    def note(self, function: Callable[..., Any], name: str, operands: Any, result: Any) -> None:
        """A function was called with `operands`, or is about to be if it writes: it is known what it makes if those
        are."""
        known = self._operands(operands) if self._known and name in _COMPUTING else None
        if known is None:
            return
        many = isinstance(result, (tuple, list))
        for index, made in enumerate(result if many else [result]):
            if isinstance(made, Tensor) and made.numel() <= MOST and id(made) not in self._known:
                value = _Value(None, function, known, index if many else None)
                self._known[id(made)] = made, version(made), value

    def writes(self, function: Callable[..., Any], name: str, operands: Any) -> Callable[[], None]:
        """A function is about to write: what to call when it has."""
        known = self._operands(operands) if self._known and name in _WRITING else None
        if known is None:
            return _nothing
        target, value = operands[0][0], _Value(None, function, known, writes=True)

        def written() -> None:
            self._known[id(target)] = target, version(target), value

        return written

    def _operands(self, operands: Any) -> Any:
        """The operands with what is known of the tensors among them; None where one is not known, or there is none."""
        found = 0

        def known(leaf: Any) -> Any:
            nonlocal found
            if not isinstance(leaf, Tensor):
                return leaf
            tensor, at, value = self._known.get(id(leaf), (None, -1, None))
            if tensor is None or version(tensor) != at:
                raise _UnknownOperand
            found += 1
            return value

        try:
            made = pytree.tree_map(known, operands)
        except _UnknownOperand:
            return None
        return made if found and _Value(operands=made).length <= LONGEST else None


class _UnknownOperand(Exception):
    """An operand is not known."""


def _nothing() -> None: ...


def _of_this_call(operand: Any) -> Any:
    if isinstance(operand, _Value):
        return operand.of_this_call()
    if isinstance(operand, slice):
        return slice(*map(_of_this_call, (operand.start, operand.stop, operand.step)))
    return number_of(operand) if is_symbolic(operand) else operand


def _standing(place: Location) -> Tensor | None:
    try:
        return _values(place.get())
    except ShardcError:
        return None


def _values(tensor: Any) -> Tensor | None:
    """The values of a tensor on this rank; None where it has none, or a rank has only a part of them."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    if id(tensor) in _CAPTURED:
        return _CAPTURED[id(tensor)]
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach() if all(one.is_replicate() for one in tensor.placements) else None
    return tensor.detach()
