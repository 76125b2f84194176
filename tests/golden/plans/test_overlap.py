"""The IR that the overlap pass reads and writes."""

from __future__ import annotations

import math
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
    return made_for(machine(overlap), case)


def made_for(device: Hardware, case: str) -> shardc.Compiled:
    mesh, constraints = CASES[case]
    with torch.device("meta"):
        model, x = Layers(), torch.empty(4096, 256)
        return shardc.compile(model, mesh, (x,), hardware=device, constraints=constraints)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_overlap(case: str, golden: Callable[[str, str], None]) -> None:
    """Gradients are reduced beneath backward; weights gathered beneath the layer before; a reduction over a second axis
    follows the one over the first."""
    graph = compiled(case, 1.0).graph
    golden(case, f"after bucket\n\n{graph('bucket')}\nafter overlap\n\n{graph('overlap')}")


def test_nothing_is_started_over_a_link_that_hides_nothing() -> None:
    found = compiled("levels", 0.0)
    assert found.graph("overlap") == found.graph("bucket") and ".start(" not in found.code


def near_and_far(stall: float = 0.0) -> Hardware:
    """Nothing hides inside nodes of two, whose links start slowly; between them all that takes longer than `stall`."""
    inside = replace(machine(0.0).inside, bandwidth=1e12, latency=1e-3)
    return replace(machine(0.0), inside=inside, between=replace(machine(1.0).inside, stall=stall), devices_per_node=2)


def test_what_follows_what_nothing_hides_is_started_beneath_backward() -> None:
    """Gradients are reduced in nodes, then between nodes. A bucket would save latency in nodes; all the same gradients
    do not wait there for one another: between nodes it would cost more than that."""
    made = made_for(near_and_far(), "levels")
    order = [line.split()[0] for line in made.graph("overlap").splitlines() if line.strip()]
    starts = [place for place, name in enumerate(order) if name.startswith("%all_reduce")]
    products = [place for place, name in enumerate(order) if name.startswith("%mm")]
    assert "bucket" not in made.graph("bucket") and made.code.count("all_reduce.start(") >= 2
    assert sum(start < products[-1] for start in starts) >= 2


def test_buckets_are_those_that_take_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gradients wait in nodes for one another depends on what the links between nodes take."""
    device, gained = near_and_far(), list[float]()
    devices = [replace(device, between=replace(device.between, bandwidth=10.0**size)) for size in (7, 7.5, 8, 9, 10)]
    free = [made_for(device, "levels").plan for device in devices]
    monkeypatch.setattr("shardc.passes.schedule.AT_STAKE", math.inf)
    for one, device in zip(free, devices, strict=True):
        gained.append(1.0 - one.predicted / made_for(device, "levels").plan.predicted)
    assert gained[0] > 0.0 and gained[-1] == 0.0 and min(gained) >= 0.0


def test_what_saves_more_in_a_bucket_than_it_holds_back_stays_there() -> None:
    device = near_and_far()
    fast = replace(device, between=replace(device.between, bandwidth=1e10))
    assert "reduce_scatter_bucket" in made_for(fast, "levels").graph("bucket")


class Scaled(nn.Module):
    """A number of another dtype, whose gradient fits into no bucket of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.float()


def test_a_short_one_behind_others_on_its_axis_is_not_waited_for() -> None:
    """Alone it would not be worth its stall; but the rank would have to wait for all that is under way."""
    inside, short = replace(machine(1.0).inside, bandwidth=1e7, latency=1e-4), 2.1e-4
    layers = [nn.Linear(256, 256, bias=False, device="meta") for _ in range(6)]
    model = nn.Sequential(*layers[:5], Scaled().to("meta"), layers[5])
    told = {"*.weight": (None, None)} | {str(layer): ("dp", None) for layer in range(7)}

    def predicted(stall: float) -> float:
        device, x = replace(machine(1.0), inside=replace(inside, stall=stall)), torch.empty(4096, 256, device="meta")
        return shardc.compile(model, "dp=2", (x,), hardware=device, constraints=told).plan.predicted

    assert predicted(short) < predicted(0.0) + 7 * short  # once for each gradient


def test_what_is_shorter_than_its_stall_is_not_started() -> None:
    made = made_for(near_and_far(stall=1.0), "levels")
    assert ".start(" not in made.code and made.plan.hidden == 0.0


def test_the_same_on_every_rank() -> None:
    """Ranks that start collectives in another order fail, or compute nonsense: the order of equals is no accident."""
    device = replace(machine(1.0), inside=replace(machine(1.0).inside, latency=0.0), launch=0.0)
    found, told = set[str](), {str(layer): ("dp", None) for layer in range(4)}
    for _ in range(4):
        with torch.device("meta"):
            model, x = nn.Sequential(*(nn.LayerNorm(64) for _ in range(4))), torch.empty(4096, 64)
            made = shardc.compile(model, "dp=2", (x,), hardware=device, constraints=told)
        found.add(made.code)
        assert made.graph("overlap").count("= wait(") >= 6
    assert len(found) == 1


@pytest.mark.parametrize("case", CASES)
def test_what_is_hidden(case: str) -> None:
    """A link that hides its time makes the step shorter, by no more than it takes, and never costs a plan more."""
    slow, half, free = (compiled(case, overlap).plan for overlap in (0.0, 0.5, 1.0))
    assert slow.hidden == 0.0 and slow.predicted == pytest.approx(slow.compute + sent(slow))
    assert 0.0 < free.hidden <= sent(free) and "hidden" in str(free) and "hidden" not in str(slow)
    assert free.predicted < half.predicted < slow.predicted
    assert free.cost < half.cost < slow.cost and free.check() == pytest.approx(free.cost)


def sent(plan: shardc.Plan) -> float:
    return sum(conversion.seconds for conversion in plan.conversions)
