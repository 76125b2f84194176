"""Hardware: what a device computes and what its links carry, read from a data file, ours or the user's.

memory = 80e9                # bytes a device
memory_bandwidth = 3.35e12   # bytes a second
launch = 3e-6                # seconds: no kernel takes less
start = 6.6e-6               # seconds that a collective takes besides its hops
devices_per_node = 8
[flops]                      # per second, by dtype
bfloat16 = 989e12
[inside]                     # the link inside a node: seconds a hop, bytes a second that one device sends
latency = 1.9e-6
bandwidth = 370e9
overlap = 0.9                # what part of a collective's time the device can compute in; 0 if it is not told
stall = 0                    # optional: seconds that the device loses with each that runs beside what it computes
[between]                    # between nodes: bytes a second that one node sends, by all its network cards together
latency = 4e-6
bandwidth = 360e9
[algorithms]                 # what the backend chooses among; shardc/cost/collectives.py has them all
all_reduce = ["ring", "tree"]
[inside.measured.all_gather] # optional: latency and bandwidth as measured for one kind of collective
latency = 2e-6
bandwidth = 300e9
profile = [[65536, 0.9], [1048576, 1.2]] # optional: bytes, and how many times as long as by these two it took
[between.spanning.all_gather] # optional: the same along axes that all ranks of a node are on
latency = 4e-6
bandwidth = 380e9
"""

from __future__ import annotations

import bisect
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardc.cost.collectives import ALGORITHMS, BY_NAME, TEXTBOOK, Line, Wires, lines
from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.collective import AnyCollective

DISTANCE = 0.02
_FOLDER = Path(__file__).parent / "hardware"


@dataclass(frozen=True)
class Link:
    """α–β model of one network level: `latency` in seconds a hop, `bandwidth` in bytes a second, of one device inside a
    node, of a whole node between nodes. `measured` has other values for the kinds of collectives that it names, and
    `spanning`, between nodes, for those along axes whose ring crosses alone: all ranks of a node are on it."""

    latency: float
    bandwidth: float
    measured: Mapping[AnyCollective, Link] = field(default_factory=dict[AnyCollective, "Link"])
    spanning: Mapping[AnyCollective, Link] = field(default_factory=dict[AnyCollective, "Link"])
    overlap: float = 0.0
    """What part of a collective's time a device can compute in, from 0 to 1: the rest its own cores are busy with."""
    stall: float = 0.0
    """Seconds of computing that a collective costs that runs beside it, however short, besides its part."""
    profile: tuple[tuple[float, float], ...] = ()
    """Where time is no straight line: by bytes of the operand, ascending, what was measured over what α and β say."""

    def of(self, kind: AnyCollective, alone: bool = False) -> Link:
        """The link as a kind of collective sees it, side by side with those of a node's other devices, or alone."""
        own = self.measured.get(kind, self)
        return self.spanning.get(kind, own) if alone else own

    def strays(self, size: float) -> float:
        """How many times as long as α and β say an operand of `size` bytes takes: between two sizes of the profile by
        the logarithm of the size, beyond them as at the last."""
        if not self.profile:
            return 1.0
        place = bisect.bisect(self.profile, (size,))
        (below, low), (above, high) = (self.profile[max(place - 1, 0)], self.profile[min(place, len(self.profile) - 1)])
        if below == above:
            return low
        return low + (high - low) * math.log(size / below) / math.log(above / below)


@dataclass(frozen=True)
class Hardware:
    """One kind of device and how it is wired: `devices_per_node` share the link `inside`, nodes talk over `between`.

    Units: flops a second by dtype, memory in bytes and bytes a second, `launch` and `start` in seconds.
    """

    name: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    launch: float
    devices_per_node: int
    inside: Link
    between: Link
    start: float = 0.0
    memory: float = math.inf
    algorithms: Mapping[AnyCollective, tuple[str, ...]] = field(default_factory=lambda: TEXTBOOK)

    def wires(self, mesh: Mesh, axis: str, kind: AnyCollective) -> Wires:
        """How `axis` is wired, as a kind of collective sees it. Ranks are row-major: the last axes fill a node.

        An axis lies inside nodes, or between them, or does both: `near` of its ranks in every node. The uplink of a
        node carries as many of the axis' rings as there are devices in the node, or ranks on the axes after it.

        Ranks further apart count as slower by `DISTANCE` per doubling of their distance: so neighbours get the heavy
        traffic, and axes of equal size are not interchangeable, which would leave the solver with nothing but ties.
        """
        ways, node = mesh.sizes[axis], min(self.devices_per_node, mesh.size)
        near, stride = self._near(mesh, axis)
        inside, between = self.inside.of(kind), self._between(kind, near, stride)
        far = 1 + DISTANCE * math.log2(stride)
        share = between.bandwidth / min(node, stride)
        return Wires(
            near,
            ways // near,
            Line(inside.latency * far, far / inside.bandwidth),
            Line(between.latency * far, far / share),
        )

    def _near(self, mesh: Mesh, axis: str) -> tuple[int, int]:
        """How many ranks of an axis are in a node, and how many ranks apart they are."""
        ways, stride = mesh.sizes[axis], mesh.ways(mesh.names[mesh.names.index(axis) + 1 :])
        node = min(self.devices_per_node, mesh.size)
        if mesh.size <= self.devices_per_node:
            return ways, stride
        return (math.gcd(ways, node // stride) if node % stride == 0 else 1), stride

    def link(self, mesh: Mesh, axis: str, kind: AnyCollective) -> Link:
        """The farthest link of an axis, as a kind of collective sees it."""
        near, stride = self._near(mesh, axis)
        return self.inside.of(kind) if near == mesh.sizes[axis] else self._between(kind, near, stride)

    def _between(self, kind: AnyCollective, near: int, stride: int) -> Link:
        return self.between.of(kind, alone=near > 1 and stride == 1)

    def collective_seconds(self, kind: AnyCollective, size: float, mesh: Mesh, axis: str) -> float:
        """Seconds of one collective over `axis` whose local operand has `size` bytes, by the fastest algorithm."""
        key = kind, axis, mesh.axes
        if key not in self._links:
            self._links[key] = self.link(mesh, axis, kind)
        return min(line.at(size) for line in self.collective_lines(kind, mesh, axis)) * self._links[key].strays(size)

    def collective_lines(self, kind: AnyCollective, mesh: Mesh, axis: str) -> list[Line]:
        """What the backend chooses among for one kind of collective over `axis`, launch and start included."""
        key = kind, axis, mesh.axes
        if key not in self._lines:
            found = lines(kind, self.algorithms[kind], self.wires(mesh, axis, kind))
            self._lines[key] = [line + Line(self.launch + self.start, 0.0) for line in found]
        return self._lines[key]

    @cached_property
    def _lines(self) -> dict[tuple[AnyCollective, str, tuple[tuple[str, int], ...]], list[Line]]:
        """The lines of every collective met so far."""
        return {}

    @cached_property
    def _links(self) -> dict[tuple[AnyCollective, str, tuple[tuple[str, int], ...]], Link]:
        """The links whose profile counts for them."""
        return {}

    def overlapping(self, mesh: Mesh, axis: str) -> tuple[float, float]:
        """What part of a collective's time over `axis` a device can compute in, none over an axis of one rank; and the
        seconds that it loses with each."""
        if mesh.sizes[axis] == 1:
            return 0.0, 0.0
        link = self.inside if self._near(mesh, axis)[0] == mesh.sizes[axis] else self.between
        return link.overlap, link.stall

    def hidden(self, mesh: Mesh, axis: str, seconds: float) -> float:
        """Seconds that a collective of so many gives back where a device has as much to compute beside it."""
        overlap, stall = self.overlapping(mesh, axis)
        return max(overlap * seconds - stall, 0.0) if overlap else 0.0

    def compute_seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Roofline (Williams et al. 2009): the larger of arithmetic and memory time, plus the launch of the kernel."""
        rate = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return max(flops / rate, moved / self.memory_bandwidth) + self.launch


def hardware(name: str | Path | Hardware) -> Hardware:
    """Load a hardware file of ours by its name, or any by its path (`*.toml`). Raises ShardcError."""
    if isinstance(name, Hardware):
        return name
    path = Path(name) if str(name).endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.toml")))
        if path.parent != _FOLDER:
            raise ShardcError(f"no hardware file {path}; `shardc calibrate {path}` measures this machine into one")
        raise ShardcError(f"no hardware called {str(name)!r}; known are {known}, and the path of any .toml file")
    try:
        return _Reader(str(path)).hardware(path.stem, tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ShardcError(f"hardware file {path} is no TOML: {error}") from error


@dataclass(frozen=True)
class _Reader:
    """Reads the tables of one file; every message names it."""

    path: str

    def hardware(self, name: str, data: Mapping[str, Any]) -> Hardware:
        given = self.table(data, "flops")
        flops = {dtype: self.number(given, dtype, "flops.") for dtype in given}
        if "float32" not in flops:
            raise ShardcError(f"hardware file {self.path} lacks flops.float32, which dtypes that are not named use")
        per_node = self.number(data, "devices_per_node")
        if per_node != int(per_node):
            raise ShardcError(f"hardware file {self.path}: devices_per_node is {per_node}, not a whole number")
        return Hardware(
            name,
            flops,
            self.number(data, "memory_bandwidth"),
            self.number(data, "launch", least=0.0),
            int(per_node),
            self.link(data, "inside"),
            self.link(data, "between"),
            self.number({"start": 0.0, **data}, "start", least=0.0),
            self.number({"memory": math.inf, **data}, "memory"),
            {**TEXTBOOK, **self.algorithms(data.get("algorithms", {}))},
        )

    def link(self, data: Mapping[str, Any], name: str) -> Link:
        table = self.table(data, name)
        measured, spanning = self.by_kind(table, name, "measured"), self.by_kind(table, name, "spanning")
        if spanning and name != "between":
            raise ShardcError(f"hardware file {self.path}: {name}.spanning is not read; it is a part of [between]")
        latency = self.number(table, "latency", f"{name}.", least=0.0)
        overlap = self.number({"overlap": 0.0, **table}, "overlap", f"{name}.", least=0.0)
        if overlap > 1.0:
            raise ShardcError(f"hardware file {self.path}: {name}.overlap is {overlap}; it is a part, from 0 to 1")
        profile = self.profile(table.get("profile", []), name)
        stall = self.number({"stall": 0.0, **table}, "stall", f"{name}.", least=0.0)
        return Link(latency, self.number(table, "bandwidth", f"{name}."), measured, spanning, overlap, stall, profile)

    def profile(self, given: Any, name: str) -> tuple[tuple[float, float], ...]:
        try:
            found = tuple([(float(size), float(ratio)) for size, ratio in given])
        except (TypeError, ValueError):
            found = ((0.0, 0.0),)
        sizes = [size for size, _ in found]
        if sizes != sorted(set(sizes)) or not all(0.0 < number < math.inf for pair in found for number in pair):
            raise ShardcError(
                f"hardware file {self.path}: {name}.profile is {given!r}; it is a list of [bytes, ratio], both above "
                "zero, by ascending bytes"
            )
        return found

    def by_kind(self, table: Mapping[str, Any], name: str, part: str) -> Mapping[AnyCollective, Link]:
        links = {kind: self.link(table[part], kind) for kind in table.get(part, {})}
        unknown = sorted(set(links) - set(BY_NAME))
        if unknown:
            raise ShardcError(
                f"hardware file {self.path}: {name}.{part} names {', '.join(unknown)}; kinds are {', '.join(BY_NAME)}"
            )
        return {BY_NAME[kind]: link for kind, link in links.items()}

    def algorithms(self, data: Mapping[str, Any]) -> dict[AnyCollective, tuple[str, ...]]:
        for kind, names in data.items():
            if kind not in BY_NAME:
                raise ShardcError(
                    f"hardware file {self.path}: no collective is called {kind!r}; they are {', '.join(BY_NAME)}"
                )
            known = ALGORITHMS[BY_NAME[kind]]
            if not isinstance(names, list) or not names or not all(one in known for one in names):  # type: ignore[misc]
                raise ShardcError(
                    f"hardware file {self.path}: algorithms.{kind} is {names!r}; "
                    f"it is a list of some of {', '.join(known)}"
                )
        return {BY_NAME[kind]: tuple(names) for kind, names in data.items()}

    def table(self, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        if not isinstance(data.get(name), dict):
            raise ShardcError(f"hardware file {self.path} lacks the table [{name}]")
        return data[name]

    def number(self, data: Mapping[str, Any], name: str, prefix: str = "", least: float | None = None) -> float:
        """A number above zero, or from `least` on."""
        if name not in data:
            raise ShardcError(f"hardware file {self.path} lacks {prefix}{name}")
        value = data[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ShardcError(f"hardware file {self.path}: {prefix}{name} is {value!r}, not a number")
        if math.isnan(value) or not (value > 0 if least is None else value >= least):
            wanted = "above zero" if least is None else f"at least {least:g}"
            raise ShardcError(f"hardware file {self.path}: {prefix}{name} is {value}; it must be {wanted}")
        return float(value)


def this_hardware() -> str:
    """The hardware file that fits this machine: by the CUDA device's name, else `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    device = torch.cuda.get_device_name()
    return next((name for name in ("a100", "h200") if name.upper() in device), "h100")
