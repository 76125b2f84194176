"""Which atoms may be dealt out folded: the sequences of causal attention, and what the user asks for.

attention, causal    q, k, v f32[2, 8, 4096, 64]    4096 is an atom of most values of a decoder: all may have it folded
constrain(x, "f32[2, 16@cp~folded, 64]")            16 may be folded by cp

A folded order balances what ranks compute under a causal mask. No other program gains from it, so there it is not
offered, and its problem stays as small as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from shardc.ir.constrain import parse
from shardc.ir.layout import is_folded
from shardc.rules.factors.atoms import Atoms, Ref
from shardc.rules.factors.factored import Op
from shardc.runtime.mesh.orders import axis_of

LEAST = 128
"""The least elements of a piece. Kernels of attention leave out work in tiles of up to 128 queries and keys, so that
with shorter pieces they would compute the whole square."""


def is_worth_folding(size: int, ranks: int) -> bool:
    """Whether an axis of so many ranks may fold an atom, and its pieces are long enough for kernels to gain from it."""
    return ranks > 1 and size % (2 * ranks) == 0 and size // (2 * ranks) >= LEAST


def foldable(ops: Sequence[Op], atoms: Atoms, offered: Mapping[str, int]) -> dict[int, tuple[str, ...]]:
    """The atoms that may be folded, each with the axes that may. `offered` are axes with their number of ranks."""
    folds: dict[int, tuple[str, ...]] = {}
    for op in ops:
        for ref in read_causally(op, atoms) if offered else ():
            size = atoms.size(ref)
            if axes := tuple([axis for axis, ranks in offered.items() if is_worth_folding(size, ranks)]):
                folds[atoms.piece(ref)] = axes
    for op in ops:
        for ref, axis in _asked(op, atoms):
            known = folds.get(atoms.piece(ref), ())
            folds[atoms.piece(ref)] = known if axis in known else (*known, axis)
    return folds


def read_causally(op: Op, atoms: Atoms) -> Iterator[Ref]:
    """The major atoms of the dims of which a causal operator reads a triangle."""
    band = op.rule.band
    if band is None or not band.causal:
        return
    for item in op.items:
        for name, dim in zip(item.names, item.value.dims, strict=True):
            if name in (band.rows, band.columns) and dim:
                yield atoms.leaves(dim)[0]


def _asked(op: Op, atoms: Atoms) -> Iterator[tuple[Ref, str]]:
    """The atoms of the dims that the user wants folded, with the axis."""
    if op.node.target is not torch.ops.shardc.constrain.default:
        return
    for axes, dim in zip(parse(str(op.node.args[1])), op.results[0].value.dims, strict=False):
        if axes and is_folded(axes):
            yield from ((ref, axis_of(axes[-1])) for ref in atoms.leaves(dim))
