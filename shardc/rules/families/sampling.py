"""Interpolation between grid points: samples are independent, and the space of the input stays whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardc.rules.notation import Rule, parse, rule

aten = torch.ops.aten


def _texts(x: torch.Tensor, grid: torch.Tensor) -> tuple[str, str, str]:
    """Rule texts of the input, of the grid, and of the samples. Batch, channels and the places of samples split
    freely."""
    batch, channels, *space = (int(n) for n in x.shape)
    places = [int(n) for n in grid.shape[1:-1]]

    def text(*named: tuple[str, int]) -> str:
        return " ".join(name if size != 1 else "1" for name, size in named)

    rows = [(f"y{i}", n) for i, n in enumerate(places)]
    whole = [(f"x{i}!", n) for i, n in enumerate(space)]
    return (
        text(("n", batch), ("c", channels), *whole),
        text(("n", batch), *rows, ("t!", len(places))),
        text(("n", batch), ("c", channels), *rows),
    )


@rule(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(x: torch.Tensor, grid: torch.Tensor, *_: object) -> Rule:
    source, points, samples = _texts(x, grid)
    return parse(f"{source}, {points} -> {samples}", [{0}])


@rule(aten.grid_sampler_2d_backward.default, aten.grid_sampler_3d_backward.default)
def grid_sampler_backward(
    grad: torch.Tensor, x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, corners: bool,
    mask: Sequence[bool] = (True, True),
) -> Rule:  # fmt: skip
    """The gradient of the input sums over samples, that of the grid over channels. torch always computes the latter."""
    del grad, mode, padding, corners
    source, points, samples = _texts(x, grid)
    results = f"{source if mask[0] else '_'}, {points}"
    return parse(f"{samples}, {source}, {points} -> {results}", [{0}], reads=[{0, 2}, {0, 1, 2}])
