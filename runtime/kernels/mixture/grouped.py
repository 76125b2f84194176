"""Matrix products by groups of rows: `torch.nn.functional.grouped_mm` where torch has it, else one product a group.

rows     [r, n], those of group 0 first, then those of group 1, ...
weights  [groups, m, n]
counts   [groups], the rows of each group; a group may have none
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []

_ALIGNED = 16
"""Bytes of which the kernel of torch needs addresses and strides to be multiples."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class RowGroups:
    """Rows in groups, `counts` of them in each. Where the kernel runs, the counts stay on their device."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        self._ends = counts.cumsum(0, dtype=torch.int32)
        self._known: list[int] | None = None

    @property
    def sizes(self) -> list[int]:
        """The counts as numbers; a device waits for them."""
        if self._known is None:
            self._known = [int(count) for count in self.counts.tolist()]
        return self._known

    def times(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Each row times the transpose of its group's weight: `[r, m]`."""
        if not rows.shape[0]:
            return rows.new_zeros(0, weights.shape[1])
        if _has_kernel(rows, weights):
            return F.grouped_mm(rows, weights.transpose(1, 2), offs=self._ends)
        result = rows.new_empty(rows.shape[0], weights.shape[1])
        for part, out, weight in zip(rows.split(self.sizes), result.split(self.sizes), weights, strict=True):
            if part.shape[0]:
                torch.mm(part, weight.t(), out=out)
        return result

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """For each group the sum over its rows of `left` [r, m] times `right` [r, n]: `[groups, m, n]`."""
        groups, m, n = self.counts.shape[0], left.shape[1], right.shape[1]
        if not left.shape[0]:
            return left.new_zeros(groups, m, n)
        if _has_kernel(left, right.unsqueeze(0)):
            return F.grouped_mm(left.t(), right, offs=self._ends)
        result = left.new_empty(groups, m, n)
        for out, part, other in zip(result, left.split(self.sizes), right.split(self.sizes), strict=True):
            torch.mm(part.t(), other, out=out)
        return result

    def sums(self, rows: Tensor) -> Tensor:
        """For each group the sum of its rows: `[groups, n]`. A product, so that the order of the sum is fixed."""
        return self.products(rows, rows.new_ones(rows.shape[0], _ALIGNED // 2))[:, :, 0].contiguous()


def _has_kernel(*operands: Tensor) -> bool:
    """Whether torch's kernel takes these operands, each of which may be transposed."""
    first = operands[0]
    if first.dtype not in _TYPES or any(one.dtype != first.dtype for one in operands):
        return False
    if first.is_cuda and (torch.cuda.get_device_capability(first.device) < (8, 0) or first.dtype == torch.float32):
        return False
    return all(map(_aligned, operands))


def _aligned(x: Tensor) -> bool:
    inner = sorted(x.stride()[-2:])
    places = (
        x.data_ptr() if x.device.type != "meta" else 0,
        *(s * x.element_size() for s in (inner[1], *x.stride()[:-2])),
    )
    return inner[0] == 1 and all(place % _ALIGNED == 0 for place in places)
