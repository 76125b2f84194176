"""Dims that the mesh does not divide: padded, and never seen in a value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from samples.odd_sizes import DIVIDES, Decoder


def check(model: nn.Module, inputs: tuple[Tensor, ...], mesh: str, **options: object) -> shardc.Plan:
    """Loss and gradients on the mesh equal those of the model alone."""
    expected = model(*inputs)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = shardc.compile(model, mesh, inputs, **options)  # type: ignore[arg-type]
    found = compiled(*inputs)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    sent = compiled.executable.mesh.traffic
    assert compiled.plan.bytes_per_axis == pytest.approx(sent)
    return compiled.plan


@pytest.mark.parametrize("mesh", ["a=4", "a=5", "a=2,b=2", "a=2,b=3", "a=3,b=2", "a=2,b=2,c=2"])
def test_a_decoder_that_nothing_divides(mesh: str) -> None:
    torch.manual_seed(0)
    words, labels = torch.randint(0, 57, (7, 9)), torch.randint(0, 57, (7, 9))
    plan = check(Decoder().double(), (words, labels), mesh, hardware=DIVIDES)
    assert any("is padded to" in note for note in plan.notes)


def test_a_linear_layer_of_250_columns_on_four_ranks() -> None:
    model = nn.Linear(64, 250).double()
    plan = check(model, (torch.randn(7, 64).double(),), "tp=4", constraints={"weight": ("tp", None)})
    assert "weight dim 0: 250 over tp is padded to 4 x 63" in plan.notes


def test_five_heads_on_two_ranks() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(10, 15)

        def forward(self, x: Tensor) -> Tensor:
            heads = shardc.constrain(self.project(x).unflatten(-1, (5, 3)), (None, None, "tp", None))
            return heads.softmax(-1).sum(2)

    model = Heads().double()
    plan = check(model, (torch.randn(2, 3, 10).double(),), "tp=2", hardware=DIVIDES)
    assert any("5@tp" in str(layout) for layout in plan.layouts.values())


def test_a_vocabulary_of_50257_on_eight_ranks() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50257, 2), nn.Linear(2, 50257, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, words: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.embed(words)), labels)

    torch.manual_seed(0)
    words, labels = torch.randint(0, 50257, (5,)), torch.tensor([0, 6283, 50256, 50255, 43981])
    plan = check(Language().double(), (words, labels), "tp=8", hardware=DIVIDES,
                 constraints={"embed.weight": ("tp", None)})  # fmt: skip
    assert "embed.weight dim 0: 50257 over tp is padded to 8 x 6283" in plan.notes
    logits = [str(layout) for layout in plan.layouts.values() if str(layout) == "[5, 50257@tp]"]
    assert logits, "the logits stay split"


def test_batch_of_seven_on_four_ranks() -> None:
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = shardc.constrain(x, ("dp", None, None, None))
            return F.max_pool2d(self.norm(self.layer(x)), 2).mean((2, 3))

    plan = check(Batch().double(), (torch.randn(7, 3, 8, 8).double(),), "dp=4")
    assert "input:0 dim 0: 7 over dp is padded to 4 x 2" in plan.notes or any(
        str(layout).startswith("[7@dp") for layout in plan.layouts.values()
    )
