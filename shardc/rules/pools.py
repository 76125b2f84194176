"""Pools of other kinds than window.py's: batch and channels split, space stays whole.

Those that take indices as operands look them up without a check, so none of them may be left to a trial on made-up
inputs."""

from __future__ import annotations

from typing import Any

import torch

from shardc.rules.notation import Rule, letters, parse, rule

aten = torch.ops.aten
_PLANES = {
    aten.adaptive_max_pool2d.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool3d.default: 3,
    aten.adaptive_max_pool2d_backward.default: 2,
    aten.max_pool3d_with_indices_backward.default: 3,
    aten.adaptive_max_pool3d_backward.default: 3,
    aten.fractional_max_pool2d_backward.default: 2,
    aten.fractional_max_pool3d_backward.default: 3,
}
"""Pools with indices, and the number of their spatial dims."""


def _space(x: torch.Tensor, spatial: int, name: str) -> str:
    """The operand's dims before space, then spatial ones called so."""
    batch = letters(x)[: x.dim() - spatial]
    return " ".join([*batch, *(f"{name}{i}!" if n != 1 else "1" for i, n in enumerate(x.shape[x.dim() - spatial :]))])


def _made(x: torch.Tensor, spatial: int) -> str:
    """The dims of a result of which only the batch is known; sizes of one are none to split, whatever they are."""
    return " ".join([*letters(x)[: x.dim() - spatial], *(f"y{i}!" for i in range(spatial))])


def _forward(spatial: int) -> Any:
    def maker(x: torch.Tensor, *_: Any) -> Rule:
        return parse(f"{_space(x, spatial, 'x')} -> {_made(x, spatial)}, {_made(x, spatial)}")

    return maker


def _backward(spatial: int) -> Any:
    def maker(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> Rule:
        made = _space(grad, spatial, "y")
        return parse(f"{made}, {_space(x, spatial, 'x')}, {made} -> {_space(x, spatial, 'x')}", [{0}])

    return maker


for _operator, _spatial in _PLANES.items():
    rule(_operator)((_backward if "backward" in _operator._schema.name else _forward)(_spatial))


@rule(aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default)
def fractional_max_pool(x: torch.Tensor, kernel: Any, *given: Any) -> Rule:
    """The samples say where windows begin, per picture and channel; one picture may come without a batch dim."""
    spatial, batch = len(kernel), letters(x)[: x.dim() - len(kernel)]
    samples = " ".join([*(["1"] * (2 - len(batch))), *batch, "s!"])
    made = _made(x, spatial)
    return parse(f"{_space(x, spatial, 'x')}, {samples} -> {made}, {made}")


@rule(aten.max_unpool2d.default, aten.max_unpool3d.default)
def max_unpool(x: torch.Tensor, indices: torch.Tensor, size: Any, *_: Any) -> Rule:
    before = _space(x, len(size), "x")
    return parse(f"{before}, {before} -> {_made(x, len(size))}", [{0}])


@rule(aten.avg_pool3d.default, aten._adaptive_avg_pool3d.default)
def avg_pool3d(x: torch.Tensor, *_: Any) -> Rule:
    return parse(f"{_space(x, 3, 'x')} -> {_made(x, 3)}", [{0}])


@rule(aten.avg_pool3d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def avg_pool3d_backward(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> Rule:
    """Linear in the gradient; of the input only the shape is read."""
    return parse(f"{_space(grad, 3, 'y')}, {_space(x, 3, 'x')} -> {_space(x, 3, 'x')}", [{0}])
