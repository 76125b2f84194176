"""Folded sequences: a causal decoder from tokens to loss and back, what folds and what does not, and who chooses it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from samples.causal_decoder import CausalDecoder
from shardc.api import Compiled
from shardc.cost.hardware import Hardware, Link

APART = Hardware("slow", {"float32": 1e6, "float64": 1e6}, 1e12, 1e-7, 8, Link(1e-5, 1e7), Link(1e-5, 1e7))
"""Computes so slowly that nothing is computed twice."""
BESIDE = replace(APART, inside=Link(1e-5, 1e7, overlap=1.0), between=Link(1e-5, 1e7, overlap=1.0))
"""Sends while it computes, so that a ring is free."""


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 24, (batch, length), generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, mesh: str, given: Tensor, device: Hardware | str = APART, **options: Any) -> Compiled:
    return shardc.compile(model, mesh, (given,), hardware=device, **options)


def check(model: nn.Module, mesh: str, given: Tensor, device: Hardware = APART, **options: Any) -> Compiled:
    """Values and every gradient are those of the single device."""
    single, program = copy.deepcopy(model), compiled(model, mesh, given, device, **options)
    expected, found = single(given), program(given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    expected.backward()
    found.backward()
    for (name, one), other in zip(single.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, one.grad, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    return program


MESHES = pytest.mark.parametrize(("mesh", "batch"), [("cp=2", "-"), ("cp=3", "-"), ("cp=4", "-"), ("dp=2,cp=2", "dp")])


@MESHES
@pytest.mark.parametrize("device", [APART, BESIDE], ids=["gathered keys", "ring"])
def test_a_decoder_stays_folded_from_its_inputs_to_the_loss(mesh: str, batch: str, device: Hardware) -> None:
    torch.manual_seed(0)
    model = CausalDecoder(batch, "cp~folded").double()
    program = check(model, mesh, tokens(length=192), device)
    sent = [one for one in program.plan.conversions if not one.value.endswith(".weight")]
    text = str(program.graph("localize"))
    assert "n=Part(('cp~folded',), 192)" in text
    assert not {one.kind for one in sent} & {"reorder", "all_to_all"}
    forward = [one for one in sent if one.phase == "forward"]
    if device is BESIDE:
        assert "ring_attention(" in text and "ring_attention_backward(" in text
        # tokens and labels are cut, the loss is summed
        assert {one.kind for one in forward} <= {"shard", "permute", "all_reduce"}, forward
    else:
        assert "attention_in_parts(" in text
        assert all("attention," in one.place for one in forward if one.kind == "all_gather"), forward


class Then(nn.Module):
    """Something is done with what is folded."""

    def __init__(self, then: Callable[[Tensor], Tensor], spec: str = "f64[4, 16@cp~folded]") -> None:
        super().__init__()
        self.then, self.spec, self.scale = then, spec, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.then(shardc.constrain((x * self.scale).sin(), self.spec)).square().sum()


LOOK_AT_POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, 1:].cos(),
    "every second": lambda x: x[:, ::2].cos(),
    "select": lambda x: x[:, 3].cos(),
    "scan": lambda x: x.cumsum(1),
    "extreme": lambda x: x * x.argmax(1, keepdim=True),
    "pad": lambda x: F.pad(x, (1, 2)),
    "cat": lambda x: torch.cat([x, x.cos()], 1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(3, 1),
    "sort": lambda x: x.sort(1).values,
    "triangle": lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).tril(),
    "convolution": lambda x: F.conv1d(x.unsqueeze(1), x.new_ones(1, 1, 3), padding=1),
    "index": lambda x: x[:, torch.arange(15, -1, -1)],
    "softmax": lambda x: x.softmax(1),
    "positions": lambda x: x * torch.arange(16),
    "view": lambda x: x.view(4, 8, 2).cos() * torch.arange(2),
}


@pytest.mark.parametrize("name", LOOK_AT_POSITIONS)
@pytest.mark.parametrize("mesh", ["cp=2", "dp=2,cp=4"])
def test_operators_that_look_at_positions(name: str, mesh: str) -> None:
    """They read it right, or the value is converted for them."""
    check(Then(LOOK_AT_POSITIONS[name]), mesh, torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 16))


def test_a_layout_is_accepted_as_it_is_printed() -> None:
    x = torch.ones(4, 16, dtype=torch.float64)
    program = check(Then(torch.cos, "-,cp~folded"), "cp=2", x)
    printed = str(program.plan.why("sin")).splitlines()[0].split("  ")[1]
    assert printed == "f64[4, 16@cp~folded]"
    again = check(Then(torch.cos, printed), "cp=2", x)
    assert "cp~folded splits" in str(again.plan.why("cos"))
    assert again.plan.why_not("cos", "f64[4, 16@cp]").layout == "f64[4, 16@cp]"
    assert again.plan.why_not("cos", "-,cp~folded").layout == printed


@pytest.mark.parametrize(("spec", "words"), [
    ("f64[4, 16@cp~folded]", "6 pieces of one size, and 6 does not divide 16"),
    ("f64[4, 16@cp~spiral]", "cannot read layout"),
    (("-", "cp~spiral"), "is no axis name"),
    (("cp", "cp~folded"), "uses axis 'cp' twice"),
    (("-", "tp~folded"), "has no axis 'tp'"),
])  # fmt: skip
def test_what_cannot_be_folded_is_told(spec: Any, words: str) -> None:
    with pytest.raises(shardc.ShardcError, match=words):
        compiled(Then(torch.cos, spec), "cp=3", torch.ones(4, 16, dtype=torch.float64))


def test_a_parameter_is_not_folded() -> None:
    model = nn.Linear(8, 8).double()
    with pytest.raises(shardc.ShardcError, match="it cannot be folded"):
        compiled(model, "cp=2", torch.ones(4, 8).double(), constraints={"weight": "f64[8@cp~folded, 8]"})


def test_an_output_comes_back_in_blocks() -> None:
    torch.manual_seed(0)
    model, given = CausalDecoder("-", "cp~folded", logits=True).double(), tokens(length=192)
    program = compiled(model, "cp=3", given, outputs="sharded")
    torch.testing.assert_close(program(given)[1], model(given)[1], rtol=1e-10, atol=1e-10)
    (slot,) = [one for one in program.executable.outputs if one.role == "output" and one.index == 1]
    assert slot.cuts in (((1, 1, "cp"),), ((2, 1, "cp"),))


def long(heads: int, length: int, mesh: str) -> Compiled:
    with torch.device("meta"):
        model = CausalDecoder(width=128 * heads, heads=heads, kv_heads=heads, vocabulary=1000, layers=1).bfloat16()
    return compiled(model, mesh, torch.zeros(1, length, dtype=torch.int64), "h100")


def test_the_solver_folds_by_itself_where_a_ring_pays() -> None:
    """Fewer heads than ranks, and a long sequence: a ring, and folded, for in blocks the last rank would be late."""
    program = long(heads=2, length=65536, mesh="cp=4")
    plan = program.plan
    answer = str(plan.why("layers.0.attention"))
    assert "65536@cp~folded" in answer and "next best" in answer, answer
    (made,) = re.findall(r"%(\w+) = %attention\[0\]", str(program.graph("reshard")))
    assert plan.why(made).strategy == "cp~folded splits r and s together (ring)"
    blocks = plan.why_not(made, "-,-,cp,-")
    assert blocks.proven and blocks.extra > 0
    assert plan.check() == pytest.approx(program.plan.why_not(made, "-,-,cp,-").of)


def test_nothing_is_folded_where_nothing_gains() -> None:
    """A short sequence, enough heads, attention that is not causal."""
    for program in (long(2, 512, "cp=4"), long(8, 4096, "cp=2")):
        assert "~folded" not in program.code
