"""The random stream of one in-place method, as torch's CPU kernels draw it, in pieces of any length.

Most kernels draw one element after the other. `normal_` of a contiguous tensor of 16 elements or more goes by groups of
16, and draws the last 16 elements once more where the groups do not come out even. Some draw all elements at once, by
a library: their tensor must be drawn whole before a part can be taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part

__all__: list[str] = []

BLOCK = 1 << 20
"""Elements that are drawn at a time; a multiple of the group."""

GROUP = 16
"""Normal numbers are drawn in groups of so many."""

SERIAL = frozenset({"uniform", "normal", "cauchy", "log_normal", "geometric", "random"})
"""What is drawn element by element, or group by group."""


class Stream:
    """A method of filling (`uniform`, `normal`, ...) with its parameters, for one type, from one generator."""

    def __init__(
        self, distribution: str, parameters: Sequence[float], dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        self.distribution, self.parameters, self.dtype, self.generator = distribution, parameters, dtype, generator

    @property
    def serial(self) -> bool:
        """Whether pieces one after the other are what a whole tensor would be."""
        return self.distribution in SERIAL and not self.dtype.is_complex

    def fill(self, x: Tensor) -> Tensor:
        """`x`, filled at once."""
        return getattr(x, f"{self.distribution}_")(*self.parameters, generator=self.generator)

    def skip(self, count: int) -> None:
        """Go past `count` elements, of a serial method that knows no groups."""
        for start in range(0, count, BLOCK):
            self.fill(torch.empty(min(BLOCK, count - start), dtype=self.dtype))


class _Pieces:
    """The `total` elements of a tensor in the order of its memory, drawn in blocks and handed out piece by piece.

    `contiguous`: whether the tensor is, in eager mode."""

    def __init__(self, stream: Stream, total: int, contiguous: bool) -> None:
        self._stream = stream
        self._grouped = stream.distribution == "normal" and contiguous and total >= GROUP
        self._left = total
        self._ready = torch.empty(0, dtype=stream.dtype)

    def take(self, count: int) -> Tensor:
        """The next `count` elements."""
        while len(self._ready) < count:
            self._ready = torch.cat([self._ready, self._block()])
        taken, self._ready = self._ready.split([count, len(self._ready) - count])
        return taken

    def _block(self) -> Tensor:
        # the last block takes a short rest along: its last group is drawn over what comes before
        size = self._left if self._left < BLOCK + GROUP else BLOCK
        self._left -= size
        if self._grouped or size < GROUP:
            return self._stream.fill(torch.empty(size, dtype=self._stream.dtype))
        return self._stream.fill(torch.empty(size, 2, dtype=self._stream.dtype)[:, 0])  # gaps keep it from groups


def filled(stream: Stream, shape: Sequence[int], strides: Sequence[int] | None, parts: Mapping[int, Part]) -> Tensor:
    """The part, contiguous and with zeros as padding, of a tensor of that global shape and those strides in memory."""
    shape, like = tuple(shape), torch.empty(tuple(shape), dtype=stream.dtype, device="meta")
    if strides is not None:
        like = torch.empty_strided(shape, tuple(strides), dtype=stream.dtype, device="meta")
    spans = [
        slice(parts[d].start, parts[d].start + parts[d].valid) if d in parts else slice(0, n)
        for d, n in enumerate(shape)
    ]
    local = [parts[d].length if d in parts else n for d, n in enumerate(shape)]
    inside = tuple(slice(0, span.stop - span.start) for span in spans)
    if not parts or not stream.serial:
        made = stream.fill(torch.empty_strided(shape, like.stride(), dtype=stream.dtype))
        if not parts:
            return made.contiguous()
        result = torch.zeros(local, dtype=stream.dtype)
        result[inside] = made[tuple(spans)]
        return result
    result = torch.zeros(local, dtype=stream.dtype)
    order = sorted(range(len(shape)), key=lambda d: -like.stride(d))
    pieces = _Pieces(stream, math.prod(shape), like.is_contiguous())
    _walk(pieces, result[inside].permute(order), [shape[d] for d in order], [spans[d] for d in order])
    return result


def _walk(pieces: _Pieces, target: Tensor | None, shape: Sequence[int], spans: Sequence[slice]) -> None:
    """Go through a tensor of `shape`, major dim first, and put what lies within `spans` into `target` (None: nothing
    does), in pieces of whole rows that are no larger than a block, if a row is."""
    count, row = shape[0], math.prod(shape[1:])
    first, last = spans[0].start, spans[0].stop
    if row > BLOCK:
        for index in range(count):
            inner = target[index - first] if target is not None and first <= index < last else None
            _walk(pieces, inner, shape[1:], spans[1:])
        return
    step = max(BLOCK // max(row, 1), 1)
    for start in range(0, count, step):
        rows = min(step, count - start)
        piece = pieces.take(rows * row).view(rows, *shape[1:])
        low, high = max(first, start), min(last, start + rows)
        if target is not None and low < high:
            target[low - first : high - first] = piece[(slice(low - start, high - start), *spans[1:])]
