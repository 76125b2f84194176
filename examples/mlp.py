"""Two matrix products and their gradient: the smallest program with an interesting plan.

python examples/mlp.py
shardc plan examples/mlp.py --mesh tp=4
shardc run examples/mlp.py --mesh dp=2,tp=2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardc import shard


class MLP(nn.Module):
    """A single-device program: nothing in it knows of a mesh."""

    def __init__(self, width: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.down(torch.relu(self.up(x))) - target).square().mean()


@shard(mesh="dp=2,tp=2")
class ShardedMLP(MLP):
    """The same program on four devices; the decorator may as well stand on MLP itself."""


def model() -> nn.Module:
    return MLP()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 256, generator=generator), torch.randn(16, 256, generator=generator)


def main() -> None:
    torch.manual_seed(0)
    sharded = ShardedMLP()
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
    for step in range(5):
        loss = sharded(*inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.6f}")
    print(sharded.plan)
    print(sharded.code)


if __name__ == "__main__":
    main()
