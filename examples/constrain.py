"""Saying where things lie: inside the program with `constrain`, from outside by module path.

python examples/constrain.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shardc
from shardc import constrain


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256, bias=False)
        self.down = nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        hidden = constrain(hidden, ("dp", "tp"))  # batch split over dp, features over tp; nothing happens on one device
        return self.down(hidden).square().mean()


def model() -> nn.Module:
    return MLP()


def inputs() -> tuple[Tensor]:
    return (torch.randn(32, 64, generator=torch.Generator().manual_seed(0)),)


def main() -> None:
    # Only what is annotated spreads, as in GSPMD; with mode="auto" the solver also chooses what is left open.
    compiled = shardc.compile(
        model(),
        "dp=2,tp=2",
        inputs(),
        mode="propagate",
        constraints={"up.weight": ("tp", None)},
    )
    print(compiled.plan)

    try:  # a constraint that no module matches is an error that names the nearest ones
        shardc.compile(model(), "dp=2,tp=2", inputs(), constraints={"upp.weight": ("tp", None)})
    except shardc.ShardcError as error:
        print(error)


if __name__ == "__main__":
    main()
