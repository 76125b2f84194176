"""Gradients turned on and off, in forward and around the call: results require one where they do on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor, nn

from shardc import ShardcError, shard


class Block(nn.Module):
    kept: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def plain(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Enabled(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inside = self.plain(x)
        return inside, self.plain(x)


class Decorated(Block):
    @torch.set_grad_enabled(True)
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.plain(x),)


class Switched(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        y = self.up(x)
        torch.set_grad_enabled(before)
        return (self.down(torch.tanh(y)), y)


class Keeping(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            self.kept = self.plain(x)
        return (self.kept.detach(),)


class Disabled(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.set_grad_enabled(False):
            y = self.up(x)
            with torch.enable_grad():
                z = self.up(x)
        return (self.down(torch.tanh(y)), z)


class Forces(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.plain(x).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, slope


class Leaving(Block):
    """Leaves inference mode, if the call is in it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            return (self.plain(x.clone()),)


AROUND: dict[str, tuple[Callable[[], AbstractContextManager[object]], ...]] = {
    "on": (torch.enable_grad,),
    "off": (torch.no_grad,),
    "off and on": (torch.no_grad, torch.enable_grad),
    "inference": (torch.inference_mode,),
    "inference and on": (torch.inference_mode, torch.enable_grad),
}


def outcome(model: Block, around: str) -> list[Tensor | bool | None]:
    """The results, whether they require a gradient, and the gradients of all that do."""
    x = torch.arange(24.0).reshape(4, 6).cos().requires_grad_()
    model.zero_grad()
    with ExitStack() as stack:
        for mode in AROUND[around]:
            stack.enter_context(mode())
        results = model(x)
    results = results if model.kept is None else (*results, model.kept)
    attached = [one for one in results if one.requires_grad]
    if attached:
        sum((one.square().sum() for one in attached), torch.zeros(())).backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [*(one.requires_grad for one in results), *(one.detach() for one in results), *gradients]


@pytest.mark.parametrize("kind", [Enabled, Decorated, Switched, Keeping, Disabled, Forces, Leaving])
def test_gradients_are_turned_on_and_off(kind: type[Block]) -> None:
    torch.manual_seed(0)
    one = kind()
    many = shard(copy.deepcopy(one), mesh="a=2")
    for around in AROUND:
        if "inference" in around and kind is Leaving:
            with pytest.raises(ShardcError, match="forward leaves inference mode"):
                outcome(many, around)
            continue
        if "inference" in around and kind is Forces:  # torch refuses it, too
            continue
        for value, expected in zip(outcome(many, around), outcome(one, around), strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(value, expected)
            else:
                assert value is expected, around


def test_backward_within_forward_is_refused() -> None:
    class Backward(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                self.plain(x).sum().backward()
            return self.plain(x)

    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(ShardcError, match=r"forward calls backward at test_grad_modes.py:\d+"):
            shard(Backward(), mesh="a=2")(torch.ones(4, 6))
