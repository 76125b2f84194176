"""What is offered where operators have too many strategies to list them all: near a plan, until it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.compiled import Compiled
from shardc.ir.mesh import Mesh
from shardc.planning.offers import near, words
from shardc.planning.strategies import strategies_of
from shardc.rules.factors.strategy import legal

MESH = "a=2,b=2,c=2"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1024, 4096)
        self.down = nn.Linear(4096, 1024)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(torch.relu(self.up(x)))).pow(2).mean()


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 2.0


def planned(memory: float | str = "unbounded") -> Compiled:
    with torch.device("meta"):
        return shardc.compile(Mlp(), MESH, (torch.empty(1024, 1024),), hardware="h100", memory=memory)


@pytest.fixture(scope="module")
def exact() -> Compiled:
    return planned()


@pytest.fixture(scope="module")
def offered() -> Compiled:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "FEW_AXES", 0)
        patch.setattr(near, "MOST_WORDS", 0)
        return planned()


def test_few_strategies_are_all_offered(exact: Compiled) -> None:
    assert exact.planned.network.offers is None
    assert not [note for note in exact.plan.notes if "too many" in note]


def test_the_plan_near_itself_is_the_best_of_all(exact: Compiled, offered: Compiled) -> None:
    assert offered.plan.cost == pytest.approx(exact.plan.cost, rel=1e-9)
    assert offered.plan.lower_bound == pytest.approx(offered.plan.cost, rel=1e-6)
    assert offered.plan.check() == pytest.approx(offered.plan.cost, rel=1e-6)
    assert [note for note in offered.plan.notes if "too many strategies" in note]
    assert "none near it costs less" in str(offered.plan) and "proven optimal" not in str(offered.plan)


def test_what_is_offered_is_a_part_of_all_strategies(offered: Compiled) -> None:
    network, mesh = offered.planned.network, Mesh.parse(MESH)
    fewer = 0
    for op in network.factored.ops:
        options = network.options_of(op)
        every, some = strategies_of(options.shape, mesh).strategies, options.strategies
        plain = [one for one in some if one.variant not in options.shape.rings]
        assert set(plain) <= set(every)
        assert all(legal(options.shape, one, mesh) for one in some)
        fewer += len(plain) < len(every)
    assert fewer


def test_within_a_bound(offered: Compiled) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "FEW_AXES", 0)
        patch.setattr(near, "MOST_WORDS", 0)
        tight = planned(offered.plan.memory.peak)
    assert tight.plan.memory.peak <= offered.plan.memory.peak
    assert tight.plan.cost == pytest.approx(offered.plan.cost, rel=1e-9)


def test_a_plan_that_was_saved_is_posed_again_near_itself(offered: Compiled, tmp_path: Path) -> None:
    offered.plan.save(tmp_path / "plan.json")
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(near, "FEW_AXES", 0)
        patch.setattr(near, "MOST_WORDS", 0)
        again = shardc.compile(Mlp(), MESH, (torch.empty(1024, 1024),), hardware="h100", memory="unbounded",
                               plan=tmp_path / "plan.json")  # fmt: skip
    assert again.plan.cost == offered.plan.cost
    assert again.plan.check() == pytest.approx(offered.plan.cost, rel=1e-6)


def test_a_word_says_what_each_axis_does(exact: Compiled) -> None:
    network, mesh = exact.planned.network, Mesh.parse(MESH)
    for op in network.factored.ops[:20]:
        shape = network.options_of(op).shape
        for strategy in strategies_of(shape, mesh).strategies[::7]:
            again = words.written(shape, mesh, [words.word_of(strategy, mesh)])
            assert strategy in list(again)


def test_four_axes_do_what_one_of_their_product_does() -> None:
    """Nothing is sent, so it makes no difference how many axes the devices are."""
    x = torch.empty(4096, 4096, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "MOST_WORDS", 0)
        four, one = (
            shardc.compile(Scaled(), mesh, (x,), hardware="h100", memory="unbounded")
            for mesh in ("a=2,b=2,c=2,d=2", "a=16")
        )
    assert four.planned.network.offers is not None
    assert one.planned.network.offers is None
    assert four.plan.cost == pytest.approx(one.plan.cost, rel=1e-9)
