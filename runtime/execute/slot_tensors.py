"""The tensors that go into a generated module, each looked at before it does.

tensors = SlotTensors(slots)
tensors.of(state, inputs)     # [w, b, x], in the order of the slots; RankError where one is missing or does not fit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.execute.slots import Slot
from shardc.runtime.execute.tensor_kinds import TensorKinds
from shardc.runtime.execute.transforms import in_forward_mode, refuse_transforms


class WatchedState(dict[str, Tensor]):
    """Parameters, buffers and constants by name, of which the caller vouches that they are the same tensors, of the
    same kinds, whenever this very mapping is passed again. They are not looked at again then."""


class SlotTensors:
    """What the slots of a module name, in one run after the other."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._names = [None if slot.role == "input" else slot.name for slot in slots]
        self._given = [(place, slot.index) for place, slot in enumerate(slots) if slot.role == "input"]
        self._kinds: TensorKinds | None = None
        self._state: WatchedState | None = None
        self._of_state: list[Tensor] = []
        self._input_kinds: TensorKinds | None = None

    def of(self, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the slots. They are looked at one by one where they are others than those of the last run."""
        refuse_transforms([])
        if state is self._state and self._input_kinds is not None and not in_forward_mode():
            tensors = self._of_state.copy()
            try:
                for place, index in self._given:
                    tensors[place] = inputs[index]
            except LookupError:
                return self._checked(state, inputs)
            if self._input_kinds.fit([tensors[place] for place, _ in self._given]):
                return tensors
        try:
            tensors = [
                inputs[slot.index] if name is None else state[name]
                for slot, name in zip(self._slots, self._names, strict=True)
            ]
        except LookupError:
            tensors = []
        if self._kinds is None or in_forward_mode() or not self._kinds.fit(tensors):
            tensors = self._checked(state, inputs)
            self._kinds = TensorKinds(tensors)
        if isinstance(state, WatchedState):
            self._state, self._of_state = state, tensors.copy()
            self._input_kinds = TensorKinds([tensors[place] for place, _ in self._given])
            for place, _ in self._given:
                self._of_state[place] = _NONE
        return tensors

    def _checked(self, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        return [_checked(slot, state, inputs) for slot in self._slots]


_NONE = Tensor()
"""Stands in the places of inputs, so that nobody holds them between two runs."""


def _checked(slot: Slot, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    if slot.role == "input":
        if slot.index >= len(inputs):
            raise RankError(f"{slot} is missing: the call has {len(inputs)} inputs")
        tensor = inputs[slot.index]
    elif slot.name in state:
        tensor = state[slot.name]
    else:
        raise RankError(f"{slot} is not in the state: pass a model or a state dict that has it")
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RankError(f"{slot} must be a tensor, but is a {type(tensor).__name__}")
    refuse_transforms([(str(slot), tensor)])
    slot.check(tensor)
    return tensor
