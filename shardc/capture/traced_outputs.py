"""What came out of a run of the model under the tracer: its results, and what it leaves behind.

self.last = [h]; return {"loss": loss, "hidden": self.last}
->  outputs (loss, h);  effects: model.last = [result 1];  returned: {"loss": result 0, "hidden": that very list}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.capture.inputs import flatten
from shardc.capture.side_effects.arguments import Containers, Way, passed_objects
from shardc.capture.side_effects.messages import Message
from shardc.capture.side_effects.readings import Asked
from shardc.capture.side_effects.recorded import effects_of
from shardc.capture.side_effects.replay import (
    Copied,
    Describer,
    Given,
    Kept,
    Passed,
    ProgramResult,
    Recipe,
    SideEffect,
    Standing,
    holds_tensors,
)
from shardc.capture.side_effects.snapshot import Change
from shardc.capture.side_effects.stand_ins import StandIns
from shardc.capture.side_effects.tensor_facts import marks
from shardc.capture.state import StateEntry
from shardc.capture.torch_patches.fake_tensors import is_traced
from shardc.errors import CaptureError
from shardc.ir.program import Constant, Made, Role


class TracedOutputs:
    """The outputs of one run of the model. `differentiable` are the flat ones that get a tangent, None for the usual
    ones; `exists` tells whether an object was there before the call, and `refuse` raises for what no output may be."""

    def __init__(
        self, grad: bool, differentiable: frozenset[int] | None, exists: Callable[[Any], bool],
        refuse: Callable[[Any], None],
    ) -> None:  # fmt: skip
        self._grad, self._asked, self._exists, self._refuse = grad, differentiable, exists, refuse
        self.spec: pytree.TreeSpec = pytree.tree_structure(None)
        self.leaves: list[int | Constant | Made] = []
        self.attached: set[int] = set()
        """The positions of outputs that require a gradient."""
        self.effects: tuple[SideEffect, ...] = ()
        self.marks: dict[int, dict[str, Recipe]] = {}
        """Attributes that the model has set on its results, by flat position."""
        self.messages: tuple[Message, ...] = ()
        self.early: list[Asked] = []
        """What of the world outside is asked before the run."""
        self.returned: Recipe | None = None
        """What the model returns, where containers in it are those of somebody else or come twice."""

    def flat(
        self,
        output: Any,
        changes: list[Change],
        slots: Mapping[int, StateEntry],
        arguments: Any,
        ways: Mapping[int, Way],
        stand_ins: StandIns | None,
        messages: Iterable[Message],
    ) -> tuple[Tensor, ...]:
        """The tensors among the outputs and among what the model leaves behind; notes what is made of them. `slots` are
        the tensors of the model and the inputs, by identity; `ways` lead to the containers that the call was given."""
        passed = passed_objects(arguments)
        if isinstance(output, Iterator):
            raise CaptureError(
                f"forward returns a {type(output).__name__}, which runs the model's code later: return a list"
            )
        leaves, self.spec = flatten(output, passed)
        positions: dict[int, int] = {}

        def described(tensor: Tensor) -> Recipe:
            slot = slots.get(id(tensor))
            if slot is not None:
                return Given(slot.port.index) if slot.port.role is Role.INPUT else Standing(slot.places[0])
            if not is_traced(tensor):
                return Kept(tensor) if self._exists(tensor) else Copied(tensor)
            if id(tensor) not in positions:
                positions[id(tensor)] = len(leaves)
                leaves.append(tensor)
            return ProgramResult(positions[id(tensor)])

        describer = Describer(described, self._exists, {key: Passed(way) for key, way in ways.items()})
        kept = [change.now[key] for change in changes for key in change.written]
        shared = Containers(((output,), {})).shares(lambda value: self._exists(value) or id(value) in ways, kept)
        made: dict[int, Recipe] = {}
        for index, leaf in enumerate(list(leaves)):
            if isinstance(leaf, Tensor):
                positions.setdefault(id(leaf), index)
                if id(leaf) in slots or not is_traced(leaf):
                    made[index] = described(leaf)
            elif id(leaf) in passed:
                made[index] = Passed(passed[id(leaf)])
                leaves[index] = None
            elif holds_tensors(leaf):
                made[index] = describer.describe(leaf)
        self.marks = {
            index: {name: describer.describe(value) for name, value in found.items()}
            for index, leaf in enumerate(leaves)
            if is_traced(leaf) and id(leaf) not in slots and (found := marks(leaf))
        }
        self.returned = describer.describe(output) if shared else None
        self.effects = effects_of(changes, describer, stand_ins)
        self.messages = tuple(message.described(describer) for message in messages)
        self.early = describer.early
        return self._chosen_outputs(leaves, made)

    def _chosen_outputs(self, leaves: list[Any], made: Mapping[int, Recipe]) -> tuple[Tensor, ...]:
        chosen = self._differentiable(leaves, made)
        known: dict[tuple[int, bool], int] = {}
        tensors: list[Tensor] = []
        self.leaves, self.attached = [], set[int]()
        for index, leaf in enumerate(leaves):
            self._refuse(leaf)
            if index in made or not isinstance(leaf, Tensor):
                self.leaves.append(made.get(index) or Constant(leaf))
                continue
            key = (id(leaf), index in chosen)
            if key not in known:
                known[key] = len(tensors)
                # A copy, so that no output is a view of an input or of another; the rewriter drops it again.
                tensors.append((leaf if index in chosen else leaf.detach()).clone())
            self.leaves.append(known[key])
            if leaf.requires_grad:
                self.attached.add(known[key])
        return tuple(tensors)

    def _differentiable(self, leaves: list[Any], made: Mapping[int, Recipe]) -> frozenset[int]:
        able = {
            i: leaf
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad and i not in made
        }
        if self._asked is None:
            scalars = frozenset(i for i, leaf in able.items() if leaf.ndim == 0)
            returned = frozenset(i for i in able if i < self.spec.num_leaves)
            return scalars | (frozenset() if returned & scalars else returned) or frozenset(able)
        wrong = sorted(self._asked - able.keys()) if self._grad else []
        if wrong:
            raise CaptureError(
                f"differentiable={sorted(self._asked)}: output {wrong[0]} does not require a gradient; "
                f"of the {len(leaves)} flat outputs these do: {sorted(able)}"
            )
        return self._asked & able.keys()
