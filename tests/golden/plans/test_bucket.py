"""The IR that the bucket pass reads and writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardc


class Narrow(nn.Module):
    """Weights, biases and a scale, all small."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(torch.relu(self.up(x))) * self.scale).square().mean()


@pytest.mark.parametrize(
    ("name", "mesh", "constraints"),
    [
        ("all_reduce", "dp=4", {}),
        ("reduce_scatter", "dp=4", {"*.weight": ("dp", None)}),
        ("levels", "dp=2,fs=2", {"*.weight": ("fs", None), "up": (("dp", "fs"), None)}),
    ],
)
def test_buckets(name: str, mesh: str, constraints: dict[str, object], golden: Callable[[str, str], None]) -> None:
    """Gradients of one collective; each along its own dim; and step by step, over one axis and then the other."""
    x = torch.empty(4096, 16, device="meta")
    with torch.device("meta"):
        compiled = shardc.compile(Narrow(), mesh, (x,), hardware="cpu", constraints=constraints)  # type: ignore[arg-type]

    def backward(name: str) -> str:
        """The lines from the tangent on."""
        lines = compiled.graph(name).splitlines()
        start = next(place for place, line in enumerate(lines) if "tangent" in line and " = input" not in line)
        return "".join(f"{line}\n" for line in lines[start:])

    golden(name, f"after localize\n\n{backward('localize')}\nafter bucket\n\n{backward('bucket')}")
