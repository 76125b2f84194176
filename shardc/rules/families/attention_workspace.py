"""What attention allocates and frees again: buffers of the flash kernel, tiles of scores, sums over pieces of keys.

Where one call of a kernel does all (no window, no soft cap, no dropout, a mask that the kernel reads as it lies), there
are its buffers alone. Over several pieces, results are added up in the type of the scores. Tests compare all of it with
what is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from shardc.rules.notation import Workspace
from shardc.runtime.kernels.attention.blocks import compute_dtype, tile_bytes
from shardc.runtime.kernels.attention.pieces import Literals, rows_of_tile
from shardc.runtime.kernels.mersenne import STATE
from shardc.runtime.kernels.streams import SEED

_CAPPED, _DROPPED = (2.0, 3.2), (2.25, 3.85)
_MASKS, _FUNCTIONS = 1.2, 1.5
"""Tiles that are there at once: of scores, forward and backward, with a soft cap and with dropout; of masks, and of
masks that a function makes."""

_KEYS, _QUERIES = 512, ((768, 256), (192, 64), (0, 32))
"""The blocks of torch's flash kernel on the CPU: of keys, and of queries by how many there are at least."""


@dataclass(frozen=True)
class Operands:
    """What the workspace of a call depends on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    draw: torch.Tensor | None
    causal: bool
    window: int
    softcap: float
    of_keys: torch.Tensor | None = None

    @property
    def narrow(self) -> int:
        """Bytes of an element."""
        return self.q.element_size()

    @property
    def wide(self) -> int:
        """Bytes of a score."""
        return compute_dtype(self.q.dtype).itemsize

    @property
    def by_kernel(self) -> bool:
        fused = self.draw is None or (self.draw.numel() == SEED and self.q.device.type == "cuda")
        return not self.softcap and fused

    @property
    def in_tiles(self) -> bool:
        made = self.mask is not None and (self.mask.dtype != self.q.dtype or self.mask.shape[-1] == 1)
        return (
            not self.by_kernel
            or self.window > 0
            or self.of_keys is not None
            or (made and self.mask is not None and self.mask.shape[-2] > 1)
        )


ROWS, KEYS = ("b", "h", "g", "r"), ("b", "h", "s")


def whole(of: Operands, *, backward: bool) -> tuple[Workspace, ...]:
    """What the operator itself allocates."""
    needed = [*_padded(of, backward), *_blocks(of, backward)]
    if of.in_tiles and of.wide > of.narrow:
        needed += [*_sums(of, backward, of.wide - of.narrow), *_sums(of, backward, of.wide, stage=1)]
    if of.sinks is not None:
        needed.append(Workspace(ROWS, of.wide, of.v.shape[-1], stage=2))
    return tuple(needed)


def in_parts(of: Operands, *, backward: bool) -> tuple[Workspace, ...]:
    """What the body over split queries or keys allocates. Of keys, the ranks exchange the result in wide numbers; under
    a causal mask, what is before the diagonal is a piece of its own."""
    needed = [*whole(of, backward=backward)]
    width, value, pieces = of.q.shape[-1], of.v.shape[-1], of.causal and not of.in_tiles
    for copied in _padded(of, backward) if pieces else ():  # a piece at a time
        factor, over = ("r", ("b", "h")) if copied.factors == KEYS else ("s", ("b", "h", "g"))
        if factor == "r" or backward:
            needed.append(replace(copied, factors=(*over, factor), elements=-copied.elements, beside=(factor,)))
    if not backward:
        copies = 1 if of.wide == of.narrow else 2
        needed.append(Workspace(ROWS, of.wide, copies * value + 4, beside=("s",), stage=3))
        if pieces:
            needed.append(Workspace(ROWS, of.wide, copies * value, beside=("r",)))
    elif pieces:
        for factor, stage, mine in (("r", 1, ("b", "h")), ("s", 2, ("b", "h", "g"))):
            # all but the diagonal; the sums have the size of the results, but are wide
            less = value + width if factor == "r" else width
            needed += [
                *_sums(of, backward, of.narrow, beside=(factor,)),
                Workspace((*mine, factor), of.narrow, -less, beside=(factor,)),
            ]
            if of.wide > of.narrow:
                needed += _sums(of, backward, of.wide - of.narrow, beside=(factor,))
                needed += _sums(of, backward, of.wide, beside=(factor,), stage=stage)
    return tuple(needed)


def _sums(of: Operands, backward: bool, size: int, stage: int = 0, beside: tuple[str, ...] = ()) -> list[Workspace]:
    """Sums of `size` bytes an element, as large as the results."""
    width, value = of.q.shape[-1], of.v.shape[-1]
    if not backward:
        return [Workspace(ROWS, size, value, beside=beside, stage=stage)]
    rows = Workspace(ROWS, size, width, beside=beside, stage=stage)
    return [rows, Workspace(KEYS, size, width + value, beside=beside, stage=stage)]


def _padded(of: Operands, backward: bool) -> list[Workspace]:
    """Copies of what is narrower than the kernel's rows, and its results."""
    width, value = of.q.shape[-1], of.v.shape[-1]
    if not of.by_kernel or of.q.device.type == "cuda" or width == value:
        return []
    most = max(width, value)
    if width < most:
        rows, keys = (2 * most - width, 2 * most - width) if backward else (most, most)
    else:
        rows, keys = (2 * most, 2 * most - value) if backward else (most - value, most)
    return [Workspace(ROWS, of.narrow, rows), Workspace(KEYS, of.narrow, keys)]


def _blocks(of: Operands, backward: bool) -> list[Workspace]:
    """Tiles of scores or masks, and what is inside the kernel."""
    most, size = tile_bytes(of.q.device), of.wide
    points = (*ROWS, "s")
    if not of.by_kernel:
        tiles = (_DROPPED if of.draw is not None else _CAPPED)[backward]
        by_rows = of.draw is not None and of.draw.numel() == STATE  # a tile has whole rows of one head
        grads = [Workspace(("s",), size, max(of.q.shape[-1], of.v.shape[-1]))] if by_rows and backward else []
        if backward and size > of.narrow:  # the operands of a tile in wide numbers
            side = math.isqrt(most // size)
            grads.append(Workspace((), size, 2 * side * (of.q.shape[-1] + of.v.shape[-1])))
        return [*grads, Workspace(points, size, tiles, most=int(tiles * most))]
    count, masks = of.q.shape[-2], list[Workspace]()
    step = count
    if of.in_tiles:
        literals = Literals(of.causal, 1.0, of.window, 0.0, 0.0)
        step = rows_of_tile(count, of.k.shape[2], literals, most // of.narrow)
        near = of.window * (1 if of.causal else 2) + step if of.window else most // (of.narrow * step)
        near = min(near, of.k.shape[2])
        copies = _MASKS if of.of_keys is None else _FUNCTIONS
        masks.append(Workspace(("s",), of.narrow, copies * step, most=int(copies * step * near * of.narrow)))
        if backward:  # the gradients of a tile
            masks.append(Workspace(("b", "h"), of.narrow, near * (of.q.shape[-1] + of.v.shape[-1])))
    return [*masks, *inside_kernel(of, backward, step)]


def inside_kernel(of: Operands, backward: bool, step: int) -> list[Workspace]:
    """The buffers of the CPU's kernel, which every thread has, for `step` queries at a time. Of widened operands, it
    makes one copy more backward."""
    if of.q.device.type == "cuda":
        return []
    value, width, size = of.v.shape[-1], max(of.q.shape[-1], of.v.shape[-1]), of.wide
    queries = min(next(block for least, block in _QUERIES if step >= least), step)
    keys, low = min(_KEYS, of.k.shape[2]), of.narrow if of.wide > of.narrow else 0
    scores = queries * keys * (size + low)
    if not backward:
        return [Workspace((), 1, torch.get_num_threads() * (scores + queries * (width + 2) * size))]
    needed = 2 * scores + ((queries + keys) * width * size if low else 0)
    copied = [Workspace(ROWS, of.narrow, width)] if of.q.shape[-1] != value else []
    return [*copied, Workspace((), 1, torch.get_num_threads() * needed)]
