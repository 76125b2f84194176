"""Convolution: batch, channels, groups and space split. Along split space, ranks send rows to their neighbours.

A spatial dim splits if the input has `stride` times the rows of the output, so that parts of both stay aligned. It
splits evenly, over one axis, into parts that are no smaller than the rows that neighbours share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shardc.rules.families.window_workspace import BLOCKED, Convolution, WindowTensor
from shardc.rules.notation import ONLY, Rule, Send, Size, Variant, letters, parse, rule
from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels import windows as bodies
from shardc.runtime.kernels.windows import Ints, Window, each

aten = torch.ops.aten


def _one(size: int, name: str) -> str:
    return name if size != 1 else "1"


@dataclass(frozen=True)
class Space:
    """The spatial dims of one call: sizes of the side that windows run over (`wide`), and of the other (`narrow`)."""

    wide: Sequence[int]
    narrow: Sequence[int]
    windows: Sequence[Window]

    @property
    def parts(self) -> dict[str, list[int]]:
        """The dims that may be split, with the allowed numbers of parts."""
        sizes = zip(self.windows, self.wide, self.narrow, strict=True)
        counts = {f"h{i}": window.counts(int(size), int(out)) for i, (window, size, out) in enumerate(sizes)}
        return {name: numbers for name, numbers in counts.items() if numbers}

    def names(self, sizes: Sequence[int], name: str, reduced: str = "") -> list[str]:
        """Rule text of one side, dim by dim. Dims that stay whole are called `name` with their number."""
        split = self.parts
        return [
            f"h{i}{reduced}~" if f"h{i}" in split else _one(int(size), f"{name}{i}!") for i, size in enumerate(sizes)
        ]

    def sends(self, around: Sequence[str], itemsize: int, scale: int = 1) -> dict[str, list[Send]]:
        """The collectives by which a body extends or folds the wide side: `scale` elements a row, for each point of
        `around`.

        Dims are extended one after the other. The rows of a later dim include the halo of the earlier ones.
        """
        result: dict[str, list[Send]] = {name: [] for name in self.parts}
        shared = {name: self.windows[int(name[1:])] for name in result}
        whole = [f"x{i}" for i, n in enumerate(self.wide) if n != 1 and f"h{i}" not in result]
        kept = tuple(name for name in (*around, *whole) if name != "1")
        for name, window in shared.items():
            earlier = [other for other in shared if other < name]
            for extended in (s for n in range(len(earlier) + 1) for s in itertools.combinations(earlier, n)):
                others = [other for other in shared if other != name and other not in extended]
                elements = scale * math.prod(shared[other].stride for other in others)
                elements *= math.prod(shared[other].before + shared[other].after for other in extended)
                for rows in (window.before, window.after):
                    if rows * elements:
                        factors = (*kept, *others)
                        result[name].append(Send(permute, factors, itemsize, rows * elements, beside=extended))
        return result


@dataclass(frozen=True)
class _Channels:
    """Names of the input channels `c`, the output channels `o`, and the weight's two channel dims.

    `parts` are the allowed numbers of parts of groups. `inputs` and `outputs` are the channels for each point of the
    channels' factor.
    """

    c: str
    o: str
    first: str
    second: str
    parts: dict[str, list[int]]
    inputs: int = 1
    outputs: int = 1

    @property
    def depthwise(self) -> bool:
        return self.c == "g"


def _channels(x: torch.Tensor, weight: torch.Tensor, transposed: bool, groups: int) -> _Channels:
    inputs, outputs = int(x.shape[1]), _outputs(weight, transposed, groups)
    if groups == 1:
        c, o = _one(inputs, "c"), _one(outputs, "o")
        return _Channels(c, o, *((c, o) if transposed else (o, c)), {})
    if groups == inputs == outputs:  # depthwise: all channel dims are one factor, which is also the number of groups
        return _Channels("g", "g", "g", "1", {})
    # else the body splits the groups: channel dims of different sizes are split alike
    parts, common = {"g": [n for n in range(2, groups + 1) if groups % n == 0]}, math.gcd(inputs, outputs)
    second = _one(int(weight.shape[1]), "u!")
    return _Channels("g~", "g~", "g~", second, parts, inputs // common, outputs // common)


def _convolved(
    x: torch.Tensor, weight: torch.Tensor, out: Sequence[int], stride: Ints, padding: Ints, dilation: Ints,
    transposed: bool,
) -> Space:  # fmt: skip
    rank = x.dim() - 2
    settings = (each(setting, rank) for setting in (weight.shape[2:], stride, padding, dilation))
    windows = [Window(*one) for one in zip(*settings, strict=True)]
    return Space(out, x.shape[2:], windows) if transposed else Space(x.shape[2:], out, windows)


def _kernel(weight: torch.Tensor) -> str:
    return " ".join(_one(int(n), f"k{i}!") for i, n in enumerate(weight.shape[2:]))


def _products(n: str, channels: _Channels, weight: torch.Tensor, narrow: list[str]) -> list[str]:
    """The matrix products: the weight, once for every row of the narrow side."""
    kept, count = [n, channels.o, channels.second, *narrow], channels.outputs
    if channels.first == channels.c:
        kept = [n, channels.c, channels.second, *narrow]
        count = channels.inputs
    names = " ".join(kept + _kernel(weight).split())
    return [" ".join(name.split(":")[0].rstrip("!~") for name in names.split() if name != "1")] * count


Sized = tuple[Sequence[int], list[str]]
"""The sizes of a tensor, and the words of its dims."""


def _call(
    x: torch.Tensor, weight: torch.Tensor, sides: tuple[Sized, Sized], space: Space, channels: _Channels, stride: Ints,
    padding: Ints, dilation: Ints, transposed: bool, groups: int,
) -> Convolution:  # fmt: skip
    """What its workspace depends on; `sides` are those of x and of the result."""
    rank, windows = x.dim() - 2, {name: space.windows[int(name[1:])] for name in space.parts}
    points = {name: int(space.narrow[int(name[1:])]) for name in windows}
    if channels.parts:  # of groups
        points["g"] = math.gcd(int(x.shape[1]), int(sides[1][0][1]))
    size = x.element_size()
    made = [WindowTensor([int(n) for n in sizes], words, points, size) for sizes, words in sides]
    words = [channels.first, channels.second, *_kernel(weight).split()]
    table = WindowTensor([int(n) for n in weight.shape], words, points, size)
    strides, padded, dilated = (each(setting, rank) for setting in (stride, padding, dilation))
    asked = *map(int, weight.shape[2:]), *strides, *dilated
    # of one thread, torch runs windows of one element as products of matrices
    product = x.dtype == torch.float32 and {*asked} == {1} and x.shape[0] < 16 and torch.get_num_threads() == 1
    kind = x.dtype in BLOCKED and not product, x.device.type == "cuda"
    shared = [name for name, window in windows.items() if window.before or window.after]
    return Convolution(made[0], table, made[1], shared, strides, padded, dilated, transposed, groups, *kind)


def _outputs(weight: torch.Tensor, transposed: bool, groups: int) -> int:
    return int(weight.shape[1] * groups if transposed else weight.shape[0])


@rule(aten.convolution.default)
def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    transposed: bool, output_padding: Ints, groups: int,
) -> Rule:  # fmt: skip
    metas = (torch.empty(t.shape, device="meta") for t in (x, weight))
    out = aten.convolution(*metas, None, stride, padding, dilation, transposed, output_padding, groups).shape[2:]
    space, channels = (
        _convolved(x, weight, out, stride, padding, dilation, transposed),
        _channels(x, weight, transposed, groups),
    )
    n, names = _one(int(x.shape[0]), "n"), ("y", "x") if transposed else ("x", "y")
    before, after = space.names(x.shape[2:], names[0]), space.names(out, names[1])
    c, o = channels.c, channels.o
    text = f"{n} {c} {' '.join(before)}, {channels.first} {channels.second} {_kernel(weight)}"
    text += f"{f', {o}' if bias is not None else ''} -> {n} {o} {' '.join(after)}"
    wide, scale = (o, channels.outputs) if transposed else (c, channels.inputs)
    sides = (x.shape, [n, c, *before]), ((int(x.shape[0]), _outputs(weight, transposed, groups), *out), [n, o, *after])
    of = _call(x, weight, sides, space, channels, stride, padding, dilation, transposed, groups)
    body = Variant(
        ONLY, bodies.convolution, space.sends((n, wide.rstrip("~")), x.element_size(), scale),
        workspace=replace(of, biased=bias is not None).forward_in_parts(),
    )  # fmt: skip
    return parse(
        text, [{0, 2}, {1, 2}] if bias is not None else [{0}, {1}], sizes={8: "g"} if channels.depthwise else {},
        flops=_products(n, channels, weight, before if transposed else after), variants=[body],
        parts={**space.parts, **channels.parts}, workspace=of.forward(),
    )  # fmt: skip


@rule(aten.convolution_backward.default)
def convolution_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: Sequence[int] | None, stride: Ints,
    padding: Ints, dilation: Ints, transposed: bool, output_padding: Ints, groups: int, mask: Sequence[bool],
) -> Rule:  # fmt: skip
    """The gradient of x reads grad and weight; that of the weight, grad and x; that of the bias, only grad."""
    del output_padding
    space = _convolved(x, weight, grad.shape[2:], stride, padding, dilation, transposed)
    channels, n = _channels(x, weight, transposed, groups), _one(int(x.shape[0]), "n")
    names = ("y", "x") if transposed else ("x", "y")
    inner, outer = space.names(x.shape[2:], names[0], ":sum"), space.names(grad.shape[2:], names[1], ":sum")
    inputs, outputs = f"{n} {channels.c} {' '.join(inner)}", f"{n} {channels.o} {' '.join(outer)}"
    table = f"{channels.first} {channels.second} {_kernel(weight)}"
    results = [inputs if mask[0] else "_", table if mask[1] else "_", channels.o if mask[2] else "_"]
    sizes: dict[int, Size] = {9: "g"} if channels.depthwise else {}
    if bias_sizes:
        sizes[3] = 2 if mask[2] else (channels.o if channels.o in ("o", "g") else int(bias_sizes[0]),)
    wide, scale = (channels.o, channels.outputs) if transposed else (channels.c, channels.inputs)
    once = space.sends((n, wide.rstrip("~")), x.element_size(), scale)
    times = 1 if transposed else int(mask[0]) + int(mask[1])
    products = _products(n, channels, weight, inner if transposed else outer)
    sides = (x.shape, [n, channels.c, *inner]), (grad.shape, [n, channels.o, *outer])
    of = _call(x, weight, sides, space, channels, stride, padding, dilation, transposed, groups)
    body = Variant(
        ONLY, bodies.convolution_backward, {name: sent * times for name, sent in once.items()},
        workspace=of.backward_in_parts(),
    )  # fmt: skip
    return parse(
        f"{outputs}, {inputs}, {table} -> {', '.join(results)}", [{0}], reads=[{0, 2}, {0, 1}, {0}], sizes=sizes,
        flops=products * 2, variants=[body], parts={**space.parts, **channels.parts}, workspace=of.backward(),
    )  # fmt: skip


def _resampled(x: torch.Tensor) -> tuple[str, str]:
    """Rule texts of an operand and of a result with the same batch and channels."""
    names = letters(x)
    whole = " ".join(f"{n}!" if n != "1" else n for n in names[2:])
    return f"{' '.join(names[:2])} {whole}", " ".join([*names[:2], *(f"y{i}!" for i in range(len(names) - 2))])


_UPSAMPLES = (
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_trilinear3d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
)  # fmt: skip


@rule(*(packet.vec for packet in _UPSAMPLES), *(packet.default for packet in _UPSAMPLES))
def upsample(x: torch.Tensor, *_: object) -> Rule:
    before, after = _resampled(x)
    return parse(f"{before} -> {after}", [{0}])


_UPSAMPLES_BACKWARD = (
    aten.upsample_nearest1d_backward, aten.upsample_nearest2d_backward, aten.upsample_nearest3d_backward,
    aten._upsample_nearest_exact1d_backward, aten._upsample_nearest_exact2d_backward,
    aten._upsample_nearest_exact3d_backward, aten.upsample_linear1d_backward, aten.upsample_bilinear2d_backward,
    aten.upsample_trilinear3d_backward, aten.upsample_bicubic2d_backward, aten._upsample_bilinear2d_aa_backward,
    aten._upsample_bicubic2d_aa_backward,
)  # fmt: skip


@rule(*(packet.default for packet in _UPSAMPLES_BACKWARD))
def upsample_backward(grad: torch.Tensor, *_: object) -> Rule:
    before, after = _resampled(grad)
    return parse(f"{before} -> {after}", [{0}], sizes={2: 0})
