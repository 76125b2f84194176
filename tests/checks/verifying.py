"""Small programs as passes left them, in copies that a test may break, and what the verifier must then say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from samples.textbook import MLP, Block
from samples.towers import Tower
from shardc.cost.hardware import hardware
from shardc.ir.invariants.invariant import Invariant
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.program import Program
from shardc.ir.verifier import STAGE_AFTER, VerificationError, verify
from shardc.ir.versions import copied
from shardc.options import Options
from shardc.passes.pipeline import PIPELINE, run
from shardc.planning.compilation import Compilation


class Stack(nn.Module):
    """Three layers and a loss: six gradients that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class Lookup(nn.Module):
    """A table, and a softmax over the dim along which the product is split."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.out(self.table(ids)).softmax(-1) ** 2).sum()


class Normed(nn.Module):
    """Running statistics: buffers that the model changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).square().mean()


class Heads(nn.Module):
    """One block with attention, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).square().mean()


BATCH = {f"layers.{layer}": ("dp", None) for layer in (0, 2, 4)}
WHOLE: dict[str, Any] = {"*weight": (None, None), "*bias": (None,)}
HEADS = {f"block.{part}.weight": ("tp", None) for part in "qkv"} | {"block.proj.weight": (None, "tp")}


def _device(seconds: float, **link: float) -> Any:
    """A CPU on which a float costs so many seconds, with other links."""
    cpu = hardware("cpu")
    return replace(cpu, inside=replace(cpu.inside, **link), flops={"float32": 1.0 / seconds})


def _compiled(model: nn.Module, mesh: str, x: Tensor, **options: Any) -> dict[str, Compilation]:
    snapshots: dict[str, Compilation] = {}
    asked: Any = {"hardware": "cpu", **options}
    run(PIPELINE, Compilation(ModelCall.of(model, (x,)), Mesh.parse(mesh), Options(**asked)), snapshots)
    return snapshots


def _mlp(**options: Any) -> dict[str, Compilation]:
    constraints = {"up": ("dp", "tp"), "up.weight": ("tp", None), "down.weight": (None, "tp")}
    given = {"mode": "propagate", "constraints": constraints, **options}
    return _compiled(MLP(16, 64), "dp=2,tp=2", torch.randn(32, 16), **given)


CASES: dict[str, Callable[[], dict[str, Compilation]]] = {
    "mlp": _mlp,
    "solved": lambda: _mlp(mode="auto", constraints={}),
    "uneven": lambda: _compiled(MLP(7, 9), "tp=2", torch.randn(5, 7), constraints={"up": ("tp", None)}),
    "heads": lambda: _compiled(Heads(), "tp=2", torch.randn(4, 8, 16), mode="propagate", constraints=HEADS),
    "stored across heads": lambda: _compiled(
        Heads(), "tp=8", torch.randn(8, 8, 16), constraints={"block.q.weight": ("tp", None)}
    ),
    "lookup": lambda: _compiled(
        Lookup(), "tp=2", torch.randint(0, 32, (4, 8)), mode="propagate",
        constraints={"table.weight": ("tp", None), "out": (None, None, "tp")},
    ),
    "normed": lambda: _compiled(Normed(), "dp=2", torch.randn(8, 6), constraints={"layer": ("dp", None)}),
    "buckets": lambda: _compiled(
        Stack(), "dp=2", torch.randn(2048, 8), hardware=_device(1e-5, latency=1e-3), constraints=WHOLE | BATCH
    ),
    "overlap": lambda: _compiled(
        Stack(), "dp=2", torch.randn(2048, 8), hardware=_device(1e-6, overlap=1.0, stall=0.0),
        constraints={"layers.0.weight": ("dp", None), "layers.2.weight": (None, "dp"), **BATCH},
    ),
    "memory": lambda: _compiled(Tower(16, 2), "dp=2", torch.randn(16, 16, 16), memory=165.0 * 2**10),
}  # fmt: skip


@cache
def snapshots(case: str) -> dict[str, Compilation]:
    """What every pass left of a case."""
    torch.manual_seed(0)
    return CASES[case]()


@dataclass
class Left:
    """What a pass left: a copy, to break."""

    name: str
    graph: fx.Graph
    program: Program
    mesh: Mesh
    source: str

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.name == name)

    def first(self, target: Any) -> fx.Node:
        return next(node for node in self.graph.nodes if node.target == target)

    def verify(self) -> None:
        verify(self.name, STAGE_AFTER[self.name], self.graph, self.program, self.mesh, self.source)


def left(case: str, name: str) -> Left:
    """A copy of what the pass called `name` left of a case."""
    c = snapshots(case)[name]
    graph = copied(c.lowered.read() if c.has("lowered") else c.program.graph)
    return Left(name, graph, replace(c.program), c.mesh, c.code() if c.has("code") else "")


def message_of(broken: Left, invariant: Invariant) -> list[str]:
    """The lines beneath the head of the error, which must name the pass and the invariant."""
    with pytest.raises(VerificationError) as caught:
        broken.verify()
    head, *lines = str(caught.value).splitlines()
    assert repr(broken.name) in head, head
    assert repr(invariant.name) in head and invariant.sentence in head, str(caught.value)
    return lines


def assert_breaks(broken: Left, invariant: Invariant, node: fx.Node, said: str) -> None:
    """The invariant fails, at the node, for the reason, with the four lines before and after it."""
    lines = message_of(broken, invariant)
    place = next(index for index, line in enumerate(lines) if line.startswith("    ^ "))
    assert lines[place].startswith(f"    ^ %{node.name}: ") and said in lines[place], "\n".join(lines)
    nodes = list(broken.graph.nodes)
    at = nodes.index(node)
    around = nodes[max(at - 4, 0) : at + 5]
    del lines[place]
    assert place - 1 == around.index(node) and len(lines) == len(around)
    for line, shown in zip(lines, around, strict=True):
        assert line.startswith("    return" if shown.op == "output" else f"    %{shown.name} = ")
