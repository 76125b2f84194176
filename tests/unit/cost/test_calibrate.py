"""What `shardc calibrate` makes of what it measures: links, profiles, overlap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardc.cost import calibrate
from shardc.cost.calibrate import fit, wiring
from shardc.cost.collectives import ALGORITHMS, BY_NAME, TEXTBOOK
from shardc.cost.hardware import Hardware, Link, hardware
from shardc.ir.mesh import Mesh
from shardc.runtime import all_gather, all_reduce
from shardc.runtime.collectives.collective import AnyCollective

PLAIN = Hardware("plain", {"float32": 1e12}, 1e12, 0.0, 8, Link(1e-6, 100e9), Link(1e-5, 80e9))
GOOD = (Path(__file__).parents[3] / "shardc/cost/hardware/h100.toml").read_text()


class _Told(calibrate._Benchmark):  # pyright: ignore[reportPrivateUsage]  # its measurements, without processes
    """Seconds of all-reduces alone, and what they add to computing, by size."""

    def __init__(self, seconds: dict[int, tuple[float, float]]) -> None:
        self.told = seconds

    def visible(self, axis: str, size: int) -> tuple[float, float]:
        return self.told[size]


SHORT, LONG = calibrate.OVERLAP_SIZES


@pytest.mark.parametrize(
    ("short", "long", "overlap", "stall"),
    [
        ((1e-3, 0.9e-3), (2e-2, 4.7e-3), 0.8, 0.7e-3),  # a fifth of each, and 0.7 ms
        ((1e-3, 0.2e-3), (2e-2, 4e-3), 0.8, 0.0),
        ((1e-3, 0.0), (2e-2, 0.0), 1.0, 0.0),
        ((1e-3, 1.5e-3), (2e-2, 2.5e-2), 0.0, 0.0),  # beside computing they take longer than alone
    ],
)
def test_overlap_and_stall(short: tuple[float, float], long: tuple[float, float], overlap: float, stall: float) -> None:
    found = _Told({SHORT: short, LONG: long}).overlapping("dp")
    assert found == (pytest.approx(overlap), pytest.approx(stall, abs=1e-9))


@pytest.mark.parametrize("kind", ALGORITHMS, ids=list(BY_NAME))
def test_a_fit_finds_the_link_that_made_the_times(kind: AnyCollective) -> None:
    device, mesh = replace(PLAIN, inside=Link(3e-5, 2e9)), Mesh.parse("tp=4")
    times = [(size, device.collective_seconds(kind, size, mesh, "tp") + 1e-6) for size in (1e3, 1e4, 1e5, 1e6)]
    found = fit(kind, TEXTBOOK[kind][0], wiring(4), 1e-6, times)
    assert found.link.latency == pytest.approx(3e-5) and found.link.bandwidth == pytest.approx(2e9)
    assert found.error < 1e-6


@pytest.mark.parametrize("kind", ALGORITHMS, ids=list(BY_NAME))
def test_a_fit_along_an_axis_that_spans_nodes_finds_the_link_between_them(kind: AnyCollective) -> None:
    far = Link(7e-5, 5e7)
    device, mesh = replace(PLAIN, inside=Link(3e-5, 2e9), between=far, devices_per_node=2), Mesh.parse("all=6")
    times = [(size, device.collective_seconds(kind, size, mesh, "all")) for size in (1e3, 1e4, 1e5, 1e6)]
    found = fit(kind, TEXTBOOK[kind][0], wiring(3, 2, 3e-5), device.launch + device.start, times)
    assert found.link.latency == pytest.approx(far.latency) and found.link.bandwidth == pytest.approx(far.bandwidth)


def test_a_profile_gives_the_times_that_were_measured_and_what_lies_between_them(tmp_path: Path) -> None:
    mesh, times = Mesh.parse("tp=4"), [(1e3, 5e-3), (1e5, 1e-2), (1e6, 4e-1)]
    found = fit(all_gather, "ring", wiring(4), PLAIN.launch, times)
    assert found.error > 0.1  # no straight line

    def seconds(size: float) -> float:
        device = replace(PLAIN, inside=replace(PLAIN.inside, measured={all_gather: found.link}))
        return device.collective_seconds(all_gather, size, mesh, "tp")

    for size, measured in times:
        assert seconds(size) == pytest.approx(measured)
    (_, low), (_, high) = found.link.profile[1:]
    assert found.link.strays(10**5.5) == pytest.approx((low + high) / 2)
    assert found.link.strays(0.0) == found.link.profile[0][1] and found.link.strays(1e9) == high
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace("[between]", "profile = [[1000, 2.0]]\n[between]"))
    mine, plain = hardware(path), hardware("h100")
    args = all_reduce, 5e3, mesh, "tp"
    assert mine.collective_seconds(*args) == pytest.approx(2.0 * plain.collective_seconds(*args))


def test_a_fit_to_noise_has_a_bandwidth_all_the_same() -> None:
    """Small calls of a slow backend show nothing but latency; a bandwidth of zero or of infinity would be no link."""
    found = fit(all_gather, "ring", wiring(2), 1e-6, [(1e3, 2e-3), (2e3, 1e-3)])
    assert 0 < found.link.bandwidth < float("inf") and found.error < 1
    floor = fit(all_gather, "ring", wiring(2), 1.0, [(1e3, 2e-3), (2e3, 1e-3)])
    assert floor.link.latency == 0.0  # all is within it
