"""The IR that the overlap pass reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.cost.hardware import Hardware, hardware


class Layers(nn.Module):
    """Three products, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def machine(overlap: float) -> Hardware:
    """Collectives take about as long as the products that can hide them."""
    cpu = hardware("cpu")
    return replace(cpu, inside=replace(cpu.inside, bandwidth=3e7, overlap=overlap))


def batch(axes: object) -> dict[str, object]:
    return {f"layers.{layer}": (axes, None) for layer in range(3)}


CASES = {
    "gradients": ("dp=2", {"*.weight": (None, None)} | batch("dp")),
    "prefetch": ("fs=2", {"*.weight": ("fs", None)} | batch("fs")),
    "levels": ("dp=2,fs=2", {"*.weight": ("fs", None)} | batch(("dp", "fs"))),
}


def compiled(case: str, overlap: float) -> shardc.Compiled:
    mesh, constraints = CASES[case]
    with torch.device("meta"):
        model, x = Layers(), torch.empty(4096, 256)
        return shardc.compile(model, mesh, (x,), hardware=machine(overlap), constraints=constraints)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_overlap(case: str, golden: Callable[[str, str], None]) -> None:
    """Gradients are reduced beneath backward; weights gathered beneath the layer before; a reduction over a second axis
    follows the one over the first."""
    graph = compiled(case, 1.0).graph
    golden(f"overlap_{case}", f"after bucket\n\n{graph('bucket')}\nafter overlap\n\n{graph('overlap')}")


def test_nothing_is_started_over_a_link_that_hides_nothing() -> None:
    found = compiled("levels", 0.0)
    assert found.graph("overlap") == found.graph("bucket") and ".start(" not in found.code
