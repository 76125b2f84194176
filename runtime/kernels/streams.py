"""The random stream of one in-place method, as torch's CPU kernels draw it, in pieces of any length.

Most kernels draw one element after the other. `normal_` on a contiguous tensor of 16 elements or more draws groups of
16; if the number of elements is not a multiple of 16, it draws the last 16 elements once more. `exponential_` draws all
elements at once with a library: every rank must draw the whole tensor to get its part. Of Bernoulli numbers, a rank
draws its part alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardc.runtime.kernels.bernoulli import in_memory_order, kind, state_of_draw
from shardc.runtime.kernels.parts import Part

__all__: list[str] = []

BLOCK = 1 << 20
"""Elements that are drawn at a time; a multiple of the group."""

GROUP = 16
"""Elements in a group of normal numbers."""

SEED = 8
"""Bytes of a seed."""

_MASK, _GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15

IN_PIECES = frozenset({"uniform", "normal", "cauchy", "log_normal", "geometric", "random", "bernoulli"})
"""Methods that draw element by element, or group by group, and Bernoulli numbers."""


def number_of(seed: Tensor) -> int:
    """The number that a seed of `SEED` bytes is."""
    return int(seed.view(torch.int64))


def mixed(seed: int, *places: int) -> int:
    """A seed of 63 bits for one of the places that share a seed. What is drawn from those of other places is
    independent.

    Bits are mixed as by SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    word = _scrambled(seed)
    for place in places:
        word = _scrambled(word + _GOLDEN * (place + 1))
    return word >> 1


def _scrambled(word: int) -> int:
    word &= _MASK
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
    return word ^ word >> 31


class Stream:
    """An in-place random method (`uniform`, `normal`, ...) with its parameters, for one dtype, from one generator."""

    def __init__(
        self, distribution: str, parameters: Sequence[float], dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        self.distribution, self.parameters, self.dtype, self.generator = distribution, parameters, dtype, generator

    @property
    def in_pieces(self) -> bool:
        """Whether a tensor can be drawn in pieces."""
        return self.distribution in IN_PIECES and not self.dtype.is_complex

    def pieces(self, total: int, contiguous: bool) -> _Pieces:
        """The elements of a tensor with `total` elements, of a stream that can be drawn in pieces."""
        return (_Bernoulli if self.distribution == "bernoulli" else _Serial)(self, total, contiguous)

    def fill(self, x: Tensor) -> Tensor:
        """`x`, filled at once."""
        return getattr(x, f"{self.distribution}_")(*self.parameters, generator=self.generator)

    def skip(self, count: int) -> None:
        """Skip `count` elements. The method must be serial and without groups."""
        for start in range(0, count, BLOCK):
            self.fill(torch.empty(min(BLOCK, count - start), dtype=self.dtype))


class _Pieces(Protocol):
    """The `total` elements of a tensor in the order of its memory, piece by piece. `contiguous` says whether the tensor
    is contiguous in eager mode. All elements must be taken or skipped."""

    def __init__(self, stream: Stream, total: int, contiguous: bool) -> None: ...

    def take(self, count: int) -> Tensor:
        """The next `count` elements."""
        ...

    def skip(self, count: int) -> None:
        """Leave out the next `count` elements."""
        ...


class _Bernoulli(_Pieces):
    """Elements that can be drawn from any place. The generator goes behind all of them at once."""

    def __init__(self, stream: Stream, total: int, contiguous: bool) -> None:
        state = state_of_draw(stream.generator, [total], stream.dtype)
        self._numbers = kind()(state, stream.parameters[0] if stream.parameters else 0.5, stream.dtype, total)
        self._place = 0

    def take(self, count: int) -> Tensor:
        self._place += count
        return self._numbers.take(self._place - count, count)

    def skip(self, count: int) -> None:
        self._place += count


class _Serial(_Pieces):
    """Elements that are drawn one after the other, in blocks."""

    def __init__(self, stream: Stream, total: int, contiguous: bool) -> None:
        self._stream = stream
        self._grouped = stream.distribution == "normal" and contiguous and total >= GROUP
        self._left = total
        self._ready = torch.empty(0, dtype=stream.dtype)

    def skip(self, count: int) -> None:
        self.take(count)

    def take(self, count: int) -> Tensor:
        while len(self._ready) < count:
            self._ready = torch.cat([self._ready, self._block()])
        piece, self._ready = self._ready.split([count, len(self._ready) - count])
        return piece

    def _block(self) -> Tensor:
        # a short rest joins the last block, because the last group is drawn over the elements before it
        size = self._left if self._left < BLOCK + GROUP else BLOCK
        self._left -= size
        if self._grouped or size < GROUP:
            return self._stream.fill(torch.empty(size, dtype=self._stream.dtype))
        return self._stream.fill(
            torch.empty(size, 2, dtype=self._stream.dtype)[:, 0]
        )  # strides of 2 keep torch from drawing groups


def filled(
    stream: Stream, shape: Sequence[int], strides: Sequence[int] | None, parts: Mapping[int, Part],
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The rank's part of a random tensor of global `shape`; contiguous, with zeros as padding.

    `strides` are those of the global tensor in eager mode, None if it is contiguous. `parts` are by dim. `dtype` is
    that of the result, where it is not that in which eager mode draws.
    """
    made = stream.dtype if dtype is None else dtype
    shape, like = tuple(shape), torch.empty(tuple(shape), dtype=stream.dtype, device="meta")
    if strides is not None:
        like = torch.empty_strided(shape, tuple(strides), dtype=stream.dtype, device="meta")
    spans = [
        slice(parts[d].start, parts[d].start + parts[d].valid) if d in parts else slice(0, n)
        for d, n in enumerate(shape)
    ]
    local = [parts[d].length if d in parts else n for d, n in enumerate(shape)]
    inside = tuple(slice(0, span.stop - span.start) for span in spans)
    if not stream.in_pieces or not shape or (not parts and made == stream.dtype):
        whole = stream.fill(torch.empty_strided(shape, like.stride(), dtype=stream.dtype))
        if not parts:
            return whole.to(made).contiguous()
        result = torch.zeros(local, dtype=made)
        result[inside] = whole[tuple(spans)]
        return result
    result = torch.zeros(local, dtype=made)
    order = list(range(len(shape)))
    if stream.distribution != "bernoulli" or in_memory_order():
        order.sort(key=lambda d: -like.stride(d))
    pieces = stream.pieces(math.prod(shape), like.is_contiguous())
    _walk(pieces, result[inside].permute(order), [shape[d] for d in order], [spans[d] for d in order])
    return result


def _walk(pieces: _Pieces, target: Tensor | None, shape: Sequence[int], spans: Sequence[slice]) -> None:
    """Draw a tensor of `shape`, major dim first, and write the elements within `spans` to `target`.

    `target` is None if no element is within `spans`. A piece has as many whole rows as fit into a block. Larger rows
    are drawn in turn.
    """
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
        low, high = max(first, start), min(last, start + rows)
        if target is None or low >= high:
            pieces.skip(rows * row)
        else:
            piece = pieces.take(rows * row).view(rows, *shape[1:])
            target[low - first : high - first] = piece[(slice(low - start, high - start), *spans[1:])]
