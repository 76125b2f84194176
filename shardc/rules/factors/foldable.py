"""Which atoms may be dealt out folded: the sequences of causal attention, and what the user asks for.

attention, causal    q, k, v f32[2, 8, 4096, 64]    4096 is an atom of most values of a decoder: all may have it folded
constrain(x, "f32[2, 16@cp~folded, 64]")            16 may be folded, too

A folded order balances what ranks compute under a causal mask. No other program gains from it, so there it is not
offered, and its problem stays as small as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from shardc.ir.constrain import parse
from shardc.ir.layout import is_folded
from shardc.rules.factors.atoms import Atoms, Ref
from shardc.rules.factors.factored import Op

LEAST = 128
"""The least elements of a piece. Kernels of attention leave out work in tiles of up to 128 queries and keys, so that
with shorter pieces they would compute the whole square."""


def foldable(ops: Sequence[Op], atoms: Atoms) -> dict[int, int]:
    """The atoms that may be folded, each with the least elements of a piece."""
    folds: dict[int, int] = {}
    for op in ops:
        for ref in _read_causally(op, atoms):
            folds.setdefault(atoms.piece(ref), LEAST)
    for op in ops:
        for ref in _asked(op, atoms):
            folds[atoms.piece(ref)] = 1
    return folds


def _read_causally(op: Op, atoms: Atoms) -> Iterator[Ref]:
    """The major atoms of the dims of which a causal operator reads a triangle."""
    band = op.rule.band
    if band is None or not band.causal:
        return
    for item in op.items:
        for name, dim in zip(item.names, item.value.dims, strict=True):
            if name in (band.rows, band.columns) and dim:
                yield atoms.leaves(dim)[0]


def _asked(op: Op, atoms: Atoms) -> Iterator[Ref]:
    """The atoms of the dims that the user wants folded."""
    if op.node.target is not torch.ops.shardc.constrain.default:
        return
    for axes, dim in zip(parse(str(op.node.args[1])), op.results[0].value.dims, strict=False):
        if axes and is_folded(axes):
            yield from atoms.leaves(dim)
