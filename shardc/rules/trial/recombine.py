"""How results of parts combine to the whole result, and which differences count as rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from shardc.rules.trial.sample_call import KINDS, InputKind

FOLDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "max": torch.maximum, "min": torch.minimum, "prod": torch.mul,
}  # fmt: skip
How = int | str
"""The effect of a cut on a result: the number of the dim that it cuts, `"same"` if all parts are equal, or the
reduction by which the parts combine."""

Partition = list[list[int]]
Cell = tuple[int, ...]


@lru_cache(maxsize=1 << 10)
def positions(part: tuple[int, ...]) -> Tensor:
    """The elements of a part, to select them."""
    return torch.tensor(part)


_PRECISION = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 2e-5, torch.complex64: 2e-5}


def wrong(
    whole: Tensor | None, values: Mapping[Cell, Tensor | None], hows: Sequence[How], partitions: Sequence[Partition],
    kind: InputKind,
) -> str:  # fmt: skip
    """The first difference between the whole result and its parts, combined as `hows` say; empty if there is none.

    `values` has the result of every rank by its cell: its index on each axis, one for each of `partitions`.
    """
    reductions = {str(how) for how in hows if how in FOLDS}
    if whole is None or len(reductions) > 1:  # no strategy makes a result that is partial in two ways
        return ""
    fold = next(iter(reductions), "max")
    groups: dict[Cell, list[Tensor | None]] = {}
    for cell, value in values.items():
        place = tuple(-1 if how in FOLDS else i for how, i in zip(hows, cell, strict=True))
        groups.setdefault(place, []).append(value)
    for place, parts in groups.items():
        piece = whole
        for how, partition, i in zip(hows, partitions, place, strict=True):
            if isinstance(how, int):
                piece = piece.index_select(how, positions(tuple(partition[i])))
        if not combines(fold, parts, piece, kind):
            return _shown(fold, parts, piece)
    return ""


def _shown(fold: str, parts: Sequence[Tensor | None], piece: Tensor) -> str:
    shapes = [None if part is None else tuple(part.shape) for part in parts]
    if any(part is None or part.shape != piece.shape or part.dtype != piece.dtype for part in parts):
        return f"has parts of shape {shapes}, which should be {tuple(piece.shape)} of {piece.dtype}"
    present = [part for part in parts if part is not None]
    total = present[0]
    for part in present[1:]:
        total = FOLDS[fold](total, part)
    exact = not (piece.is_floating_point() or piece.is_complex())
    error = (total != piece).double() if exact else (total - piece).abs().nan_to_num(math.inf)
    off = int(error.reshape(-1).argmax())
    return f"is {total.reshape(-1)[off].item()} where it should be {piece.reshape(-1)[off].item()}"


def precision(x: Tensor) -> float:
    """The relative error that a result may have; 0 if it must be equal."""
    return _PRECISION.get(x.dtype, 0.0)


def _near(a: Tensor, b: Tensor, scale: Tensor, tolerance: float, kind: InputKind) -> bool:
    """Whether elements of `a` and `b` differ by at most `tolerance` times `scale`.

    Sums that cancel leave rounding errors, so a small part of the largest scale is added to every scale. That would
    hide errors of small elements among mixed magnitudes, so it is not done for such inputs.
    """
    same = (a == b) | ((a != a) & (b != b))
    sizes = scale.nan_to_num(0.0, 0.0, 0.0)
    floor = 0.0
    if kind.floats not in ("mixed", "special") and sizes.numel():
        floor = float(sizes.max()) * (1e-4 if tolerance < 1e-6 else 1e-2)
    return bool((same | ((a - b).abs() <= tolerance * (sizes + floor))).all())


def close(a: Tensor | None, b: Tensor | None, tolerance: float, kind: InputKind = KINDS[0]) -> bool:
    """Whether two results (None: absent) are equal up to a relative error of `tolerance`."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):  # as most parts are: one operator in place of ten
        return True
    if not tolerance or not (a.is_floating_point() or a.is_complex()):
        return bool(((a == b) | ((a != a) & (b != b))).all())
    return _near(a, b, b.abs(), tolerance, kind)


def all_close(one: Sequence[Tensor | None], other: Sequence[Tensor | None], tolerance: float) -> bool:
    """`close` for each pair of two lists of results."""
    return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))


def combines(how: str, parts: Sequence[Tensor | None], whole: Tensor, kind: InputKind) -> bool:
    """Whether the reduction `how` of the parts is the whole."""
    present = [part for part in parts if part is not None]
    if len(present) != len(parts) or any(part.shape != whole.shape or part.dtype != whole.dtype for part in present):
        return False
    total = present[0]
    for part in present[1:]:
        total = FOLDS[how](total, part)
    if torch.equal(total, whole):
        return True
    if not (whole.is_floating_point() or whole.is_complex()):
        return False
    scale = whole.abs()
    if how == "sum":  # sums of large parts cancel, so rounding errors are relative to the parts
        total = torch.where((total != total) & whole.isinf(), whole, total)  # inf - inf is NaN
        scale = torch.stack([scale, *(part.abs() for part in present)]).amax(0)
    return _near(total, whole, scale, precision(whole), kind)
