"""Gradients that travel in buckets are those of a single device, and cost what the plan says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks.meter import metered
from shardc.cost.buckets import Buckets
from shardc.cost.hardware import Hardware, hardware
from shardc.ir.partition import partition
from shardc.ir.program import Program
from shardc.ir.versions import GraphVersion
from shardc.passes import schedule
from shardc.passes.bucket import Joined

Case = tuple[nn.Module, tuple[Tensor, ...]]


class Tied(nn.Module):
    """A table that is also the last product, a parameter that nothing reads, and one that wants no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.mix = nn.Embedding(48, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.unused, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(16), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.table(ids) + self.mix(self.table(ids)) * self.frozen)
        return nn.functional.cross_entropy((hidden @ self.table.weight.t()).flatten(0, 1), ids.flatten())


class Mixed(nn.Module):
    """Half of it in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(8, 24).double(), nn.Linear(24, 8), nn.Linear(8, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.narrow(self.wide(x).tanh().float()).tanh().double()).square().mean()


class Tower(nn.Module):
    """Products of odd sizes, whose cuts leave padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 9), nn.Tanh(), nn.Linear(9, 5)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def tied() -> Case:
    return Tied().double(), (torch.randint(0, 48, (64, 32)),)


def mixed() -> Case:
    return Mixed(), (torch.randn(1024, 8, dtype=torch.float64),)


def tower() -> Case:
    return Tower(), (torch.randn(2048, 7, dtype=torch.float64),)


def slow() -> Hardware:
    """Where it pays to split the work, and to send few messages."""
    cpu = hardware("cpu")
    return replace(cpu, inside=replace(cpu.inside, latency=1e-3), flops={"float32": 1e5})


def gradients(model: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    call(*inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        tolerance = 1e-10 if one.dtype == torch.float64 and not name.startswith("wide") else 1e-5
        assert (found[name] - one).norm() <= tolerance * max(float(one.norm()), 1.0), name


WHOLE = {"*weight": (None, None), "*bias": (None,)}
BATCH = {name: ("dp", None) for name in ("wide", "narrow", "last")}
ROWS = {f"layers.{layer}": ("dp", None) for layer in (0, 2, 4)}
SPLIT = {"layers.0.weight": ("dp", None), "layers.2.weight": (None, "dp"), "layers.4.weight": ("dp", None)}


@pytest.mark.parametrize("mesh", ["dp=4", "dp=2,tp=2", "dp=3"])
@pytest.mark.parametrize(
    ("case", "constraints"),
    [(tied, {}), (mixed, WHOLE | BATCH), (tower, WHOLE | ROWS), (tower, SPLIT | ROWS)],
    ids=["tied", "mixed", "whole", "split"],
)
def test_gradients(
    case: Callable[[], Case], constraints: dict[str, Any], mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on one device; to the last bit as without buckets, and as many bytes."""
    torch.manual_seed(0)
    monkeypatch.setattr(Hardware, "hiding", lambda *_: ())  # no ring of sums in place of a reduction
    model, inputs = case()
    expected = gradients(model, model, inputs)

    def compiled() -> tuple[shardc.Compiled, dict[str, Tensor]]:
        own = copy.deepcopy(model)
        made = shardc.compile(own, mesh, inputs, hardware=slow(), constraints=constraints)
        return made, gradients(own, made, inputs)

    one, found = compiled()
    assert "_reduce_bucket" in one.code or "_scatter_bucket" in one.code
    close(found, expected)
    assert one.executable.mesh.traffic == pytest.approx(one.plan.bytes_per_axis)
    monkeypatch.setattr(schedule, "bucketed", unjoined)
    other, alone = compiled()
    assert "_reduce_bucket" not in other.code and "_scatter_bucket" not in other.code
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert other.executable.mesh.traffic == pytest.approx(one.executable.mesh.traffic)
    assert one.plan.predicted < other.plan.predicted
    assert one.plan.cost == other.plan.cost


def unjoined(localized: GraphVersion, program: Program, buckets: Buckets, apart: bool) -> tuple[GraphVersion, Joined]:
    return localized, Joined(0, partition(localized.read(), program), 0.0)


def test_a_small_model_sends_its_gradients_at_once() -> None:
    torch.manual_seed(0)
    model = Tower()
    x = torch.randn(2048, 7, dtype=torch.float64)
    compiled = shardc.compile(model, "dp=2", (x,), hardware="cpu")
    backward = compiled.code.split("def backward")[1]
    assert backward.count("all_reduce_bucket(") == 1 and backward.count("all_reduce(") == 0
    (sent,) = [c for c in compiled.plan.conversions if c.phase == "backward"]
    assert sent.sent == sum(p.nbytes for p in model.parameters())
    assert "5 more" in sent.value
    assert compiled.plan.predicted == pytest.approx(compiled.plan.cost - compiled.plan.simplified, rel=1e-9)


def test_gradients_add_up_and_can_be_written_to() -> None:
    torch.manual_seed(0)
    model = Tower()
    x = torch.randn(64, 7, dtype=torch.float64)
    expected = gradients(model, model, (x,))
    compiled = shardc.compile(model, "dp=2", (x,), hardware=slow())
    model.zero_grad()
    for _ in range(3):
        compiled(x).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    close({name: p.grad / 3 for name, p in model.named_parameters() if p.grad is not None}, expected)
    torch.optim.AdamW(model.parameters()).step()


class Wide(nn.Module):
    """Its weights take more memory than what it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def test_memory() -> None:
    """The buffer of a bucket counts, and buckets are as large as a budget allows."""
    torch.manual_seed(0)
    x = torch.randn(8, 64)

    def compiled(**more: Any) -> shardc.Compiled:
        return shardc.compile(Wide(), "dp=2", (x,), hardware=slow(), constraints=WHOLE, **more)

    free = compiled(memory="unbounded")
    assert free.code.count("= all_reduce_bucket(") == 1
    meters = metered(free.executable.module)
    free(x).backward()
    assert free.plan.memory.peak == pytest.approx(min(meter.peak for meter in meters.values()), rel=0.05)
    peak = compiled(memory="1GB").plan.memory.peak
    expected = {1.0: 1, 0.9: 2, 0.75: 2}
    for part, buckets in expected.items():
        tight = compiled(memory=part * peak)
        assert tight.plan.memory.peak <= part * peak
        assert tight.code.count("= all_reduce_bucket(") == buckets
