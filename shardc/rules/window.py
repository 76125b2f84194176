"""Convolution and pooling: batch and channels split, space stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.rules.notation import Rule, Size, letters, parse, rule

aten = torch.ops.aten


def _one(size: int, name: str) -> str:
    return name if size != 1 else "1"


def _space(x: torch.Tensor, name: str) -> str:
    return " ".join(_one(int(n), f"{name}{i}!") for i, n in enumerate(x.shape[2:]))


def _channels(x: torch.Tensor, weight: torch.Tensor, transposed: bool, groups: int) -> tuple[str, str, str, str]:
    """Names of input channels, output channels, and the weight's two channel dims."""
    inputs, outputs = int(x.shape[1]), int(weight.shape[1] * groups if transposed else weight.shape[0])
    if groups == 1:
        c, o = _one(inputs, "c"), _one(outputs, "o")
        return c, o, *((c, o) if transposed else (o, c))
    if groups == inputs == outputs:  # depthwise: one factor runs through everything, and the group count follows it
        return "g", "g", "g", "1"
    first, second = weight.shape[:2]
    return _one(inputs, "c!"), _one(outputs, "o!"), _one(int(first), "w!"), _one(int(second), "u!")


@rule(aten.convolution.default)
def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Rule:  # fmt: skip
    del stride, padding, dilation, output_padding
    c, o, w0, w1 = _channels(x, weight, transposed, groups)
    n, kernel = _one(int(x.shape[0]), "n"), _space(weight, "k")
    added = f", {o}" if bias is not None else ""
    # the output's spatial sizes are unknown here and need no names that match: they are whole
    out_space = " ".join(f"y{i}!" for i in range(x.dim() - 2))
    names = f"{n} {c} {_space(x, 'x')}, {w0} {w1} {kernel}{added} -> {n} {o} {out_space}"
    linear = [{0, 2}, {1, 2}] if bias is not None else [{0}, {1}]
    products = " ".join(name.rstrip("!") for name in f"{n} {o} {out_space} {w1} {kernel}".split() if name != "1")
    return parse(names, linear, sizes={8: "g"} if w0 == "g" else {}, flops=[products])


@rule(aten.convolution_backward.default)
def convolution_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: Sequence[int] | None, stride: Any,
    padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int, mask: Sequence[bool],
) -> Rule:  # fmt: skip
    """The gradient of x reads grad and weight, that of the weight grad and x, that of the bias grad alone."""
    del stride, padding, dilation, output_padding
    c, o, w0, w1 = _channels(x, weight, transposed, groups)
    n, kernel, space = _one(int(x.shape[0]), "n"), _space(weight, "k"), _space(x, "x")
    results = [
        f"{n} {c} {space}" if mask[0] else "_",
        f"{w0} {w1} {kernel}" if mask[1] else "_",
        o if mask[2] else "_",
    ]
    sizes: dict[int, Size] = {9: "g"} if w0 == "g" else {}
    if bias_sizes:
        sizes[3] = 2 if mask[2] else (o,)
    out_space = _space(grad, "y")
    products = " ".join(name.rstrip("!") for name in f"{n} {o} {out_space} {w1} {kernel}".split() if name != "1")
    text = f"{n} {o} {out_space}, {n} {c} {space}, {w0} {w1} {kernel} -> {', '.join(results)}"
    return parse(text, [{0}], reads=[{0, 2}, {0, 1}, {0}], sizes=sizes, flops=[products] * 2)


def _pool_names(x: torch.Tensor, batch_dims: int) -> list[str]:
    return [name if i < batch_dims or name == "1" else f"{name}!" for i, name in enumerate(letters(x))]


def _pooled(x: torch.Tensor, spatial: int) -> tuple[str, str]:
    cut = x.dim() - spatial
    names = _pool_names(x, cut)
    return " ".join(names), " ".join([*names[:cut], *(f"y{i}!" for i in range(spatial))])


@rule(aten.max_pool2d_with_indices.default)
def max_pool2d(x: torch.Tensor, *_: object) -> Rule:
    before, after = _pooled(x, 2)
    return parse(f"{before} -> {after}, {after}")


@rule(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_backward(grad: torch.Tensor, x: torch.Tensor, *given: Any) -> Rule:
    before, after = _pooled(x, 2)
    return parse(f"{after}, {before}, {after} -> {before}", [{0}])


@rule(aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def avg_pool2d(x: torch.Tensor, *_: object) -> Rule:
    before, after = _pooled(x, 2)
    return parse(f"{before} -> {after}", [{0}])


_UPSAMPLES = (
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_trilinear3d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
)  # fmt: skip


@rule(*(packet.vec for packet in _UPSAMPLES), *(packet.default for packet in _UPSAMPLES))
def upsample(x: torch.Tensor, *_: object) -> Rule:
    before, after = _pooled(x, x.dim() - 2)
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
    before, after = _pooled(grad, grad.dim() - 2)
    return parse(f"{before} -> {after}", [{0}], sizes={2: 0})


@rule(aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default)
def avg_pool2d_backward(grad: torch.Tensor, x: torch.Tensor, *_: object) -> Rule:
    """Linear in the gradient; of the input only the shape is read."""
    before, after = _pooled(x, 2)
    return parse(f"{after}, {before} -> {before}", [{0}])
