"""Calibrate: measure what this machine, or this cluster, computes and what its links carry, as a hardware file.

Every process of torchrun measures at the same time. So what devices share (memory, caches, the uplink of a node) counts
as shared, and the time of a measurement is that of the slowest rank. Collectives run as generated code runs them.

The formulas of `shardc/cost/collectives.py` are linear in the latency and in the seconds a byte of a link. Both are
fitted to the times of each collective separately, by non-negative least squares. An error is divided by the root of
its time. With absolute errors, latencies would not count; with relative ones, the large sizes, where the time goes,
would count little.

Links between nodes are measured twice: with one ring for every device of a node, side by side, and along an axis of
all ranks, which has a single ring. The formulas do not predict one of these well from the other.

Overlap and stall are fitted to a short and a long all-reduce. Each is started, and awaited after products of matrices
that take longer than it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from shardc.cost.collectives import ALGORITHMS, TEXTBOOK, Line, Wires, lines
from shardc.cost.hardware import Hardware, Link, hardware, this_hardware
from shardc.ir.report import Columns, Report, Section
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.collective import AnyCollective, wait
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.mesh.distributed import DistributedMesh, local_mesh

SIZES = tuple(4**k for k in range(5, 12))
"""Bytes of the local operand: 1 KiB to 4 MiB."""

OVERLAP_SIZES = (2**16, 2**20)
"""Bytes of the local operands of the all-reduces by which overlap is measured."""

LONGEST = 1.0
"""Seconds of one collective after which no larger size is tried."""

BLOCKS, BLOCK, REPEAT = 7, 0.05, 5000
"""A time is the median of `BLOCKS` blocks of calls. A block takes about `BLOCK` seconds and at most `REPEAT` calls."""
COMPUTING = 0.2
"""Seconds of a block of computing: long enough for every rank to have its turn where ranks share cores."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GLOO: dict[AnyCollective, tuple[str, ...]] = {**TEXTBOOK, reduce_scatter: (all_reduce.name,)}


@dataclass(frozen=True)
class Fit:
    """A link fitted to the times of one collective.

    `points` are bytes and seconds. `error` is the largest relative deviation of the α-β line from any of them, before
    the profile corrects it.
    """

    collective: AnyCollective
    link: Link
    points: tuple[tuple[float, float], ...]
    error: float


@dataclass(frozen=True)
class Measured:
    """A calibrated device and the fits behind its links, by level: `inside` nodes, `between` them, and `spanning` both.

    Levels that this run does not have are missing.
    """

    device: Hardware
    fits: Mapping[str, tuple[Fit, ...]]


def wiring(nodes: int, near: int = 1, inside: float = 0.0) -> Wires:
    """An axis with `near` ranks in each of `nodes` nodes, on which the unknown link costs one second a hop and a byte.

    The unknown link is `between`. Along an axis inside a node, ranks play the part of nodes. Inside a node, a hop takes
    `inside` seconds and bytes take no time.
    """
    return Wires(near, nodes, Line(inside, 0.0), Line(1.0, 1.0))


def fit(
    collective: AnyCollective, algorithm: str, wires: Wires, floor: float, points: Sequence[tuple[float, float]]
) -> Fit:
    """The link over which `algorithm` would take the times of `points` (bytes, seconds).

    `floor` seconds of each time, and the hops inside nodes (see `wiring`), are not the link's. At least two sizes are
    needed to tell latency from bandwidth.
    """
    unit, whole = (
        lines(collective, (algorithm,), wired)[0] for wired in (wires._replace(inside=Line(0.0, 0.0)), wires)
    )
    floor += whole.latency - unit.latency
    sizes, seconds = (np.array(column) for column in zip(*points, strict=True))
    roots = np.sqrt(seconds)
    hops, moved = unit.latency / roots, unit.per_byte * sizes / roots
    scale = moved.max()  # the solver needs both unknowns to be of similar size
    solution, _ = nnls(np.stack([hops, moved / scale], 1), np.maximum(seconds - floor, 0.0) / roots)
    latency, per_byte = float(solution[0]), float(solution[1] / scale)
    if not per_byte:  # latency hid the transfer, which so took at most a tenth of the time of the largest size
        per_byte = float(0.1 * seconds[-1] / (unit.per_byte * sizes[-1]))
    predicted = floor + unit.latency * latency + unit.per_byte * sizes * per_byte
    error = float(np.abs(predicted / seconds - 1).max())
    profile = tuple(zip(sizes.tolist(), (seconds / predicted).tolist(), strict=True))
    return Fit(collective, Link(latency, 1 / per_byte, profile=profile), tuple(points), error)


def calibrate(mesh: DistributedMesh, name: str) -> Measured:
    """Measure on all ranks of `mesh`, whose axes are called `node` and `local`. Every rank gets the same result."""
    crossing = _Crossing()
    if mesh.axes["node"] > 1:
        whole = local_mesh({"all": mesh.size})
        assert isinstance(whole, DistributedMesh)
        crossing = whole.run(lambda: _Benchmark(whole).crossing("all", mesh.axes["local"]), lambda _: ())[0]
    measured: list[Measured] = mesh.run(lambda: _Benchmark(mesh).measure(name, crossing), lambda _: ())
    return measured[0]


def layout_of_processes() -> dict[str, int]:
    """The axes that `calibrate` needs, from torchrun's environment variables: nodes, and processes on each node."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return {"node": world // local, "local": local}


@dataclass(frozen=True)
class _Crossing:
    """Measurements along an axis of all ranks, which crosses nodes.

    `overlapping` is the overlap and the stall (seconds). Least of these collectives hides, since every rank also passes
    on what crosses between nodes. `times` are bytes and seconds by collective; empty where nodes have one rank each,
    since then the axis between nodes is the same.
    """

    overlapping: tuple[float, float] = 0.0, 0.0
    times: Mapping[AnyCollective, list[tuple[float, float]]] = field(
        default_factory=dict[AnyCollective, list[tuple[float, float]]]
    )


class _Benchmark:
    """Measures on every rank, in step: all ranks agree on the number of repetitions."""

    def __init__(self, mesh: DistributedMesh) -> None:
        self.axes = mesh.axes
        self.device = mesh.device(mesh.rank)

    def measure(self, name: str, crossing: _Crossing) -> Measured:
        """Measure the device and its links. `crossing` has the measurements along an axis of all ranks."""
        launch = self.seconds(self._adding(4))
        elements = 2**26 if self.device.type == "cuda" else 2**23
        bandwidth = 2 * 4 * elements / self.seconds(self._adding(elements), COMPUTING)
        flops = {str(dtype).removeprefix("torch."): self.flops(dtype) for dtype in DTYPES}
        known = hardware(this_hardware())
        algorithms = GLOO if self.device.type == "cpu" else TEXTBOOK
        fits = self.fits(launch, algorithms, crossing)
        near, far = known.inside, known.between
        if "inside" in fits:
            overlap, stall = self.overlapping("local")
            near = replace(_link(fits["inside"], 1), overlap=overlap, stall=stall)
            far = replace(
                _link(fits["inside"], self.axes["local"]), overlap=overlap, stall=stall
            )  # nothing else is known
        if "between" in fits:
            far = _link(fits["between"], self.axes["local"], fits.get("spanning", ()))
            far = replace(far, overlap=crossing.overlapping[0], stall=crossing.overlapping[1])
            if "inside" not in fits:
                near = replace(_link(fits["between"], 1), overlap=far.overlap, stall=far.stall)
        per_node = self.axes["local"] if fits else known.devices_per_node
        start = 0.0 if fits else known.start
        numbers = start, self.memory(), algorithms, known.draws, known.stream
        return Measured(Hardware(name, flops, bandwidth, launch, per_node, near, far, *numbers), fits)

    def fits(
        self, launch: float, algorithms: Mapping[AnyCollective, tuple[str, ...]], crossing: _Crossing
    ) -> dict[str, tuple[Fit, ...]]:
        """The link as each collective uses it, by level. `launch` is in seconds."""
        levels: dict[str, tuple[Fit, ...]] = {}

        def add(
            level: str, times: Mapping[AnyCollective, list[tuple[float, float]]], nodes: int, near: int = 1
        ) -> None:
            hops = {one.collective: one.link.latency for one in levels.get("inside", ())}
            levels[level] = tuple(
                fit(
                    collective,
                    algorithms[collective][0],
                    wiring(nodes, near, hops.get(collective, 0.0)),
                    launch,
                    points,
                )
                for collective, points in times.items()
            )

        for level, axis in (("inside", "local"), ("between", "node")):
            if self.axes[axis] > 1:
                add(level, {collective: self.times(collective, axis) for collective in ALGORITHMS}, self.axes[axis])
        if crossing.times:
            add("spanning", crossing.times, self.axes["node"], self.axes["local"])
        return levels

    def crossing(self, axis: str, near: int) -> _Crossing:
        """Measure along an axis of all ranks, `near` of them in a node."""
        times = {collective: self.times(collective, axis, near) for collective in ALGORITHMS} if near > 1 else {}
        return _Crossing(self.overlapping(axis), times)

    def times(self, collective: AnyCollective, axis: str, near: int = 1) -> list[tuple[float, float]]:
        """Bytes and seconds of one collective, by ascending size; `near` as in `point`."""
        points: list[tuple[float, float]] = []
        for size in SIZES:
            point = self.point(collective, axis, size, near)
            if points and point[0] == points[-1][0]:
                continue  # among many ranks, several small sizes are rounded up to the same one
            points.append(point)
            if points[-1][1] > LONGEST and len(points) > 1:
                break
        return points

    def point(self, collective: AnyCollective, axis: str, size: float, near: int = 1) -> tuple[float, float]:
        """Bytes of the local operand, about `size` but a multiple of the number of ranks, and seconds.

        A permute sends to the rank `near` further on. Where `near` ranks of the axis are in a node, all of it crosses.
        """
        ranks = self.axes[axis]
        x = torch.ones(max(1, round(size / 4 / ranks)) * ranks, device=self.device)
        keywords = {**collective.sample(ranks, near), "axis": axis}
        return x.numel() * 4.0, self.seconds(lambda: collective(x, **keywords))

    def overlapping(self, axis: str) -> tuple[float, float]:
        """The `overlap` (0 to 1) and `stall` (seconds) of a link, fitted to the visible time of all-reduces."""
        times = [self.visible(axis, size) for size in OVERLAP_SIZES]
        weights = [1 / math.sqrt(alone) for alone, _ in times]
        rows = [(weight, weight * alone) for weight, (alone, _) in zip(weights, times, strict=True)]
        stall, part = nnls(rows, [weight * visible for weight, (_, visible) in zip(weights, times, strict=True)])[0]
        return (1.0 - float(part), float(stall)) if part < 1.0 else (0.0, 0.0)

    def visible(self, axis: str, size: int) -> tuple[float, float]:
        """Seconds of an all-reduce alone, and the seconds that it adds to products of matrices that take longer."""
        x, y = (torch.ones(size, device=self.device) for size in ((size // 4,), (256, 256)))

        def alone() -> Tensor:
            return all_reduce(x, axis=axis)

        sent = self.seconds(alone)
        products = range(math.ceil(2 * sent / self.seconds(lambda: y @ y, COMPUTING)))

        def compute() -> list[Tensor]:
            return [y @ y for _ in products]

        def both() -> None:
            started = all_reduce.start(x, axis=axis)
            compute()
            wait(started)

        repeat = max(1, int(COMPUTING / sent))
        rounds = [[self.slowest(self._block(call, repeat)) for call in (alone, compute, both)] for _ in range(BLOCKS)]
        added = statistics.median((b - c) / a for a, c, b in rounds)
        return sent, max(added, 0.0) * sent

    def flops(self, dtype: torch.dtype) -> float:
        """Flops a second of a product of square matrices, large enough to take more than 5 ms."""
        size = 64
        while True:
            size *= 2
            x = torch.ones(size, size, dtype=dtype, device=self.device)
            if self.seconds(lambda x=x: x @ x) > 5e-3 or size >= 8192:
                return 2 * size**3 / self.seconds(lambda x=x: x @ x, COMPUTING)

    def memory(self) -> float:
        """Bytes of the device's memory; on a CPU, the share of one process."""
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / self.axes["local"]

    def seconds(self, call: Callable[[], object], block: float = BLOCK) -> float:
        """Seconds of one of many calls back to back, on the slowest rank."""
        call()
        once = self.slowest(self._block(call, 1))
        repeat = max(1, min(REPEAT, int(block / once)))
        return statistics.median(self.slowest(self._block(call, repeat)) for _ in range(BLOCKS)) / repeat

    def slowest(self, seconds: float) -> float:
        """The largest `seconds` of all ranks. No rank goes on before all have come here."""
        longest = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        for axis in self.axes:
            longest = all_reduce(longest, axis=axis, op="max")
        return max(longest.item(), 1e-9)

    def _block(self, call: Callable[[], object], repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _adding(self, elements: int) -> Callable[[], object]:
        x = torch.ones(elements, device=self.device)
        return lambda: x + 1


def _link(fits: Sequence[Fit], rings: int, spanning: Sequence[Fit] = ()) -> Link:
    """The link of one level. `rings` rings shared it while `fits` were measured, and one had it while `spanning` were.

    The link's own latency and bandwidth are those of the all-reduce. They hold for collectives without a measurement.
    """
    measured = {one.collective: replace(one.link, bandwidth=one.link.bandwidth * rings) for one in fits}
    alone = {one.collective: one.link for one in spanning}
    return replace(measured[all_reduce], profile=(), measured=measured, spanning=alone)


def toml(measured: Measured) -> str:
    """The text of the hardware file."""
    device = measured.device
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    ranks = f"{chip}, {device.devices_per_node} processes a node, torch {torch.__version__}"
    text = [f"# Measured by `shardc calibrate`: {ranks}.", *_numbers(device)]
    text += ["", "[flops] # per second, of a square product of matrices"]
    text += [f"{dtype} = {rate:.4g}" for dtype, rate in device.flops.items()]
    text += ["", *_level("inside", device.inside, measured.fits)]
    text += ["", *_level("between", device.between, measured.fits)]
    text += ["", "[algorithms]"]
    text += [f"{one.name} = {json.dumps(choice)}" for one, choice in device.algorithms.items()]
    return "\n".join(text) + "\n"


def _numbers(device: Hardware) -> list[str]:
    return [
        f"memory = {device.memory:.4g} # bytes",
        f"memory_bandwidth = {device.memory_bandwidth:.4g} # bytes/s, read and written by an addition",
        f"launch = {device.launch:.4g} # s, an addition of 4 elements",
        f"start = {device.start:.4g} # s, a collective in addition to its hops",
        f"devices_per_node = {device.devices_per_node}",
        *([f"draws = {device.draws:.4g} # random numbers/s, not measured"] if math.isfinite(device.draws) else []),
        *([f"stream = {device.stream:.4g} # the same, not measured"] if math.isfinite(device.stream) else []),
    ]


def _level(level: str, link: Link, fits: Mapping[str, Sequence[Fit]]) -> list[str]:
    whose = "device" if level == "inside" else "node"
    remark = "those of all_reduce below" if level in fits else "not measured: this run had no such link"
    rows = [f"[{level}] # s a hop, bytes/s a {whose}; {remark}", *_pair(link)]
    reach = " and ".join(map(str, OVERLAP_SIZES))
    rows.append(f"overlap = {link.overlap:.2f} # of all-reduces of {reach} bytes, beside products of matrices")
    rows.append(f"stall = {link.stall:.4g} # s, for each of them in addition")
    for part, links, source in (("measured", link.measured, level), ("spanning", link.spanning, "spanning")):
        errors = {one.collective: one for one in fits.get(source, ())}
        for collective, one in links.items():
            rows += ["", f"[{level}.{part}.{collective.name}]"]
            if collective in errors:
                sizes = errors[collective].points
                reach = f"{sizes[0][0]:.0f} to {sizes[-1][0]:.0f} bytes"
                rows[-1] += f" # fitted to {len(sizes)} sizes, {reach}, largest error {errors[collective].error:.0%}"
            rows += _pair(one)
            if one.profile:
                ratios = ", ".join(f"[{size:.0f}, {ratio:.4g}]" for size, ratio in one.profile)
                rows.append(f"profile = [{ratios}] # measured over fitted, by bytes of the operand")
    return rows


def _pair(link: Link) -> list[str]:
    return [f"latency = {link.latency:.4g}", f"bandwidth = {link.bandwidth:.4g}"]


LEVELS = {
    "inside": "links inside a node",
    "between": "links between nodes",
    "spanning": "links along an axis that spans nodes",
}


def report(measured: Measured) -> Report:
    """What was measured, for people."""
    device = measured.device
    speeds = Columns([(dtype, f"{rate / 1e9:.1f} Gflop/s") for dtype, rate in device.flops.items()], "<>")
    sections = [Section("products of matrices", speeds)]
    for level, fits in measured.fits.items():
        link = device.inside if level == "inside" else device.between
        links = link.spanning if level == "spanning" else link.measured
        rows = [("collective", "a hop", "bandwidth", "largest error of the fit")]
        for one in fits:
            fitted = links[one.collective]
            hop, bandwidth = fitted.latency * 1e6, fitted.bandwidth / 1e9
            rows.append((one.collective.name, f"{hop:.1f} us", f"{bandwidth:.3f} GB/s", f"{one.error:.0%}"))
        sections.append(Section(LEVELS[level], Columns(rows, "<>>>")))
        if level != "spanning":
            hidden = f"{link.overlap:.0%} of a collective's time can hide behind computing"
            sections.append(Section("", [f"{hidden}, except {link.stall * 1e6:.1f} us of each"]))
    head = f"launch {device.launch * 1e6:.1f} us, memory {device.memory_bandwidth / 1e9:.1f} GB/s"
    return Report([head], sections)
