"""What convolutions allocate and free again: copies in the kernel's own order of memory, columns of windows, and the
rows of neighbours where space is split.

On the CPU, oneDNN runs 32-bit and 16-bit numbers; it copies operands and results into blocks of channels, as its own
heuristics say: for few channels, and for 16 bits backward, it may allocate more. Others run as products of matrices,
over a matrix that has a column of numbers for every window (im2col). What cuDNN allocates is not counted. Tests compare
all of it with what torch's allocator reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardc.rules.notation import Workspace

BLOCKED = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""The types that oneDNN runs."""


@dataclass(frozen=True)
class WindowTensor:
    """A tensor of a call: its sizes, and the factors of its dims as words of a rule. `points` are the sizes of factors
    that are not those of their dims."""

    sizes: Sequence[int]
    words: Sequence[str]
    points: Mapping[str, int]
    itemsize: int

    def times(self, copies: float = 1.0, *, stage: int = 0, beside: tuple[str, ...] = ()) -> Workspace:
        """So many copies of it."""
        pairs = [(_plain(word), size) for word, size in zip(self.words, self.sizes, strict=True) if word != "1"]
        # a dim may have more rows than its factor has points
        each = math.prod(self.sizes) / max(math.prod(self.points.get(name, size) for name, size in pairs), 1)
        names = tuple(name for name, _ in pairs)
        return Workspace(names, self.itemsize, copies * each, stage=stage, beside=beside)


def _plain(word: str) -> str:
    return word.partition(":")[0].rstrip("~!")


@dataclass(frozen=True)
class Convolution:
    """What the workspace of a call depends on: `x`, the weight and the result (or its gradient); `shared` are the
    factors of space that, if they are split, make ranks share rows with their neighbours."""

    x: WindowTensor
    weight: WindowTensor
    y: WindowTensor
    shared: Sequence[str]
    strides: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int
    blocked: bool
    on_cuda: bool
    biased: bool = False

    @property
    def depthwise(self) -> bool:
        return self.groups == self.x.sizes[1] == self.y.sizes[1]

    def forward(self) -> tuple[Workspace, ...]:
        """What the operator allocates."""
        if self.on_cuda:
            return ()
        if self.blocked:
            return (
                (self.y.times(2),) if self.transposed else (self.x.times(), self.weight.times(), self.y.times(stage=1))
            )
        if self.groups == 1:
            return tuple(self._columns())
        return (*self._columns(), self.x.times(1 / self.groups), self.y.times(stage=1))

    def backward(self) -> tuple[Workspace, ...]:
        """What its backward allocates."""
        if self.on_cuda:
            return ()
        if self.blocked:
            strided = any(n > 1 for n in self.strides) and math.prod(self.weight.sizes[2:]) > 1 and not self.transposed
            first = [self.y.times(), *([] if self.groups > 1 and not self.depthwise else [self.x.times()])]
            return (*first, self.x.times(2.0, stage=1) if strided else self.weight.times(stage=1))
        columns = self._columns(one_image=self.transposed)
        if self.groups == 1:
            return tuple(columns)
        group = [side.times(1 / self.groups) for side in (self.x, self.y)]
        return (*columns, *group, self.x.times(stage=1), self.weight.times(stage=1))

    def forward_in_parts(self) -> tuple[Workspace, ...]:
        """What the body allocates: with the rows of neighbours, an operand is copied; of a transposed call, the result
        has theirs, and the bias is added to a copy."""
        if self.transposed:
            copied = [self.y.times(stage=2)] if self.biased else self._copied(self.y, 2)
            return (*self.forward(), *copied)
        return (*self._copied(self.x, 0), *self.forward(), *self._copied(self.x, 1))

    def backward_in_parts(self) -> tuple[Workspace, ...]:
        """The same of backward: the gradient that has rows of neighbours is there beside that which has not."""
        if self.transposed:
            return (*self._copied(self.y, 0), *self.backward(), *self._copied(self.y, 1))
        copied = [one for stage in (0, 1, 2, 2) for one in self._copied(self.x, stage)]
        return (*copied, *self.backward())

    def _copied(self, side: WindowTensor, stage: int) -> list[Workspace]:
        """A copy of a side, with the rows of neighbours."""
        return [side.times(beside=(name,), stage=stage) for name in self.shared]

    def _columns(self, one_image: bool = False) -> list[Workspace]:
        """The matrix of windows: of all images, but of one where windows have gaps."""
        kernel = self.weight.sizes[2:]
        dilated = any(n > 1 for n in self.dilation)
        if not dilated and not self.transposed and {*kernel, *self.strides} == {1} and not any(self.padding):
            return []
        wide, narrow = (self.y, self.x) if self.transposed else (self.x, self.y)
        first = 1 if one_image or dilated else 0  # the dim from which on the matrix has all
        sizes, words = [*wide.sizes[first:2], *narrow.sizes[2:]], [*wide.words[first:2], *narrow.words[2:]]
        return [WindowTensor(sizes, words, wide.points, wide.itemsize).times(math.prod(kernel) / self.groups)]
