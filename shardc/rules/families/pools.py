"""Pooling: batch and channels split. Space splits if its windows are regular, as in window.py; else it stays whole.

Every pool with index operands needs a rule here. Their kernels do not check the indices, so a trial on made-up inputs
could crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardc.rules.families.window import Space
from shardc.rules.notation import Body, Rule, letters, parse, rule
from shardc.runtime.kernels import windows as bodies
from shardc.runtime.kernels.windows import Ints, Window, each

aten = torch.ops.aten
_PLANES = {
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.adaptive_max_pool2d_backward.default: 2,
    aten.adaptive_max_pool3d_backward.default: 3,
    aten.fractional_max_pool2d_backward.default: 2,
    aten.fractional_max_pool3d_backward.default: 3,
}
"""Pools with indices and irregular windows, with the number of their spatial dims."""


def _space(x: torch.Tensor, spatial: int, name: str) -> str:
    """Rule text of `x`: the dims before space, then `spatial` whole dims called `name`."""
    batch = letters(x)[: x.dim() - spatial]
    return " ".join([*batch, *(f"{name}{i}!" if n != 1 else "1" for i, n in enumerate(x.shape[x.dim() - spatial :]))])


def _result(x: torch.Tensor, spatial: int) -> str:
    """Rule text of a result with the batch dims of `x` and `spatial` whole dims of unknown size."""
    return " ".join([*letters(x)[: x.dim() - spatial], *(f"y{i}!" for i in range(spatial))])


def _forward(spatial: int) -> Any:
    def maker(x: torch.Tensor, *_: Any) -> Rule:
        return parse(f"{_space(x, spatial, 'x')} -> {_result(x, spatial)}, {_result(x, spatial)}")

    return maker


def _backward(spatial: int) -> Any:
    def maker(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> Rule:
        gradient = _space(grad, spatial, "y")
        return parse(f"{gradient}, {_space(x, spatial, 'x')}, {gradient} -> {_space(x, spatial, 'x')}", [{0}])

    return maker


for _operator, _spatial in _PLANES.items():
    rule(_operator)((_backward if "backward" in _operator._schema.name else _forward)(_spatial))


@rule(aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default)
def fractional_max_pool(x: torch.Tensor, kernel: Any, *rest: Any) -> Rule:
    """The samples say where windows begin, for each image and channel. A single image may have no batch dim."""
    spatial, batch = len(kernel), letters(x)[: x.dim() - len(kernel)]
    samples = " ".join([*(["1"] * (2 - len(batch))), *batch, "s!"])
    result = _result(x, spatial)
    return parse(f"{_space(x, spatial, 'x')}, {samples} -> {result}, {result}")


@rule(aten.max_unpool2d.default, aten.max_unpool3d.default)
def max_unpool(x: torch.Tensor, indices: torch.Tensor, size: Any, *_: Any) -> Rule:
    before = _space(x, len(size), "x")
    return parse(f"{before}, {before} -> {_result(x, len(size))}", [{0}])


def _adaptive_avg_pool(spatial: int) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, *_: Any) -> Rule:
        return parse(f"{_space(x, spatial, 'x')} -> {_result(x, spatial)}", [{0}])

    return maker


def _adaptive_avg_pool_backward(spatial: int) -> Callable[..., Rule]:
    """Linear in the gradient; reads only the shape of the input."""

    def maker(grad: torch.Tensor, x: torch.Tensor) -> Rule:
        return parse(f"{_space(grad, spatial, 'y')}, {_space(x, spatial, 'x')} -> {_space(x, spatial, 'x')}", [{0}])

    return maker


rule(aten._adaptive_avg_pool2d.default)(_adaptive_avg_pool(2))
rule(aten._adaptive_avg_pool3d.default)(_adaptive_avg_pool(3))
rule(aten._adaptive_avg_pool2d_backward.default)(_adaptive_avg_pool_backward(2))
rule(aten._adaptive_avg_pool3d_backward.default)(_adaptive_avg_pool_backward(3))


def _pool(
    operator: Callable[..., Any], rank: int, x: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, *more: Any
) -> tuple[Space, list[str]]:
    """The space of a pooling call, and the names of the other dims. `more` starts with the dilation, if there is
    one."""
    out = operator(torch.empty(x.shape, device="meta"), kernel, stride, padding, *more)
    out = out if isinstance(out, torch.Tensor) else out[0]
    dilation = more[0] if more and not isinstance(more[0], bool) else 1
    settings = (each(setting, rank) for setting in (kernel, stride or kernel, padding, dilation))
    windows = [Window(*one) for one in zip(*settings, strict=True)]
    return Space(x.shape[-rank:], out.shape[-rank:], windows), letters(x)[: x.dim() - rank]


def _sides(space: Space, batch: list[str]) -> tuple[str, str]:
    """Rule texts of the operand and of the result."""
    names = space.names(space.wide, "x"), space.names(space.narrow, "y")
    return " ".join([*batch, *names[0]]), " ".join([*batch, *names[1]])


def _max_pool(operator: Callable[..., Any], rank: int, body: Body) -> Callable[..., Rule]:
    def maker(
        x: torch.Tensor, kernel: Ints, stride: Ints = (), padding: Ints = 0, dilation: Ints = 1, ceil: bool = False
    ) -> Rule:
        space, batch = _pool(operator, rank, x, kernel, stride, padding, dilation, ceil)
        before, after = _sides(space, batch)
        sends = space.sends(batch, x.element_size())
        return parse(f"{before} -> {after}, {after}", body=body, sends=sends, parts=space.parts)

    return maker


def _max_pool_backward(operator: Callable[..., Any], rank: int, body: Body) -> Callable[..., Rule]:
    def maker(
        grad: torch.Tensor, x: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil: bool,
        indices: torch.Tensor,
    ) -> Rule:  # fmt: skip
        del indices
        space, batch = _pool(operator, rank, x, kernel, stride, padding, dilation, ceil)
        before, after = _sides(space, batch)
        sends = space.sends(batch, grad.element_size())
        return parse(f"{after}, {before}, {after} -> {before}", [{0}], body=body, sends=sends, parts=space.parts)

    return maker


def _avg_pool(operator: Callable[..., Any], rank: int, body: Body) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, kernel: Ints, stride: Ints = (), padding: Ints = 0, ceil: bool = False, *_: Any) -> Rule:
        space, batch = _pool(operator, rank, x, kernel, stride, padding, ceil)
        before, after = _sides(space, batch)
        sends = space.sends(batch, max(x.element_size(), 4))
        return parse(f"{before} -> {after}", [{0}], body=body, sends=sends, parts=space.parts)

    return maker


def _avg_pool_backward(operator: Callable[..., Any], rank: int, body: Body) -> Callable[..., Rule]:
    """Linear in the gradient; reads only the shape of the input."""

    def maker(
        grad: torch.Tensor, x: torch.Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil: bool, *_: Any
    ) -> Rule:
        space, batch = _pool(operator, rank, x, kernel, stride, padding, ceil)
        before, after = _sides(space, batch)
        sends = space.sends(batch, grad.element_size())
        return parse(f"{after}, {before} -> {before}", [{0}], body=body, sends=sends, parts=space.parts)

    return maker


rule(aten.max_pool2d_with_indices.default)(_max_pool(aten.max_pool2d_with_indices, 2, bodies.max_pool2d))
rule(aten.max_pool3d_with_indices.default)(_max_pool(aten.max_pool3d_with_indices, 3, bodies.max_pool3d))
rule(aten.max_pool2d_with_indices_backward.default)(
    _max_pool_backward(aten.max_pool2d_with_indices, 2, bodies.max_pool2d_backward)
)
rule(aten.max_pool3d_with_indices_backward.default)(
    _max_pool_backward(aten.max_pool3d_with_indices, 3, bodies.max_pool3d_backward)
)
rule(aten.avg_pool2d.default)(_avg_pool(aten.avg_pool2d, 2, bodies.avg_pool2d))
rule(aten.avg_pool3d.default)(_avg_pool(aten.avg_pool3d, 3, bodies.avg_pool3d))
rule(aten.avg_pool2d_backward.default)(_avg_pool_backward(aten.avg_pool2d, 2, bodies.avg_pool2d_backward))
rule(aten.avg_pool3d_backward.default)(_avg_pool_backward(aten.avg_pool3d, 3, bodies.avg_pool3d_backward))
