"""Small programs that random search found to go wrong once, each equal to single device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from shardc.cost.hardware import Hardware, Link
from shardc.errors import ShardcError

SLOW = Hardware("slow arithmetic", {"float32": 1e3}, 1e4, 1e-9, 4, Link(0.0, 1e7), Link(0.0, 1e6))


class Function(nn.Module):
    """`function` of a parameter `w` and the inputs."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape))
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.w, *inputs)


def check(model: nn.Module, inputs: tuple[Tensor, ...], mesh: str, **options: object) -> shardc.api.Compiled:
    """Outputs and gradients equal single device."""
    compiled = shardc.compile(model, mesh, inputs, **{"hardware": SLOW, **options})
    found: list[list[Tensor]] = []
    for call in (model, compiled):
        torch.manual_seed(0)
        output = call(*inputs)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    return compiled


def test_split_into_a_single_chunk() -> None:
    check(Function(lambda w: w.split(4)[0] * 2, 4, 2), (), "a=2")


def test_dropout_of_an_expanded_value_draws_as_eager_does() -> None:
    check(Function(lambda w: F.dropout(w.expand(4, 3, 2), 0.5), 3, 1), (), "a=2")


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2", "b=2,a=4"])
def test_convolution_whose_input_needs_no_gradient(mesh: str) -> None:
    """The bias gradient does not read the input, whose channels are split here."""

    def function(w: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, w[:, :-1], w[:, -1, 0, 0], padding=1)

    x = torch.randn(2, 4, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(Function(function, 2, 5, 3, 3), (x,), mesh)


def test_a_constraint_with_more_ranks_than_elements_is_refused() -> None:
    with pytest.raises(ShardcError, match="fewer than the 4 ranks"):
        shardc.compile(Function(lambda w: w.sin(), 3), "a=4", (), constraints={"w": ("a",)})


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_gradients_of_a_complex_output_and_input(mesh: str) -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4))

        def forward(self, z: Tensor) -> Tensor:
            return z * torch.polar(torch.ones_like(self.w), self.w) @ torch.complex(self.w, 2 * self.w)

    single, found = Rotation(), list[list[Tensor]]()
    z = torch.view_as_complex(torch.randn(4, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for model in (single, shardc.shard(single, mesh=mesh, hardware=SLOW)):
        given = z.clone().requires_grad_()
        output = model(given)
        loss = (output * torch.linspace(0, 1, 4)).abs().sum()
        found.append([output.detach(), *torch.autograd.grad(loss, [single.w, given])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
