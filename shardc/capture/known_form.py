"""Whether a call is of the very form of the last one: most are, and to say so takes a few calls into torch.

known = KnownForm.of([ids, None], (1, "mask"))
known.fits([other_ids, None], (1, "mask"))      # True: of the same shape, dtype, ..., under the same switches of torch
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardc.capture.inputs import shared_memory
from shardc.capture.torch_patches.ambient_modes import Switches
from shardc.runtime.execute.tensor_kinds import TensorKinds
from shardc.runtime.execute.transforms import in_forward_mode


class KnownForm:
    """The form of a call with flat inputs that were looked at, one by one. `structure` is how they were passed."""

    def __init__(self, leaves: Sequence[Any], structure: Any) -> None:
        self._number, self._structure, self._switches = len(leaves), structure, Switches()
        self._at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._others_at = [index for index in range(len(leaves)) if index not in self._at]
        self._others = [leaves[index] for index in self._others_at]
        tensors = [leaves[index] for index in self._at]
        self._kinds, self._memory = TensorKinds(tensors), shared_memory(tensors)

    @staticmethod
    def of(leaves: Sequence[Any], structure: Any) -> KnownForm | None:
        """The form of a call; None where to look at it takes more than this does."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return KnownForm(leaves, structure) if tensors and _are_simple(tensors) else None

    def fits(self, leaves: Sequence[Any], structure: Any) -> bool:
        """Whether a call with these flat inputs is of this form. False for some that are."""
        if len(leaves) != self._number or structure != self._structure or not self._switches.same():
            return False
        if not all(map(operator.is_, [leaves[index] for index in self._others_at], self._others)):
            return False
        tensors = [leaves[index] for index in self._at]
        return (
            not in_forward_mode()
            and self._kinds.fit(tensors)
            and _are_simple(tensors)
            and shared_memory(tensors) == self._memory
        )


def _are_simple(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie contiguous in memory and have no attributes of their own."""
    return not any(map(vars, tensors)) and all(map(Tensor.is_contiguous, tensors))
