"""The ring as a variant of attention: what goes round, and what it allocates.

forward     keys and values                                  once per step to another rank
backward    keys and values, and their gradients, as scores  the gradients also home
"""

from __future__ import annotations

import torch

from shardc.rules.families.attention_workspace import KEYS, ROWS, Operands, whole
from shardc.rules.notation import Send, Travel, Variant, Workspace
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels.attention.ring import ring_attention, ring_attention_backward

TOGETHER = (("r", "s"),)
"""Queries and keys."""

POSITIONS = frozenset({"r", "s"})
"""Where queries and keys are, all bodies read from the runs of their parts: they may be folded."""


def rings(of: Operands, *, backward: bool) -> list[Variant]:
    """The variant of a ring; none for one query or one key, nor where a mask has no columns, from whose shape a rank
    could not tell what it holds.

    Keys and values, and their gradients, go as one message. A mask that is the same for all queries is split along the
    keys; the ring gathers it.
    """
    length = of.k.shape[2]
    if 1 in (of.q.shape[-2], length) or (of.mask is not None and of.mask.shape[-1] != length):
        return []
    width = of.k.shape[3] + of.v.shape[3]
    around = Send(permute, KEYS, of.narrow, width, travel=Travel.ROUND)
    home = Send(permute, KEYS, of.wide, width, travel=Travel.HOME)
    sends = [*([home] if backward else []), around, *_gathered(of.mask), *_gathered_numbers(of.of_keys)]
    body = ring_attention_backward if backward else ring_attention
    needed = _backward(of) if backward else _forward(of)
    return [Variant("ring", body, {"s": sends}, TOGETHER, tuple(needed), POSITIONS)]


def _gathered(mask: torch.Tensor | None) -> list[Send]:
    if mask is None or (mask.dim() > 1 and mask.shape[-2] > 1):
        return []
    names = ["b", "h", *(["g"] if mask.dim() == 5 else []), "r", "s"][-mask.dim() :]
    carried = tuple(name for size, name in zip(mask.shape, names, strict=True) if size > 1)
    return [Send(all_gather, carried, mask.element_size())]


def _gathered_numbers(of_keys: torch.Tensor | None) -> list[Send]:
    if of_keys is None:
        return []
    carried = ("b", "s") if of_keys.shape[1] > 1 else ("s",)
    return [Send(all_gather, carried, of_keys.element_size(), of_keys.shape[0])]


def _forward(of: Operands) -> list[Workspace]:
    """Of two parts, the first step holds two messages. Later steps hold the result of the step, and what combines it
    with that before; of more than two parts, they hold two messages as well."""
    width, value, blocks = of.k.shape[3] + of.v.shape[3], of.v.shape[3], _blocks(of, backward=False)
    message, result = Workspace(KEYS, of.narrow, width), Workspace(ROWS, of.wide, value + 4)
    widened = [Workspace(ROWS, of.wide, value)] if of.wide > of.narrow else []
    first = [message, message, *blocks]
    later = [message, _of_many(message), result, *widened, *blocks]
    return [*(_at(one, 0) for one in first), *(_at(one, 1) for one in later)]


def _backward(of: Operands) -> list[Workspace]:
    """A message of keys, of more than two parts a second one; gradients that come; and the gradients of the step. In
    narrow types, the sums that become results are wide, and the results are not there yet."""
    width, rows = of.k.shape[3] + of.v.shape[3], of.q.shape[-1]
    message, sums = Workspace(KEYS, of.narrow, width), Workspace(KEYS, of.wide, width)
    made = sums if of.wide > of.narrow else message
    needed = [message, _of_many(message), sums, made, Workspace(ROWS, of.wide, rows)]
    return [*needed, *_blocks(of, backward=True)]


def _of_many(message: Workspace) -> Workspace:
    return Workspace(message.factors, message.itemsize, message.elements, beside=("s",), parts=3)


def _blocks(of: Operands, *, backward: bool) -> list[Workspace]:
    """What attention allocates for a step, but for what the ring counts itself."""
    return [one for one in whole(of, backward=backward) if one.stage == 0]


def _at(one: Workspace, stage: int) -> Workspace:
    return Workspace(one.factors, one.itemsize, one.elements, one.most, one.beside, stage, one.parts)
