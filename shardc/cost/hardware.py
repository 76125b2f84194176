"""Hardware: what a device computes and what its links carry, read from a TOML file of shardc's or of the user's.

memory = 80e9                # bytes a device
memory_bandwidth = 3.35e12   # bytes a second
launch = 3e-6                # seconds: no kernel takes less
start = 6.6e-6               # seconds that a collective takes in addition to its hops
devices_per_node = 8
draws = 1e12                 # optional, else as fast as memory: random numbers a second that the device draws
stream = 1e8                 # optional, the same of the single device's stream, which the CPU draws for it
[flops]                      # per second, by dtype
bfloat16 = 989e12
[inside]                     # the link inside a node: seconds a hop, bytes a second that one device sends
latency = 1.9e-6
bandwidth = 370e9
overlap = 0.9                # optional, else 0: the part of a collective's time in which the device can compute
stall = 0                    # optional: seconds that the device loses with each that runs beside what it computes
[between]                    # between nodes: bytes a second that one node sends, by all its network cards together
latency = 4e-6
bandwidth = 360e9
[algorithms]                 # what the backend chooses among; shardc/cost/collectives.py has them all
all_reduce = ["ring", "tree"]
[inside.measured.all_gather] # optional: latency and bandwidth as measured for this collective
latency = 2e-6
bandwidth = 300e9
profile = [[65536, 0.9], [1048576, 1.2]] # optional: bytes, and measured time over the time by these two numbers
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

import numpy as np
import torch

from shardc.cost.collectives import ALGORITHMS, BY_NAME, TEXTBOOK, Line, Wires, lines
from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.collectives.permute import permute

DISTANCE = 0.02
"""By this part a link counts as slower for every doubling of the distance between its ranks."""
HALF = 0.5
"""The `overlap` above which rings of products may go round an axis."""
_FOLDER = Path(__file__).parent / "hardware"


@dataclass(frozen=True)
class Link:
    """α–β model (Hockney 1994) of one network level.

    `latency` is in seconds a hop. `bandwidth` is in bytes a second: of one device inside a node, of a whole node
    between nodes. `measured` has other values for the collectives that it names. Between nodes, `spanning` has those of
    collectives along an axis that all ranks of a node are on: its one ring has the uplink to itself.
    """

    latency: float
    bandwidth: float
    measured: Mapping[AnyCollective, Link] = field(default_factory=dict[AnyCollective, "Link"])
    spanning: Mapping[AnyCollective, Link] = field(default_factory=dict[AnyCollective, "Link"])
    overlap: float = 0.0
    """The part (0 to 1) of a collective's time in which a device can compute; its cores are busy with the rest."""
    stall: float = 0.0
    """Seconds of computing that every collective costs which runs beside it, however short, on top of `overlap`."""
    profile: tuple[tuple[float, float], ...] = ()
    """Where time is not linear in size: pairs of operand bytes, ascending, and measured time over α-β time."""

    def of(self, collective: AnyCollective, alone: bool = False) -> Link:
        """The link as `collective` sees it: `alone` on the uplink, or side by side with the rings of a node's other
        devices."""
        link = self.measured.get(collective, self)
        return self.spanning.get(collective, link) if alone else link

    def strays(self, size: float) -> float:
        """Measured time over α-β time for an operand of `size` bytes, a ratio.

        The profile is interpolated linearly in the logarithm of the size. Beyond either end, the end's ratio holds.
        """
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

    Units: `flops` a second by dtype; `memory` in bytes, `memory_bandwidth` in bytes a second; `launch` and `start` in
    seconds; `draws` in random numbers a second that the device draws, and `stream` in those of the single device's
    stream, which the CPU draws. `algorithms` lists, per collective, those of `shardc/cost/collectives.py` that the
    backend chooses among.
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
    draws: float = math.inf
    stream: float = math.inf

    def wires(self, mesh: Mesh, axis: str, collective: AnyCollective) -> Wires:
        """How `axis` is wired, as `collective` sees it. Ranks are row-major, so the last axes fill a node.

        An axis runs inside nodes, between them, or both: `near` of its ranks are in every node. The uplink of a node
        carries several rings of the axis at once: one per device of the node, or, if that is fewer, one per rank on the
        axes after it.

        Links are slower by `DISTANCE` per doubling of the distance between ranks. So neighbours get the heavy traffic,
        and axes of equal size do not tie, which would make the solver slow.
        """
        ranks, node = mesh.sizes[axis], min(self.devices_per_node, mesh.size)
        near, stride = self._near(mesh, axis)
        inside, between = self.inside.of(collective), self._between(collective, near, stride)
        far = 1 + DISTANCE * math.log2(stride)
        share = between.bandwidth / min(node, stride)
        return Wires(
            near,
            ranks // near,
            Line(inside.latency * far, far / inside.bandwidth),
            Line(between.latency * far, far / share),
        )

    def _near(self, mesh: Mesh, axis: str) -> tuple[int, int]:
        """How many ranks of an axis are in one node, and how many ranks of the mesh lie between neighbours on it."""
        ranks, stride = mesh.sizes[axis], mesh.ways(mesh.names[mesh.names.index(axis) + 1 :])
        node = min(self.devices_per_node, mesh.size)
        if mesh.size <= self.devices_per_node:
            return ranks, stride
        return (math.gcd(ranks, node // stride) if node % stride == 0 else 1), stride

    def link(self, mesh: Mesh, axis: str, collective: AnyCollective) -> Link:
        """The farthest link of an axis, as `collective` sees it."""
        near, stride = self._near(mesh, axis)
        return self.inside.of(collective) if near == mesh.sizes[axis] else self._between(collective, near, stride)

    def _between(self, collective: AnyCollective, near: int, stride: int) -> Link:
        return self.between.of(collective, alone=near > 1 and stride == 1)

    def collective_seconds(self, collective: AnyCollective, size: float, mesh: Mesh, axis: str) -> float:
        """Seconds of one collective over `axis` whose local operand has `size` bytes.

        The backend is assumed to run the fastest of its algorithms. A measured profile corrects the result.
        """
        key = collective, axis, mesh.axes
        if key not in self._links:
            self._links[key] = self.link(mesh, axis, collective)
        return min(line.at(size) for line in self.collective_lines(collective, mesh, axis)) * self._links[key].strays(
            size
        )

    def passing_seconds(self, size: float, mesh: Mesh, axis: str, by: int) -> float:
        """Seconds of a permute in which each rank's operand of `size` bytes goes `by` ranks on along `axis`.

        Of the ranks of a node, no more than `by` send to another node. So a ring's neighbours share the uplink less
        than the ranks of a permute that all cross, which is what `collective_seconds` prices.
        """
        key = size, axis, by, mesh.axes
        if key not in self._passing:
            self._passing[key] = self._passing_seconds(size, mesh, axis, by)
        return self._passing[key]

    def _passing_seconds(self, size: float, mesh: Mesh, axis: str, by: int) -> float:
        wires, whole = self.wires(mesh, axis, permute), self.collective_seconds(permute, size, mesh, axis)
        crossing = min(by, wires.ranks - by, wires.near)
        if wires.nodes == 1 or crossing == wires.near:
            return whole
        latency, per_byte = wires.slowest.latency + self.launch + self.start, crossing * wires.between.per_byte
        line = Line(latency, max(per_byte, wires.inside.per_byte))
        return min(whole, line.at(size) * self.link(mesh, axis, permute).strays(size))

    def collective_lines(self, collective: AnyCollective, mesh: Mesh, axis: str) -> list[Line]:
        """The time of every algorithm that the backend chooses among for `collective` over `axis`, as lines over bytes.
        Launch and start are included."""
        key = collective, axis, mesh.axes
        if key not in self._lines:
            algorithms = lines(collective, self.algorithms[collective], self.wires(mesh, axis, collective))
            self._lines[key] = [line + Line(self.launch + self.start, 0.0) for line in algorithms]
        return self._lines[key]

    @cached_property
    def _lines(self) -> dict[tuple[AnyCollective, str, tuple[tuple[str, int], ...]], list[Line]]:
        """Memo of `collective_lines`, by collective, axis and mesh."""
        return {}

    @cached_property
    def _passing(self) -> dict[tuple[float, str, int, tuple[tuple[str, int], ...]], float]:
        """Memo of `passing_seconds`, by bytes, axis, distance and mesh."""
        return {}

    @cached_property
    def _links(self) -> dict[tuple[AnyCollective, str, tuple[tuple[str, int], ...]], Link]:
        """Memo of `link`, by collective, axis and mesh."""
        return {}

    def overlapping(self, mesh: Mesh, axis: str) -> tuple[float, float]:
        """The `overlap` (0 to 1) and the `stall` (seconds) of the link of `axis`; zeros over an axis of one rank."""
        if mesh.sizes[axis] == 1:
            return 0.0, 0.0
        link = self.inside if self._near(mesh, axis)[0] == mesh.sizes[axis] else self.between
        return link.overlap, link.stall

    def hiding(self, mesh: Mesh) -> tuple[str, ...]:
        """The axes along which most of a collective hides beside what is computed: those that rings of products may go
        round. Elsewhere the cores that compute also copy, and steps that wait for them would be no gain."""
        return tuple(axis for axis in mesh.names if self.overlapping(mesh, axis)[0] > HALF)

    def hidden(self, mesh: Mesh, axis: str, seconds: float) -> float:
        """Seconds of a collective of `seconds` that computing hides, if the device has enough to compute beside it."""
        overlap, stall = self.overlapping(mesh, axis)
        return max(overlap * seconds - stall, 0.0) if overlap else 0.0

    def compute_seconds(self, flops: float, moved: float, dtype: torch.dtype, launches: int = 1) -> float:
        """Seconds of a kernel that does `flops` operations in `dtype` and moves `moved` bytes.

        Roofline (Williams et al. 2009): the larger of arithmetic and memory time, plus the launch of the kernel; none
        for what another operator's kernel does too.
        """
        return max(flops / self.rate(dtype), moved / self.memory_bandwidth) + launches * self.launch

    def compute_seconds_each(
        self, flops: np.ndarray, moved: np.ndarray, dtype: torch.dtype, launches: int = 1
    ) -> np.ndarray:
        """`compute_seconds` of several kernels, elementwise."""
        return np.maximum(flops / self.rate(dtype), moved / self.memory_bandwidth) + launches * self.launch

    def drawing_seconds(self, count: float, *, stream: bool) -> float:
        """Seconds to draw random numbers, beside what it takes to write them."""
        return count / (self.stream if stream else self.draws)

    def rate(self, dtype: torch.dtype) -> float:
        """The peak in a dtype, in flops a second; that of float32 where the file does not name the dtype."""
        return self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])


def hardware(name: str | Path | Hardware) -> Hardware:
    """Load a hardware file of shardc's by its name (`"h100"`), or any by its path (`"mine.toml"`).

    Raises ShardcError if there is no such file, or if its contents are not those of a hardware file.
    """
    if isinstance(name, Hardware):
        return name
    path = Path(name) if str(name).endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.toml")))
        if path.parent != _FOLDER:
            raise ShardcError(f"no hardware file {path}; `shardc calibrate {path}` measures this machine into one")
        raise ShardcError(f"no hardware called {str(name)!r}; write one of {known}, or the path of a .toml file")
    try:
        return _Reader(str(path)).hardware(path.stem, tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ShardcError(f"hardware file {path} is not TOML: {error}") from error


@dataclass(frozen=True)
class _Reader:
    """Reads the tables of one hardware file. Every error message names the file."""

    path: str

    def hardware(self, name: str, data: Mapping[str, Any]) -> Hardware:
        table = self.table(data, "flops")
        flops = {dtype: self.number(table, dtype, "flops.") for dtype in table}
        if "float32" not in flops:
            raise ShardcError(
                f"hardware file {self.path} lacks flops.float32: add it, for dtypes that the file does not name"
            )
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
            self.number({"draws": math.inf, **data}, "draws"),
            self.number({"stream": math.inf, **data}, "stream"),
        )

    def link(self, data: Mapping[str, Any], name: str) -> Link:
        table = self.table(data, name)
        measured, spanning = self.by_collective(table, name, "measured"), self.by_collective(table, name, "spanning")
        if spanning and name != "between":
            raise ShardcError(f"hardware file {self.path}: {name}.spanning is not read; move it to [between.spanning]")
        latency = self.number(table, "latency", f"{name}.", least=0.0)
        overlap = self.number({"overlap": 0.0, **table}, "overlap", f"{name}.", least=0.0)
        if overlap > 1.0:
            raise ShardcError(f"hardware file {self.path}: {name}.overlap is {overlap}; it must be from 0 to 1")
        profile = self.profile(table.get("profile", []), name)
        stall = self.number({"stall": 0.0, **table}, "stall", f"{name}.", least=0.0)
        return Link(latency, self.number(table, "bandwidth", f"{name}."), measured, spanning, overlap, stall, profile)

    def profile(self, entries: Any, name: str) -> tuple[tuple[float, float], ...]:
        try:
            pairs = tuple([(float(size), float(ratio)) for size, ratio in entries])
        except (TypeError, ValueError):
            pairs = ((0.0, 0.0),)
        sizes = [size for size, _ in pairs]
        if sizes != sorted(set(sizes)) or not all(0.0 < number < math.inf for pair in pairs for number in pair):
            raise ShardcError(
                f"hardware file {self.path}: {name}.profile is {entries!r}; it must be a list of [bytes, ratio], both "
                "above zero, by ascending bytes"
            )
        return pairs

    def by_collective(self, table: Mapping[str, Any], name: str, part: str) -> Mapping[AnyCollective, Link]:
        links = {collective: self.link(table[part], collective) for collective in table.get(part, {})}
        unknown = sorted(set(links) - set(BY_NAME))
        if unknown:
            raise ShardcError(
                f"hardware file {self.path}: {name}.{part} names {', '.join(unknown)}; "
                f"collectives are {', '.join(BY_NAME)}"
            )
        return {BY_NAME[collective]: link for collective, link in links.items()}

    def algorithms(self, data: Mapping[str, Any]) -> dict[AnyCollective, tuple[str, ...]]:
        for collective, names in data.items():
            if collective not in BY_NAME:
                raise ShardcError(
                    f"hardware file {self.path}: no collective is called {collective!r}; "
                    f"write one of {', '.join(BY_NAME)}"
                )
            known = ALGORITHMS[BY_NAME[collective]]
            if not isinstance(names, list) or not names or not all(one in known for one in names):  # type: ignore[misc]
                raise ShardcError(
                    f"hardware file {self.path}: algorithms.{collective} is {names!r}; "
                    f"it must be a list of some of {', '.join(known)}"
                )
        return {BY_NAME[collective]: tuple(names) for collective, names in data.items()}

    def table(self, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        if not isinstance(data.get(name), dict):
            raise ShardcError(
                f"hardware file {self.path} lacks the table [{name}]: add it, as in shardc/cost/hardware.py"
            )
        return data[name]

    def number(self, data: Mapping[str, Any], name: str, prefix: str = "", least: float | None = None) -> float:
        """The number `data[name]`. ShardcError unless it is above zero or, if `least` is given, at least that."""
        if name not in data:
            raise ShardcError(f"hardware file {self.path} lacks {prefix}{name}: add it, as in shardc/cost/hardware.py")
        value = data[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ShardcError(f"hardware file {self.path}: {prefix}{name} is {value!r}; it must be a number")
        if math.isnan(value) or not (value > 0 if least is None else value >= least):
            allowed = "above zero" if least is None else f"at least {least:g}"
            raise ShardcError(f"hardware file {self.path}: {prefix}{name} is {value}; it must be {allowed}")
        return float(value)


def this_hardware() -> str:
    """The name of shardc's hardware file for this machine: by the name of the CUDA device, else `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    device = torch.cuda.get_device_name()
    return next((name for name in ("a100", "h200") if name.upper() in device), "h100")
