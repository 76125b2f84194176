"""Skip: a trace in which most of the repeated layers do not run.

The model's code runs in full, so its loops see every layer, index and length. Only the call of a layer is answered by
`shardc::skipped`, which leaves a hole in the graph, if the layer is known to do what its representative did.

    h = layer[2](h, mask)     # runs: the representative        %h2 = ...
    h = layer[3](h, mask)     # skipped                         %h3 = skipped(%h2, 0, False)
    h = layer[4](h, mask)     # skipped, the last               %h4 = skipped(%h2, 0, True)

That is known under these conditions; otherwise Unlike is raised, and the model is traced in full:

- the layers are equal (shardc.capture.repeated_layers);
- they are called in turn, from the same line, with the same values or with what the layer before returned;
- what their code may read around them is the same;
- the representative changed nothing but its results, and did not read its position.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc.capture.repeated_layers import PLAIN, Repeat, Unlike, described, form, snapshot, surroundings, tensors
from shardc.capture.torch_patches.ambient_modes import modes
from shardc.capture.torch_patches.module_internals import has_gradient_hooks, version
from shardc.capture.user_frames import source_line


@torch.library.custom_op("shardc::skipped", mutates_args=())
def skipped(x: Tensor, repeat: int, last: bool) -> Tensor:
    """Stands for what a layer that did not run would have returned. `x` is what its representative returned, `repeat`
    the number of the repeat, `last` says whether the layer is the last that is skipped."""
    return x.clone()


@skipped.register_fake
def _(x: Tensor, repeat: int, last: bool) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, int, bool], output: object) -> None:
    ctx.rest = inputs[1:]


def _skip_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.shardc.skipped(grad, *ctx.rest), None, None


skipped.register_autograd(_skip_back, setup_context=_remember)


@dataclass
class _Call:
    """One call of a layer: its arguments, its results, what else it may depend on (`around`), and the results of the
    layer before (`before`)."""

    arguments: list[Any]
    spec: pytree.TreeSpec
    around: Any
    before: list[Any]
    results: list[Any] = field(default_factory=list[Any])
    result_spec: pytree.TreeSpec | None = None

    def link(self, index: int) -> list[int]:
        """Which results of the layer before argument `index` is."""
        return [k for k, result in enumerate(self.before) if result is self.arguments[index]]

    def passed(self, result: Any) -> list[int]:
        """Which arguments a result is."""
        return [m for m, argument in enumerate(self.arguments) if argument is result]


class Watch:
    """Skips layers of `repeats` during one trace, and checks that they may be skipped. `broken` says why they may
    not."""

    def __init__(self, repeats: Sequence[Repeat]) -> None:
        self.repeats = repeats
        self.broken = ""
        self._calls: list[list[_Call]] = []
        self._tensors: dict[nn.Module, list[Tensor]] = {}  # of the layers, when the model begins to run

    def hidden(self) -> set[nn.Module]:
        """The parts of the layers that are skipped."""
        return {part for repeat in self.repeats for i in repeat.hole for part in repeat.layers[i].modules()}

    @contextmanager
    def installed(self) -> Generator[None]:
        """Run the model in here, any number of times. Raises Unlike where a layer may not be skipped."""
        self._calls = [[] for _ in self.repeats]
        self._tensors = {layer: _tensors_of(layer) for r in self.repeats for layer in r.layers[r.start - 1 : r.stop]}
        with ExitStack() as stack:
            for number, repeat in enumerate(self.repeats):
                for index in range(repeat.start - 1, repeat.stop):
                    attributes = vars(repeat.layers[index])
                    stack.callback(_put_back, attributes, "forward", attributes.get("forward", _ABSENT))
                    attributes["forward"] = self._stand_in(number, index, repeat.layers[index].forward)
            yield
        for repeat, calls in zip(self.repeats, self._calls, strict=True):
            if len(calls) != repeat.stop - repeat.start + 1:
                self.refuse("not every layer is called")
            for index in repeat.hole:
                results, layer = calls[index - repeat.start + 1].results, repeat.layers[index]
                self._check_held(layer)
                if any(
                    has_gradient_hooks(leaf) for leaf in (*results, *self._tensors[layer]) if isinstance(leaf, Tensor)
                ):
                    self.refuse("the gradient of a layer's result or parameter has a hook")
        self._calls, self._tensors = [], {}  # the tensors of a trace end with it

    def refuse(self, reason: str) -> NoReturn:
        """Note why layers may not be skipped, and raise Unlike: user code may catch the exception, but not the note."""
        self.broken = reason
        raise Unlike(reason)

    def _stand_in(self, number: int, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            return self._called(number, index, forward, args, kwargs)

        return called

    def _called(
        self, number: int, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        repeat, calls = self.repeats[number], self._calls[number]
        if index != repeat.start - 1 + len(calls):
            self.refuse("the layers are not called in turn")
        self._check_held(repeat.layers[index])
        arguments, spec = pytree.tree_flatten((args, kwargs))
        if not all(isinstance(leaf, (Tensor, *PLAIN, Enum)) for leaf in arguments):
            self.refuse("a layer is given an object that it may change")
        call = _Call(arguments, spec, (_switches(), self._identity(repeat, index)), calls[-1].results if calls else [])
        calls.append(call)
        if index >= repeat.start + repeat.period and index < repeat.hole.stop:
            behind = repeat.period * (1 + max(0, (index - repeat.hole.start) // repeat.period))
            self._compare(call, calls[-1 - behind])
        if index in repeat.hole:
            behind = repeat.period * (1 + (index - repeat.hole.start) // repeat.period)
            return self._skip(number, index == repeat.hole[-1], call, calls[-1 - behind])
        return self._run(repeat, index, call, functools.partial(forward, *args, **kwargs))

    def _holds(self, layer: nn.Module) -> bool:
        """Whether a layer still holds the tensors that it had when the model began to run."""
        before, now = self._tensors[layer], _tensors_of(layer)
        return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))

    def _check_held(self, layer: nn.Module) -> None:
        if not self._holds(layer):
            self.refuse("the model gives a layer other tensors than it had")

    def _identity(self, repeat: Repeat, index: int) -> Any:
        what, whole = described(repeat.layers[index], ours=True)
        positions = set(repeat.positions[index])
        numbers = tuple(getattr(part, name) for part, name in whole if (part, name) not in positions)
        return what, numbers, surroundings(repeat.layers[index])

    def _compare(self, call: _Call, other: _Call) -> None:
        """Refuse two calls whose results could differ."""
        if call.spec != other.spec or call.around != other.around:
            self.refuse("layers, their arguments or global switches differ")
        for index, (one, two) in enumerate(zip(call.arguments, other.arguments, strict=True)):
            same = one is two or (bool(call.link(index)) and call.link(index) == other.link(index))
            if isinstance(one, Tensor) and isinstance(two, Tensor):
                if not same or form(one) != form(two):
                    self.refuse("a layer is given another tensor than the one before")
            elif snapshot(one) != snapshot(two):
                self.refuse("a layer is given another value than the one before")

    def _run(self, repeat: Repeat, index: int, call: _Call, forward: Callable[[], Any]) -> Any:
        layer = repeat.layers[index]
        watched = [*self._tensors[layer], *(leaf for leaf in call.arguments if isinstance(leaf, Tensor))]
        versions = [version(tensor) for tensor in watched]
        with ExitStack() as stack:
            for part, name in repeat.positions[index]:
                stack.callback(_put_back, vars(part), name, vars(part)[name])
                vars(part)[name] = _Position(self)
            output = forward()
        if versions != [version(tensor) for tensor in watched]:
            self.refuse("a layer writes in place to a tensor that it is given, or to a buffer")
        if not self._holds(layer) or call.around[1] != self._identity(repeat, index):
            self.refuse("a layer changes its own attributes")
        call.results, call.result_spec = pytree.tree_flatten(output)
        if not all(isinstance(leaf, (Tensor, *PLAIN, Enum)) for leaf in call.results):
            self.refuse("a layer returns an object")
        return output

    def _skip(self, number: int, last: bool, call: _Call, like: _Call) -> Any:
        for leaf in like.results:
            came_in = like.passed(leaf) if isinstance(leaf, Tensor) else []
            if came_in and call.arguments[came_in[0]] is not leaf:
                self.refuse("a layer returns what the layer before returned")
            fresh = isinstance(leaf, Tensor) and not came_in
            result = torch.ops.shardc.skipped(leaf, number, last) if fresh else leaf
            if isinstance(leaf, Tensor) and form(result) != form(leaf):
                self.refuse("a layer returns a tensor that is not dense")
            call.results.append(result)
        call.result_spec = like.result_spec
        assert call.result_spec is not None
        return pytree.tree_unflatten(call.results, call.result_spec)


def _tensors_of(layer: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a layer."""
    return [tensor for part in layer.modules() for tensor in tensors(part)]


_ABSENT = object()


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _switches() -> Any:
    """The global switches that operators depend on, and the line that calls the layer."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    line = source_line(sys._getframe(2))
    return torch.is_grad_enabled(), torch.get_default_dtype(), tuple(autocast), modes(), line


class _Position:
    """Stands in for a layer's position. Whoever reads it gets Unlike."""

    def __init__(self, watch: Watch) -> None:
        object.__setattr__(self, "_watch", watch)

    def _read(self, *_: Any) -> NoReturn:
        watch: Watch = object.__getattribute__(self, "_watch")
        watch.refuse("a layer looks at its position")

    __getattribute__ = __setattr__ = _read  # type: ignore[assignment]
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _read  # type: ignore[assignment]
    __bool__ = __int__ = __float__ = __complex__ = __index__ = __str__ = __repr__ = _format__ = _read
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _read
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = _read
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = _read
    __rrshift__ = __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __trunc__ = __floor__ = __ceil__ = _read
    __len__ = __iter__ = __contains__ = __getitem__ = __call__ = __copy__ = __deepcopy__ = __reduce__ = _read
