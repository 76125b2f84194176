"""Numbers of objects that are read where CPython holds them: they are those that Python tells."""

from __future__ import annotations

from collections.abc import Callable
from types import CellType
from typing import Any

import numpy as np
import pytest
from torch import nn

from shardc.capture.torch_patches import object_numbers
from shardc.capture.torch_patches.object_numbers import (
    BASES,
    CLASS,
    CONTENTS,
    COUNTED,
    LENGTH,
    VERSION,
    NumberKind,
    ObjectNumbers,
)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0


class Other(Part):
    pass


class Second(Part):
    pass


def changes() -> list[tuple[Any, NumberKind, Callable[[Any], object]]]:
    """Objects, what is asked of them, and what makes that another number."""

    def becomes(part: nn.Module) -> None:
        part.__class__ = Other

    def has_other_bases(cls: Any) -> None:
        cls.__bases__ = (nn.Module,)

    def grown(container: Any) -> None:
        for one in (1, 2):
            if isinstance(container, dict):
                container[one] = one
            else:
                (container.add if isinstance(container, set) else container.append)(one)
        container.pop(1) if isinstance(container, dict) else container.remove(1)

    return [
        (Part(), CLASS, becomes),
        (Second, BASES, has_other_bases),
        (CellType(1), CONTENTS, lambda cell: setattr(cell, "cell_contents", 2)),
        (CellType(1), CONTENTS, lambda cell: delattr(cell, "cell_contents")),
        (vars(Part()), VERSION, lambda held: held.update(scale=2.0)),
        (Part()._forward_hooks, VERSION, lambda held: held.update({0: print})),
        *((kind(), LENGTH, grown) for kind in COUNTED),
    ]


@pytest.mark.parametrize("found", [True, False], ids=["read", "told"])
def test_a_change_makes_one_number_another(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not found:
        monkeypatch.setattr(object_numbers, "_offset", lambda kind, cls: None)
    cases = changes()
    numbers = ObjectNumbers([(value, kind) for value, kind, _ in cases])
    assert (numbers._places is not None) == found
    before = numbers.now()
    assert before.tolist() == [kind.told(value) for value, kind, _ in cases]
    for index, (value, _, change) in enumerate(cases):
        change(value)
        now = numbers.now()
        assert np.flatnonzero(now != before).tolist() == [index], cases[index]
        before = now
