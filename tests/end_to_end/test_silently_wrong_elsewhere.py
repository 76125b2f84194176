"""Programs whose values or gradients DTensor gets wrong without a word, in the layouts where it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from shardc.cost.hardware import Hardware, Link

SLOW = Hardware("slow arithmetic", {"float32": 1e3}, 1e4, 1e-9, 4, Link(0.0, 1e7), Link(0.0, 1e6))
MESHES = ("a=4", "a=2,b=2")


class Program(nn.Module):
    """`function` of two parameters, each split as `specs` say (on the mesh's first axis)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        self.x, self.y = nn.Parameter(values[0]), nn.Parameter(values[1])
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.x, self.y)


def check(model: Program, mesh: str, **specs: str) -> shardc.api.Compiled:
    """The value, and the gradients of its weighed sum, equal single device; the parameters lie as `specs` say."""
    compiled = shardc.compile(model, mesh, (), hardware=SLOW, constraints=specs)
    found: list[list[Tensor]] = []
    for call in (model, compiled):
        output = call()
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
        found.append([output, *torch.autograd.grad((output * weights).sum(), [model.x, model.y], allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    return compiled


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "bce": lambda x, y: F.binary_cross_entropy(torch.sigmoid(x), torch.sigmoid(y)),
    "bce_with_logits": lambda x, y: F.binary_cross_entropy_with_logits(x, torch.sigmoid(y)),
    "mean": lambda x, y: (x * y).mean(),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("spec", ["a,?", "?,a"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_means_over_a_split_dim(name: str, spec: str, mesh: str) -> None:
    """There: too large by the size of the mesh."""
    check(Program(LOSSES[name], (8, 8), (8, 8)), mesh, x=spec, y=spec)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_filling_partial_sums(value: float, mesh: str) -> None:
    """There: the filled value stays a sum to be made, and comes out too large."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        product = x @ y  # split along the dim that is summed, so that every rank holds an addend
        return product.clone().fill_(value) + torch.full_like(product, value) + product.detach().sum() * 0 + product

    check(Program(function, (4, 8), (8, 4)), mesh, x="?,a", y="a,?")


CONVOLUTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], str, str]] = {
    "input channels": (lambda x, w: F.conv2d(x, w, padding=1), (8, 8, 3, 3), "?,a,?,?", "?,a,?,?"),
    "output channels": (lambda x, w: F.conv2d(x, w, padding=1), (8, 8, 3, 3), "?,?,?,?", "a,?,?,?"),
    "rows": (lambda x, w: F.conv2d(x, w, padding=1), (8, 8, 3, 3), "?,?,a,?", "?,?,?,?"),
    "columns and stride": (lambda x, w: F.conv2d(x, w, stride=2), (8, 8, 3, 3), "?,?,?,a", "?,?,?,?"),
    "groups": (lambda x, w: F.conv2d(x, w, groups=4), (8, 2, 3, 3), "?,a,?,?", "a,?,?,?"),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=8), (8, 1, 3, 3), "?,a,?,?", "a,?,?,?"),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), (8, 8, 3, 3), "?,a,?,?", "a,?,?,?"),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_split_by_channels_and_space(name: str, mesh: str) -> None:
    """There: wrong in every layout but the batch."""
    function, weight, x, w = CONVOLUTIONS[name]
    check(Program(function, (4, 8, 8, 8), weight), mesh, x=x, y=w)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("spec", ["a,?", "?,a"])
@pytest.mark.parametrize("order", [float("inf"), float("-inf"), 1.0, 2.0, 3.0])
def test_gradients_of_norms_over_a_split_dim(order: float, spec: str, mesh: str) -> None:
    """There: the extreme norms give every rank's own extreme a gradient."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, order) + torch.linalg.vector_norm(x * y, order, dim=-1)

    check(Program(function, (8, 8), (8, 8)), mesh, x=spec, y=spec)


@pytest.mark.parametrize("mesh", MESHES)
def test_extremes_that_tie_across_ranks_share_the_gradient(mesh: str) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        tied = torch.where(x.abs() > 0, 1.0, x) * y.detach().sign() * 0 + x * 0 + 1
        return tied.amax() + tied.amax(1).sum() + tied.amin(0).sum() + y.sum()

    check(Program(function, (8, 8), (8, 8)), mesh, x="a,?", y="a,?")
