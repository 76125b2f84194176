"""Calibrate: measure what this machine, or this cluster, computes and what its links carry, as a hardware file.

Every process of torchrun measures at the same time, so that what devices share (memory, caches, the uplink of a node)
counts as shared, and the slowest rank counts. Collectives run as generated code runs them. The formulas of
`shardc/cost/collectives.py` are linear in the latency and in the seconds a byte of a link, and these are fitted to the
times for each kind of collective on its own, by least squares of errors over the roots of the times: between absolute
errors, by which latencies would not count, and relative ones, by which large sizes, where the time goes, count little.
Links between nodes are measured twice: with a ring for every device of a node, side by side, and along an axis of all
ranks, whose one ring they share, which may take more or less than formulas make of the other.
What part of collectives hides beneath other work, and what each stalls it, is fitted to a short and a long one that are
started, and awaited after computing for longer than they take.
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

BENEATH = (2**16, 2**20)
"""Bytes of the local operands of the all-reduces that are to be hidden."""

LONGEST = 1.0
"""Seconds of one collective after which no larger size is tried."""

BLOCKS, BLOCK, REPEAT = 7, 0.05, 5000
"""A time is the median of this many blocks of calls, each of about so many seconds and at most so many calls."""
COMPUTING = 0.2
"""Seconds of a block of what ranks compute: where they share cores, all of them have to be seen in it, by turns."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GLOO: dict[AnyCollective, tuple[str, ...]] = {**TEXTBOOK, reduce_scatter: (all_reduce.name,)}


@dataclass(frozen=True)
class Fit:
    """A link fitted to times of one kind of collective: the `points` are bytes and seconds, `error` the largest
    deviation of α and β from any of them, relative, before the profile."""

    kind: AnyCollective
    link: Link
    points: tuple[tuple[float, float], ...]
    error: float


@dataclass(frozen=True)
class Measured:
    """A calibrated device and the fits behind its links: those `inside` nodes, `between` them, and along axes that are
    `spanning` both; levels that this run does not have are missing."""

    device: Hardware
    fits: Mapping[str, tuple[Fit, ...]]


def wiring(nodes: int, near: int = 1, inside: float = 0.0) -> Wires:
    """An axis with `near` ranks in each of `nodes` nodes, where a hop takes `inside` seconds, and no byte any time that
    counts. On the link that is to be found, between nodes or, along an axis inside one, between ranks that stand for
    nodes, a hop and a byte take a second each."""
    return Wires(near, nodes, Line(inside, 0.0), Line(1.0, 1.0))


def fit(kind: AnyCollective, algorithm: str, wires: Wires, floor: float, points: Sequence[tuple[float, float]]) -> Fit:
    """The link over which `algorithm` takes the times of `points` (bytes, seconds), `floor` seconds of each apart, and
    the hops inside nodes (see `wiring`). At least two sizes are needed to tell latency from bandwidth."""
    unit, whole = (lines(kind, (algorithm,), wired)[0] for wired in (wires._replace(inside=Line(0.0, 0.0)), wires))
    floor += whole.latency - unit.latency
    sizes, seconds = (np.array(column) for column in zip(*points, strict=True))
    roots = np.sqrt(seconds)
    hops, moved = unit.latency / roots, unit.per_byte * sizes / roots
    scale = moved.max()  # seconds a hop and seconds a byte lie far apart
    found, _ = nnls(np.stack([hops, moved / scale], 1), np.maximum(seconds - floor, 0.0) / roots)
    latency, per_byte = float(found[0]), float(found[1] / scale)
    if not per_byte:  # latency is all there was to see: moving the bytes was no more than a tenth of the largest size's
        per_byte = float(0.1 * seconds[-1] / (unit.per_byte * sizes[-1]))
    predicted = floor + unit.latency * latency + unit.per_byte * sizes * per_byte
    error = float(np.abs(predicted / seconds - 1).max())
    profile = tuple(zip(sizes.tolist(), (seconds / predicted).tolist(), strict=True))
    return Fit(kind, Link(latency, 1 / per_byte, profile=profile), tuple(points), error)


def calibrate(mesh: DistributedMesh, name: str) -> Measured:
    """Measure on all ranks of `mesh`, whose axes are called `node` and `local`. The same on every rank."""
    crossing = _Crossing()
    if mesh.axes["node"] > 1:
        whole = local_mesh({"all": mesh.size})
        assert isinstance(whole, DistributedMesh)
        crossing = whole.run(lambda: _Bench(whole).crossing("all", mesh.axes["local"]), lambda _: ())[0]
    measured: list[Measured] = mesh.run(lambda: _Bench(mesh).measure(name, crossing), lambda _: ())
    return measured[0]


def layout_of_processes() -> dict[str, int]:
    """The axes that `calibrate` needs, from torchrun's variables: processes on every node, and nodes."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return {"node": world // local, "local": local}


@dataclass(frozen=True)
class _Crossing:
    """What collectives of all ranks take: least of them hides, since each also passes on what crosses between nodes;
    bytes and seconds by kind, where they differ from those of an axis between nodes."""

    overlapping: tuple[float, float] = 0.0, 0.0
    times: Mapping[AnyCollective, list[tuple[float, float]]] = field(
        default_factory=dict[AnyCollective, list[tuple[float, float]]]
    )


class _Bench:
    """Runs on every rank, in step: what decides about repetitions is agreed upon."""

    def __init__(self, mesh: DistributedMesh) -> None:
        self.axes = mesh.axes
        self.device = mesh.device(mesh.rank)

    def measure(self, name: str, crossing: _Crossing) -> Measured:
        """All of it, given the collectives that cross between nodes."""
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
            far = replace(_link(fits["inside"], self.axes["local"]), overlap=overlap, stall=stall)  # all that is known
        if "between" in fits:
            far = _link(fits["between"], self.axes["local"], fits.get("spanning", ()))
            far = replace(far, overlap=crossing.overlapping[0], stall=crossing.overlapping[1])
            if "inside" not in fits:
                near = replace(_link(fits["between"], 1), overlap=far.overlap, stall=far.stall)
        per_node = self.axes["local"] if fits else known.devices_per_node
        start = 0.0 if fits else known.start
        device = Hardware(name, flops, bandwidth, launch, per_node, near, far, start, self.memory(), algorithms)
        return Measured(device, fits)

    def fits(
        self, launch: float, algorithms: Mapping[AnyCollective, tuple[str, ...]], crossing: _Crossing
    ) -> dict[str, tuple[Fit, ...]]:
        """What each kind of collective makes of the links, by level."""
        found: dict[str, tuple[Fit, ...]] = {}

        def add(
            level: str, times: Mapping[AnyCollective, list[tuple[float, float]]], nodes: int, near: int = 1
        ) -> None:
            hops = {one.kind: one.link.latency for one in found.get("inside", ())}
            found[level] = tuple(
                fit(kind, algorithms[kind][0], wiring(nodes, near, hops.get(kind, 0.0)), launch, points)
                for kind, points in times.items()
            )

        for level, axis in (("inside", "local"), ("between", "node")):
            if self.axes[axis] > 1:
                add(level, {kind: self.times(kind, axis) for kind in ALGORITHMS}, self.axes[axis])
        if crossing.times:
            add("spanning", crossing.times, self.axes["node"], self.axes["local"])
        return found

    def crossing(self, axis: str, near: int) -> _Crossing:
        """What is measured along an axis of all ranks, `near` of them in a node."""
        times = {kind: self.times(kind, axis, near) for kind in ALGORITHMS} if near > 1 else {}
        return _Crossing(self.overlapping(axis), times)

    def times(self, kind: AnyCollective, axis: str, near: int = 1) -> list[tuple[float, float]]:
        """Bytes and seconds of one kind of collective; `near` as of `collective`."""
        points: list[tuple[float, float]] = []
        for size in SIZES:
            point = self.collective(kind, axis, size, near)
            if points and point[0] == points[-1][0]:
                continue  # among many ranks small sizes are rounded to the same
            points.append(point)
            if points[-1][1] > LONGEST and len(points) > 1:
                break
        return points

    def collective(self, kind: AnyCollective, axis: str, size: float, near: int = 1) -> tuple[float, float]:
        """Bytes of the local operand, rounded to what the ranks can share, and seconds. Permutations move everything
        `near` ranks on: with so many of the axis in a node, all of it crosses."""
        ways = self.axes[axis]
        x = torch.ones(max(1, round(size / 4 / ways)) * ways, device=self.device)
        told = {**kind.sample(ways, near), "axis": axis}
        return x.numel() * 4.0, self.seconds(lambda: kind(x, **told))

    def overlapping(self, axis: str) -> tuple[float, float]:
        """The `overlap` and `stall` of a link, fitted to what is left of all-reduces beside products of matrices."""
        found = [self.left(axis, size) for size in BENEATH]
        weights = [1 / math.sqrt(alone) for alone, _ in found]
        rows = [(weight, weight * alone) for weight, (alone, _) in zip(weights, found, strict=True)]
        stall, part = nnls(rows, [weight * left for weight, (_, left) in zip(weights, found, strict=True)])[0]
        return (1.0 - float(part), float(stall)) if part < 1.0 else (0.0, 0.0)

    def left(self, axis: str, size: int) -> tuple[float, float]:
        """Seconds of an all-reduce alone, and how many it adds to products of matrices that take longer than it."""
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
        """Flops a second of a square product, large enough to take a while."""
        size = 64
        while True:
            size *= 2
            x = torch.ones(size, size, dtype=dtype, device=self.device)
            if self.seconds(lambda x=x: x @ x) > 5e-3 or size >= 8192:
                return 2 * size**3 / self.seconds(lambda x=x: x @ x, COMPUTING)

    def memory(self) -> float:
        """Bytes of the device; of a CPU, a process's share."""
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / self.axes["local"]

    def seconds(self, call: Callable[[], object], block: float = BLOCK) -> float:
        """Seconds of a call among calls back to back, on the slowest rank."""
        call()
        once = self.slowest(self._block(call, 1))
        repeat = max(1, min(REPEAT, int(block / once)))
        return statistics.median(self.slowest(self._block(call, repeat)) for _ in range(BLOCKS)) / repeat

    def slowest(self, seconds: float) -> float:
        """The largest of all ranks' seconds; no rank goes on before all have come here."""
        found = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        for axis in self.axes:
            found = all_reduce(found, axis=axis, op="max")
        return max(found.item(), 1e-9)

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
    """The link of one level. `rings` devices ran rings side by side and shared it, but for those that were `spanning`,
    which had it alone; its own figures, for kinds that were not measured, are those of an all-reduce."""
    measured = {one.kind: replace(one.link, bandwidth=one.link.bandwidth * rings) for one in fits}
    alone = {one.kind: one.link for one in spanning}
    return replace(measured[all_reduce], profile=(), measured=measured, spanning=alone)


def toml(measured: Measured) -> str:
    """The hardware file."""
    device = measured.device
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    ranks = f"{kind}, {device.devices_per_node} processes a node, torch {torch.__version__}"
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
        f"start = {device.start:.4g} # s, a collective besides its hops",
        f"devices_per_node = {device.devices_per_node}",
    ]


def _level(level: str, link: Link, fits: Mapping[str, Sequence[Fit]]) -> list[str]:
    whose = "device" if level == "inside" else "node"
    remark = "those of all_reduce below" if level in fits else "not measured: this run had no such link"
    found = [f"[{level}] # s a hop, bytes/s a {whose}; {remark}", *_pair(link)]
    reach = " and ".join(map(str, BENEATH))
    found.append(f"overlap = {link.overlap:.2f} # of all-reduces of {reach} bytes, beneath products of matrices")
    found.append(f"stall = {link.stall:.4g} # s, each of them besides")
    for part, links, source in (("measured", link.measured, level), ("spanning", link.spanning, "spanning")):
        errors = {one.kind: one for one in fits.get(source, ())}
        for kind, one in links.items():
            found += ["", f"[{level}.{part}.{kind.name}]"]
            if kind in errors:
                sizes = errors[kind].points
                reach = f"{sizes[0][0]:.0f} to {sizes[-1][0]:.0f} bytes"
                found[-1] += f" # fitted to {len(sizes)} sizes, {reach}, none off by more than {errors[kind].error:.0%}"
            found += _pair(one)
            if one.profile:
                ratios = ", ".join(f"[{size:.0f}, {ratio:.4g}]" for size, ratio in one.profile)
                found.append(f"profile = [{ratios}] # measured over fitted, by bytes of the operand")
    return found


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
            hop, bandwidth = links[one.kind].latency * 1e6, links[one.kind].bandwidth / 1e9
            rows.append((one.kind.name, f"{hop:.1f} us", f"{bandwidth:.3f} GB/s", f"{one.error:.0%}"))
        sections.append(Section(LEVELS[level], Columns(rows, "<>>>")))
        if level != "spanning":
            hidden = f"{link.overlap:.0%} of a collective's time can hide beneath what is computed"
            sections.append(Section("", [f"{hidden}, but for {link.stall * 1e6:.1f} us of each"]))
    head = f"launch {device.launch * 1e6:.1f} us, memory {device.memory_bandwidth / 1e9:.1f} GB/s"
    return Report([head], sections)
