"""Convolution and pooling along dims that the mesh splits evenly, each over one axis.

A rank sends only the rows that windows of the neighbouring parts see (the halo). Part `h0` is of the first spatial dim,
`h1` of the second, `g` of the groups of a convolution. Shapes are torch's: `[batch, channels, *space]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.widening import widened

__all__ = [
    "avg_pool2d",
    "avg_pool2d_backward",
    "avg_pool3d",
    "avg_pool3d_backward",
    "convolution",
    "convolution_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool3d",
    "max_pool3d_backward",
]

aten = torch.ops.aten
Ints = int | Sequence[int]


@dataclass(frozen=True)
class Window:
    """Output row y sees the input rows `y * stride - padding + k * dilation` for k below `kernel`."""

    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    @property
    def reach(self) -> int:
        """The number of rows from the first to the last that an output sees."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def before(self) -> int:
        """Rows of the previous part that a part's outputs see, if the input has `stride` times the rows of the
        output."""
        return self.padding

    @property
    def after(self) -> int:
        """Rows of the next part that a part's outputs see."""
        return max(self.reach - self.stride - self.padding, 0)

    @property
    def spare(self) -> int:
        """Rows at the end of a part that none of its outputs sees, because strides may be longer than windows."""
        return max(self.padding + self.stride - self.reach, 0)

    def counts(self, size: int, out: int) -> list[int]:
        """The numbers of even parts of `size` input rows and `out` output rows in which only neighbours share windows.

        Empty unless the input has `stride` times the rows of the output: else the parts of the two drift apart.
        """
        if size != self.stride * out:
            return []
        return [n for n in range(2, out + 1) if out % n == 0 and max(self.before, self.after) <= size // n]

    def extended(self, x: Tensor, dim: int, part: Part, fill: float) -> Tensor:
        """The part's input rows, between the rows of its neighbours that it sees. Beyond the ends, rows hold `fill`."""
        pieces = [x]
        if self.before:
            rows = part.shifted(x.narrow(dim, x.shape[dim] - self.before, self.before), 1)
            pieces.insert(0, torch.full_like(rows, fill) if part.index == 0 else rows)
        if self.after:
            rows = part.shifted(x.narrow(dim, 0, self.after), -1)
            pieces.append(torch.full_like(rows, fill) if part.index == part.count - 1 else rows)
        return torch.cat(pieces, dim) if len(pieces) > 1 else x

    def folded(self, x: Tensor, dim: int, part: Part) -> Tensor:
        """The transpose of `extended`: rows of the neighbours are added to theirs; rows beyond the ends are dropped."""
        if not self.before and not self.after:
            return x
        chunk = x.shape[dim] - self.before - self.after
        result = x.narrow(dim, self.before, chunk).clone()
        if self.before:
            rows = x.narrow(dim, 0, self.before)
            rows = part.shifted(torch.zeros_like(rows) if part.index == 0 else rows, -1)
            result.narrow(dim, chunk - self.before, self.before).add_(rows)
        if self.after:
            rows = x.narrow(dim, self.before + chunk, self.after)
            rows = part.shifted(torch.zeros_like(rows) if part.index == part.count - 1 else rows, 1)
            result.narrow(dim, 0, self.after).add_(rows)
        return result


class _Windows:
    """The windows of one call over its last `rank` dims, some of which are split."""

    def __init__(
        self, rank: int, parts: Mapping[str, Part], kernel: Ints, stride: Ints, padding: Ints, dilation: Ints = 1
    ) -> None:
        self.kernel, self.stride, self.padding, self.dilation = (
            each(setting, rank) for setting in (kernel, stride or kernel, padding, dilation)
        )
        settings = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        self.windows = [Window(*one) for one in settings]
        """One for each dim, so that dim -1 is the last of them."""
        self.split = {int(name[1:]) - rank: part for name, part in parts.items() if name[0] == "h"}
        """Parts by dim, counted from the end."""
        self.local = [0 if i - rank in self.split else p for i, p in enumerate(self.padding)]
        """The padding of the local call, by dim: none along a split dim, where `extended` adds it."""

    def extended(self, x: Tensor, fill: float = 0) -> Tensor:
        """The operand with exactly the rows that the rank's outputs see."""
        for dim, part in sorted(self.split.items()):
            x = self.windows[dim].extended(x, dim % x.dim(), part, fill)
        for dim in self.split:
            x = x.narrow(dim, 0, x.shape[dim] - self.windows[dim].spare)
        return x

    def folded(self, x: Tensor) -> Tensor:
        """The transpose of `extended`: every rank gets the sum of all ranks' values for the rows that it holds."""
        for dim in self.split:
            if self.windows[dim].spare:  # torch pads by nothing with a copy
                x = torch.nn.functional.pad(x, [0, 0] * (-1 - dim) + [0, self.windows[dim].spare])
        for dim, part in sorted(self.split.items(), reverse=True):
            x = self.windows[dim].folded(x, dim % x.dim(), part)
        return x

    def shape(self, x: Tensor) -> list[int]:
        """The shape of `extended(x)`."""
        sizes = list(x.shape)
        for dim in self.split:
            window = self.windows[dim]
            sizes[dim] += window.before + window.after - window.spare
        return sizes

    def divisor(self, shape: Sequence[int], out: Tensor, padded: bool, override: int | None) -> Tensor | int:
        """The divisors of average pooling over an input of local `shape`; `override` is the divisor that the caller
        set."""
        if override is not None:
            return override
        result = torch.ones((), dtype=out.dtype, device=out.device)
        for dim, window in zip(range(-len(self.windows), 0), self.windows, strict=True):
            part, rows = self.split.get(dim), out.shape[dim]
            size = part.count * shape[dim] if part else shape[dim]
            start = torch.arange(rows, device=out.device) + (part.index * rows if part else 0)
            start = start * window.stride - window.padding
            end = (start + window.kernel).clamp(max=size + window.padding)
            count = end - start if padded else end.clamp(max=size) - start.clamp(min=0)
            result = result * count.view([-1] + [1] * (-1 - dim))
        return result

    def first(self, dim: int, size: int) -> int:
        """The global index of the first row of `extended`, if the rank holds `size` rows."""
        return self.split[dim].index * size - self.windows[dim].before if dim in self.split else 0


def each(numbers: Ints, rank: int) -> list[int]:
    """One number for each of `rank` dims; like torch, `each` accepts one number for all."""
    listed = [numbers] if isinstance(numbers, int) else list(numbers)
    return listed if len(listed) == rank else listed * rank


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, transposed: bool,
    output_padding: Ints, groups: int, **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.convolution`. If it is transposed, its windows are over the output."""
    rank = x.dim() - 2
    windows = _Windows(rank, parts, weight.shape[2:], stride, padding, dilation)
    groups //= parts["g"].count if "g" in parts else 1
    if not transposed:
        more = (windows.stride, windows.local, windows.dilation, False, output_padding, groups)
        return aten.convolution(windows.extended(x), weight, bias, *more)
    added = [0 if i - rank in windows.split else n for i, n in enumerate(each(output_padding, rank))]
    more = (windows.stride, windows.local, windows.dilation, True, added, groups)
    result = windows.folded(aten.convolution(x, weight, None, *more))
    return result if bias is None else result + bias.view([-1] + [1] * rank)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Ints, padding: Ints,
    dilation: Ints, transposed: bool, output_padding: Ints, groups: int, mask: Sequence[bool], **parts: Part,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`aten.convolution_backward`. If space is split, the gradients of weight and bias are the rank's addends."""
    rank = x.dim() - 2
    windows = _Windows(rank, parts, weight.shape[2:], stride, padding, dilation)
    groups //= parts["g"].count if "g" in parts else 1
    added = [0 if i - rank in windows.split else n for i, n in enumerate(each(output_padding, rank))]
    more = (windows.stride, windows.local, windows.dilation, transposed, added, groups)
    grad_bias = grad.sum([0, *range(2, x.dim())]) if mask[2] else None
    if transposed:
        wide = [mask[0], mask[1], False]
        grad_x, grad_weight, _ = aten.convolution_backward(windows.extended(grad), x, weight, None, *more, wide)
        return grad_x if mask[0] else None, grad_weight if mask[1] else None, grad_bias
    # the gradient of x reads only the shape of x
    seen = windows.extended(x) if mask[1] else x.new_empty(windows.shape(x))
    grad_x, grad_weight, _ = aten.convolution_backward(grad, seen, weight, None, *more, [mask[0], mask[1], False])
    return windows.folded(grad_x) if mask[0] else None, grad_weight if mask[1] else None, grad_bias


def max_pool2d(
    x: Tensor, kernel: Ints, stride: Ints = (), padding: Ints = 0, dilation: Ints = 1, ceil: bool = False,
    **parts: Part,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`aten.max_pool2d_with_indices`."""
    return _max_pool(aten.max_pool2d_with_indices, _Windows(2, parts, kernel, stride, padding, dilation), x, ceil)


def max_pool3d(
    x: Tensor, kernel: Ints, stride: Ints = (), padding: Ints = 0, dilation: Ints = 1, ceil: bool = False,
    **parts: Part,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`aten.max_pool3d_with_indices`."""
    return _max_pool(aten.max_pool3d_with_indices, _Windows(3, parts, kernel, stride, padding, dilation), x, ceil)


def _max_pool(pool: Callable[..., Any], windows: _Windows, x: Tensor, ceil: bool) -> tuple[Tensor, Tensor]:
    """Indices count the elements of the global plane. If a window sees only -inf, torch returns its first index."""
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    seen, rank = windows.extended(x, lowest), len(windows.kernel)
    values, places = pool(seen, windows.kernel, windows.stride, windows.local, windows.dilation, ceil)
    local = _unraveled(places, seen.shape[-rank:])
    number = torch.zeros_like(places)
    for dim, place in zip(range(-rank, 0), local, strict=True):
        size = x.shape[dim] * (windows.split[dim].count if dim in windows.split else 1)
        number = number * size + (place + windows.first(dim, x.shape[dim])).clamp(min=0)
    return values, number


def max_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil: bool, indices: Tensor,
    **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.max_pool2d_with_indices_backward`."""
    return _max_pool_backward(grad, x, _Windows(2, parts, kernel, stride, padding, dilation), indices)


def max_pool3d_backward(
    grad: Tensor, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil: bool, indices: Tensor,
    **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.max_pool3d_with_indices_backward`."""
    return _max_pool_backward(grad, x, _Windows(3, parts, kernel, stride, padding, dilation), indices)


def _max_pool_backward(grad: Tensor, x: Tensor, windows: _Windows, indices: Tensor) -> Tensor:
    rank, shape = len(windows.kernel), windows.shape(x)
    sizes = [x.shape[d] * (windows.split[d].count if d in windows.split else 1) for d in range(-rank, 0)]
    number = torch.zeros_like(indices)
    for dim, place in zip(range(-rank, 0), _unraveled(indices, sizes), strict=True):
        local = place - windows.first(dim, x.shape[dim])
        # an index into the padding of another dim is out of range
        number = number * shape[dim] + local.clamp(0, shape[dim] - 1)
    result = grad.new_zeros(shape)
    flat = result.flatten(-rank).scatter_add(-1, number.flatten(-rank), grad.flatten(-rank))
    return windows.folded(flat.view(shape))


def _unraveled(places: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    indices: list[Tensor] = []
    for size in reversed(sizes):
        indices.insert(0, places % size)
        places = torch.div(places, size, rounding_mode="floor")
    return indices


def avg_pool2d(
    x: Tensor, kernel: Ints, stride: Ints = (), padding: Ints = 0, ceil: bool = False, padded: bool = True,
    divisor: int | None = None, **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.avg_pool2d`. With `padded`, the average counts the zeros of the padding."""
    return _avg_pool(aten.avg_pool2d, _Windows(2, parts, kernel, stride, padding), x, ceil, padded, divisor)


def avg_pool3d(
    x: Tensor, kernel: Ints, stride: Ints = (), padding: Ints = 0, ceil: bool = False, padded: bool = True,
    divisor: int | None = None, **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.avg_pool3d`. With `padded`, the average counts the zeros of the padding."""
    return _avg_pool(aten.avg_pool3d, _Windows(3, parts, kernel, stride, padding), x, ceil, padded, divisor)


def _avg_pool(
    pool: Callable[..., Tensor], windows: _Windows, x: Tensor, ceil: bool, padded: bool, divisor: int | None
) -> Tensor:
    wide = widened(x)
    total = pool(windows.extended(wide), windows.kernel, windows.stride, windows.local, ceil, True, 1)
    return (total / windows.divisor(x.shape, total, padded, divisor)).to(x.dtype)


def avg_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil: bool, padded: bool, divisor: int | None,
    **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.avg_pool2d_backward`."""
    windows = _Windows(2, parts, kernel, stride, padding)
    return _avg_pool_backward(aten.avg_pool2d_backward, windows, grad, x, ceil, padded, divisor)


def avg_pool3d_backward(
    grad: Tensor, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil: bool, padded: bool, divisor: int | None,
    **parts: Part,
) -> Tensor:  # fmt: skip
    """`aten.avg_pool3d_backward`."""
    windows = _Windows(3, parts, kernel, stride, padding)
    return _avg_pool_backward(aten.avg_pool3d_backward, windows, grad, x, ceil, padded, divisor)


def _avg_pool_backward(
    pool: Callable[..., Tensor], windows: _Windows, grad: Tensor, x: Tensor, ceil: bool, padded: bool,
    divisor: int | None,
) -> Tensor:  # fmt: skip
    spread = grad / windows.divisor(x.shape, grad, padded, divisor)
    like = spread.new_empty(windows.shape(x))
    gradient = pool(spread, like, windows.kernel, windows.stride, windows.local, ceil, True, 1)
    return windows.folded(gradient)
