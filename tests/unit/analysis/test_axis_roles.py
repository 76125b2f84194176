"""What axes do is read off layouts and strategies: of plans that are forced to be of a known kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from samples.causal_decoder import CausalDecoder
from shardc.analysis.parallelism import AxisRole, AxisUse, Parallelism, Use

WIDTH = 1024
TOKENS = torch.arange(8 * 16).reshape(8, 16) % 24


def large(*asked: str) -> Mlp:
    """A model of such a size that what is cheapest is what the textbook does."""
    with torch.device("meta"):
        return Mlp(*asked)


def read(model: nn.Module, mesh: str, *inputs: Tensor, **options: Any) -> Parallelism:
    with torch.no_grad():  # only forward is read
        return shardc.compile(model, mesh, inputs, hardware="h100", **options).plan.summary.parallelism


class Mlp(nn.Module):
    """Two layers whose modules are called anything but what they do. `inside` is asked of what is between the products,
    `between` of what is between layers."""

    def __init__(self, between: str = "?,?,?", inside: str = "?,?,?") -> None:
        super().__init__()
        self.between, self.inside = between, inside
        sizes = (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
        self.b = nn.ModuleList(nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for one in self.b:
            first, second = one  # type: ignore[misc]
            normal = shardc.constrain(F.layer_norm(x, (WIDTH,)), self.between)
            x = x + second(F.relu(shardc.constrain(first(normal), self.inside)))
            x = shardc.constrain(x, self.between)
        return x.square().mean()


X = torch.empty(16, 2048, WIDTH, device="meta")
MEGATRON = {"b.*.0.weight": "tp,-", "b.*.1.weight": "-,tp"}


def uses(found: Parallelism, axis: str) -> dict[AxisRole, list[str]]:
    told: dict[AxisRole, list[str]] = {}
    for use in next(one for one in found.axes if one.axis == axis).uses:
        told.setdefault(use.role, []).append(use.how)
    return {role: sorted(hows) for role, hows in told.items()}


@pytest.fixture(scope="module")
def megatron() -> Parallelism:
    return read(large("dp,tp,-", "dp,-,tp"), "dp=2,tp=2", X, constraints=MEGATRON)


def test_columns_then_rows_with_the_sequence_split_between(megatron: Parallelism) -> None:
    assert uses(megatron, "dp") == {AxisRole.DATA: ["batch"]}
    assert uses(megatron, "tp") == {
        AxisRole.TENSOR: ["columns of weights", "rows of weights"],
        AxisRole.SEQUENCE: ["sequence between them"],
    }
    assert megatron.lines == [
        "dp: batch (data parallel)",
        "tp: columns, then rows of weights (tensor parallel), sequence between them (sequence parallel)",
    ]


def test_equal_layers_are_one_block_with_its_weights(megatron: Parallelism) -> None:
    (block,) = megatron.blocks
    assert (block.name, block.count) == ("b.*", 2)
    of = {use.how: use.weights for use in block.uses["tp"]}
    assert of["columns of weights"] == ("0",) and of["rows of weights"] == ("1",)


def test_layers_that_differ_are_blocks_of_their_own() -> None:
    found = read(large(), "tp=2", X, constraints={"b.0.0.weight": "tp,-", "b.0.1.weight": "-,tp"}, mode="propagate")
    assert [(block.name, block.count) for block in found.blocks] == [("b.0", 1), ("b.1", 1)]
    assert found.blocks[0].uses["tp"] != found.blocks[1].uses["tp"]


def test_weights_that_are_gathered_before_use_are_fully_sharded() -> None:
    found = read(large("dp,-,-"), "dp=2", X, constraints={"b.*.*.weight": "dp,-"}, mode="propagate")
    (axis,) = found.axes
    assert axis.roles == (AxisRole.DATA, AxisRole.STORAGE) and (axis.gathered, axis.weights) == (4, 4)
    assert (
        str(axis) == "dp: batch (data parallel); all weights are stored split, and gathered before use (fully sharded)"
    )


def test_weights_that_stay_whole_are_not() -> None:
    (axis,) = read(large("dp,-,-"), "dp=2", X, mode="propagate").axes
    assert axis.roles == (AxisRole.DATA,) and axis.gathered == 0


def test_an_axis_along_the_sequence_is_context_parallel() -> None:
    found = read(CausalDecoder("dp", "cp", layers=1), "dp=2,cp=2", TOKENS, mode="propagate")
    assert uses(found, "dp") == {AxisRole.DATA: ["batch"]}
    (role,) = uses(found, "cp")
    assert role is AxisRole.CONTEXT and "sequence" in uses(found, "cp")[role]
    assert any("keys" in how for how in uses(found, "cp")[role])


def test_heads_where_the_sequence_is_split_around_attention_are_context_parallel() -> None:
    """What moves is exchanged on either side of attention (Ulysses)."""

    class Exchanged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = shardc.constrain(x, "-,cp,-")
            qkv = shardc.constrain(self.q(x), "-,cp,-").view(8, 16, 3, 4, 4).permute(2, 0, 3, 1, 4)
            q, k, v = (shardc.constrain(one, "-,cp,-,-") for one in qkv.unbind())
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = shardc.constrain(shardc.constrain(y, "-,cp,-,-").transpose(1, 2).reshape(8, 16, 16), "-,cp,-")
            return shardc.constrain(self.o(y), "-,cp,-").square().mean()

    found = read(Exchanged(), "cp=2", torch.randn(8, 16, 16))
    assert uses(found, "cp") == {AxisRole.CONTEXT: ["heads of attention", "sequence"]}


def test_heads_are_tensor_parallel_beside_columns_and_rows() -> None:
    names = {"q": "tp,-", "k": "tp,-", "v": "tp,-", "o": "-,tp"}
    asked: Mapping[str, str] = {f"layers.*.attention.{name}.weight": spec for name, spec in names.items()}
    found = read(CausalDecoder(kv_heads=2, layers=1), "tp=2", TOKENS, constraints=asked, mode="propagate")
    assert uses(found, "tp")[AxisRole.TENSOR] == ["columns of weights", "heads of attention", "rows of weights"]


def test_an_axis_of_products_with_weights_of_their_own_is_expert_parallel() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w).square().mean()

    found = read(Experts(), "ep=2", torch.randn(4, 8, 16), constraints={"w": "ep,-,-"}, mode="propagate")
    assert {use.role for use in found.axes[0].uses} & {AxisRole.EXPERT, AxisRole.DATA}


def test_an_axis_that_does_nothing_says_so() -> None:
    assert str(AxisUse("tp", 2)) == "tp: splits nothing that takes time"
    assert str(AxisUse("tp", 2, (Use(AxisRole.STORAGE, "x"),), 1, 3)) == (
        "tp: 1 of 3 weights are stored split, and gathered before use (fully sharded)"
    )


def test_a_batch_between_columns_and_rows_is_no_sequence_parallelism() -> None:
    found = read(large("(dp,tp),-,-", "dp,-,tp"), "dp=2,tp=2", X, constraints=MEGATRON)
    assert AxisRole.SEQUENCE not in uses(found, "tp")
    assert uses(found, "tp")[AxisRole.DATA] == ["batch between them"]
