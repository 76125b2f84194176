"""Propagate mode: what is annotated spreads through factors, forward and backward, and the rest stays whole."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

import shardc
from samples.textbook import MLP, Transformer
from shardc import constrain
from shardc.api import Compiled

Golden = Callable[[str, str], None]


def spread(model: nn.Module, mesh: str, x: Tensor, **constraints: object) -> Compiled:
    named = {name.replace("__", "."): spec for name, spec in constraints.items()}
    return shardc.compile(model, mesh, (x,), mode="propagate", constraints=named, hardware="h100")  # type: ignore[arg-type]


def printed(compiled: Compiled) -> str:
    """The spread layouts, and what became of them."""
    return f"after propagate\n\n{compiled.graph('propagate')}\nafter reshard\n\n{compiled.graph('reshard')}"


def test_one_annotated_weight_makes_columns_then_rows(golden: Golden) -> None:
    """`hidden` is one factor of both products, so splitting it in one weight splits it everywhere."""
    compiled = spread(MLP(8, 32), "tp=4", torch.zeros(4, 8), up__weight=("tp", None))
    placed = {p.name: str(p.layout) for p in compiled.plan.placed}
    assert placed == {"up.weight": "[32@tp, 8]", "down.weight": "[8, 32@tp]", "input:0": "[4, 8]"}
    assert [c.kind for c in compiled.plan.conversions] == ["all_reduce"]
    assert not compiled.plan.notes
    golden("mlp", printed(compiled))


def test_a_transformer_from_two_annotations(golden: Golden) -> None:
    """The batch from one output, heads and hidden from two weights: they reach every operator of both blocks."""
    compiled = spread(
        Transformer(16, 4), "dp=2,tp=2", torch.zeros(4, 6, 16),
        **{"blocks": ("dp", None, None), "blocks__*__q__weight": ("tp", None), "blocks__*__up__weight": ("tp", None)},
    )  # fmt: skip
    placed = {p.name: str(p.layout) for p in compiled.plan.placed}
    for block in (0, 1):
        for name in ("q", "k", "v"):
            assert placed[f"blocks.{block}.{name}.weight"] == "[16@tp, 16]"
        assert placed[f"blocks.{block}.proj.weight"] == "[16, 16@tp]"
        assert placed[f"blocks.{block}.down.weight"] == "[16, 64@tp]"
    assert placed["input:0"] == "[4@dp, 6, 16]"
    golden("transformer", printed(compiled))


class Conflict(nn.Module):
    """Two annotations that meet in one addition."""

    def forward(self, x: Tensor) -> Tensor:
        rows = constrain(x.sin(), ("a", None))
        others = constrain(x.cos(), ("b", None))
        return rows + others


def test_a_conflict_names_both_lines(golden: Golden) -> None:
    """Neither annotation is overruled: one side is converted, and the plan says why."""
    compiled = spread(Conflict(), "a=2,b=2", torch.zeros(4, 4))
    lines, first = inspect.getsourcelines(Conflict.forward)
    places = [first + i for i, line in enumerate(lines) if "constrain(" in line]
    notes = [note for note in compiled.plan.notes if note.startswith("conflict")]
    assert "conflict: add" in notes[0]
    for note in notes:  # the addition, and where the annotations meet again on their way back to the input
        assert "meets a and b on one factor" in note
        assert all(f"test_propagate.py:{place}" in note for place in places), note
    golden("conflict", printed(compiled) + "\nnotes\n\n" + "\n".join(compiled.plan.notes) + "\n")
    assert re.search(r"constrain.*f32\[4@a, 4\]", compiled.graph("reshard"))
    assert re.search(r"constrain.*f32\[4@b, 4\]", compiled.graph("reshard"))
