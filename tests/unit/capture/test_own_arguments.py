"""Which of a call's arguments are the model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardc.capture.trace import capture


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_a_tensor_with_the_identity_of_one_that_is_gone_is_another() -> None:
    model, other = Shifted(), torch.ones(4)
    effects = capture(model, (torch.ones(4),)).effects
    assert effects is not None
    guards = effects.guards
    (number,) = guards.numbers([model.shift])
    assert (
        number is not None and guards.numbers([other]) == () and guards.numbers([other, model.shift]) == (None, number)
    )
    assert [tensor is model.shift for tensor in guards._numbered] == [True]
    guards._numbered[0] = other  # as where a parameter becomes a DTensor
    assert guards.numbers([other]) == ()
    assert guards.numbers([model.shift]) == (number,)


def test_numbering_lets_torch_swap_the_tensors() -> None:
    model = Shifted()
    effects = capture(model, (torch.ones(4),)).effects
    assert effects is not None
    effects.guards.numbers([model.shift])
    torch.utils.swap_tensors(model.shift, torch.zeros(4))  # refuses a tensor that something refers to weakly
    assert model.shift.equal(torch.zeros(4))
