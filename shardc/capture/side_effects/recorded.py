"""What a call does beside computing its results: found in one run of the model under the tracer, kept for all others.

h = self.up(x); self.last = h       ->    guards: model.training is True, ...; effects: model.last = ProgramResult(1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardc.capture.guards.guards import Guards
from shardc.capture.side_effects.arguments import Argument, Containers, argument_holders
from shardc.capture.side_effects.holders import Elements, Holder, Location, Registry
from shardc.capture.side_effects.messages import Message
from shardc.capture.side_effects.reachable import Reachable
from shardc.capture.side_effects.readings import Asked
from shardc.capture.side_effects.replay import CallRun, Describer, Recipe, SideEffect, side_effect
from shardc.capture.side_effects.snapshot import Change, Snapshot
from shardc.capture.side_effects.stand_ins import StandIns
from shardc.errors import CaptureError


@dataclass(frozen=True)
class RecordedEffects:
    """The guards of a program, and what its runs leave behind."""

    guards: Guards
    own: tuple[Any, ...] = ()
    """What of the arguments is the model's own: see `own_arguments`."""
    effects: tuple[SideEffect, ...] = ()
    numbers: tuple[Location, ...] = ()
    """Where counters stand, which effects compute from what they were."""
    seed: Tensor | None = None
    """The state in which the model leaves torch's generator, where it sets it."""
    returned: Recipe | None = None
    """What the model returns, where that is not merely made of its flat outputs."""
    marks: Mapping[int, Mapping[str, Recipe]] = field(default_factory=dict[int, Mapping[str, Recipe]])
    """Attributes of results, by flat position."""
    number: Callable[[Any], Any] = lambda value: value
    """Puts the sizes of a call into symbolic numbers that the model leaves behind."""
    messages: Sequence[Message] = ()
    early: Sequence[Asked] = ()
    """What of the world outside is asked before the run."""

    def at(self, number: Callable[[Any], Any]) -> RecordedEffects:
        """The same, for the sizes of a call."""
        return replace(self, number=number)

    def broken(self, arguments: Any) -> str:
        """Why a call with these arguments (args and kwargs) is not one of this program, in a few words; "" if it is."""
        reason = self.guards.broken()
        if not reason and own_arguments(self.guards, Containers(arguments)) != self.own:
            return (
                "an argument is, or is not, a tensor or an object that the model's code reads as well: it was different"
            )
        return reason

    def changes(self) -> frozenset[tuple[int, Any]]:
        """What has broken the guards until now, each as the identity of a container and a key in it."""
        return frozenset(self.guards.changed)

    @property
    def version(self) -> int:
        """Of the guards: another number whenever a tensor that they know may be another, or of another kind."""
        return self.guards.version

    def knows(self, container: Any, key: Any) -> bool:
        """Whether the guards compare what stands under a key of a container."""
        return self.guards.knows(container, key)

    def as_captured(self) -> AbstractContextManager[None]:
        """In here, a trace is one of the call that this program was captured for, whatever has changed since."""
        return self.guards.as_captured()

    def before(self) -> dict[int, Any]:
        """What a run needs to know that is found before it."""
        return {id(asked): asked.function() for asked in self.early}

    def run(self, results: Sequence[Any], inputs: Sequence[Any], arguments: Any, before: dict[int, Any]) -> CallRun:
        """A run with these results and flat inputs; `arguments` is the pair of args and kwargs of the call, `before`
        what was found before it."""
        numbers = {place: place.get() for place in self.numbers}
        return CallRun(results, inputs, arguments, numbers=numbers, number=self.number, made=before)

    def replay(self, run: CallRun) -> None:
        """Leave behind what the model leaves behind."""
        for index, attributes in self.marks.items():
            for name, value in attributes.items():
                setattr(run.results[index], name, value.make(run))
        for effect in self.effects:
            effect.replay(run)
        for message in self.messages:
            message.replay(run)
        if self.seed is not None:
            torch.set_rng_state(self.seed)


def own_arguments(guards: Guards, given: Containers) -> tuple[Any, ...]:
    """The containers and tensors among the arguments that are the model's own, or views of these: by number."""
    tensors = guards.numbers([tensor if tensor._base is None else tensor._base for tensor in given.tensors])
    views = tuple(tensor._base is not None for tensor in given.tensors) if tensors else ()
    return given.own(guards.holds), tensors, views


class Watched:
    """One run of the model, from now on: what it changes in what it can reach and in its arguments."""

    def __init__(self, reachable: Reachable, arguments: Any) -> None:
        self._reachable = reachable
        self._snapshot = Snapshot([*reachable.holders, *argument_holders(arguments, reachable.holds)])

    def changes(self, ignored: Callable[[Holder, Any], bool]) -> list[Change]:
        """What has changed, but for the keys that are `ignored`."""
        changes: list[Change] = []
        for change in self._snapshot.changes():
            keys = {key for key in change.differing if not ignored(change.holder, key)}
            if keys or not change.differing:
                changes.append(change.only(keys))
        return changes


def effects_of(
    changes: Iterable[Change], describer: Describer, stand_ins: StandIns | None = None
) -> tuple[SideEffect, ...]:
    """The side effects behind changes, and behind what was written to stand-ins, in their order."""
    effects: list[SideEffect] = []
    for change in changes:
        effects.append(side_effect(change, describer))
        if isinstance(change.holder, Argument):
            change.holder.forget()
    for holder, contents in stand_ins.written() if stand_ins else ():
        values = {key: describer.describe(value) for key, value in contents.items()}
        if isinstance(holder, Elements):
            effects.append(SideEffect(holder, {}, (), list(values.values())))
        else:
            effects.append(SideEffect(holder, values))
    return tuple(effects)


def live_holders(effects: Iterable[SideEffect], others: Iterable[Holder]) -> set[int]:
    """The identities of the things that a program reads or writes at every run."""
    holders = [effect.holder for effect in effects if not isinstance(effect.holder, Argument)]
    return {id(holder.target) for holder in (*holders, *others)}


def refuse_new_parameters(changes: Iterable[Change]) -> None:
    """Raise CaptureError for a parameter that forward makes, or puts in the place of another."""
    for change in changes:
        for key in change.written if isinstance(change.holder, Registry) else ():
            if isinstance(change.now[key], nn.Parameter):
                raise CaptureError(
                    f"forward makes the parameter {change.holder.name(key)}: a sharded model has its parameters before "
                    "its first call. Make it in __init__, or call the plain model once before you shard it"
                )
