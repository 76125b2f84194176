"""Hardware: what a device computes and what its links carry, read from the data files in `hardware/`.

Units: flops in floating-point operations per second and dtype, memory in bytes per second, link bandwidth in bytes per
second and device, latency in seconds. Each data file names its sources.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from shardc.errors import ShardcError
from shardc.mesh import Mesh

DISTANCE = 0.02
_FOLDER = Path(__file__).parent / "hardware"


@dataclass(frozen=True)
class Link:
    """α–β model of one network level: `latency` seconds a message, `bandwidth` bytes per second and device."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Hardware:
    """One kind of device and how it is wired: `devices_per_node` share the link `inside`, nodes talk over `between`."""

    name: str
    flops: dict[str, float]
    memory_bandwidth: float
    launch: float
    devices_per_node: int
    inside: Link
    between: Link

    def link(self, mesh: Mesh, axis: str) -> Link:
        """The link that carries `axis`: the last axes of the mesh fill a node, the others cross nodes.

        Within a level, ranks further apart count as slower by `DISTANCE` per doubling of their distance: so neighbours
        get the heavy traffic, and axes of equal size are not interchangeable, which would leave the solver with nothing
        but ties.
        """
        inner = mesh.names[mesh.names.index(axis) + 1 :]
        stride = mesh.ways(inner)
        link = self.inside if stride * mesh.sizes[axis] <= self.devices_per_node else self.between
        far = 1 + DISTANCE * math.log2(stride)
        return Link(link.latency * far, link.bandwidth / far)

    def compute_seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Roofline (Williams et al. 2009): the larger of arithmetic and memory time, plus the launch of the kernel."""
        rate = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return max(flops / rate, moved / self.memory_bandwidth) + self.launch


def hardware(name: str | Hardware) -> Hardware:
    """Load a hardware file by name. Raises ShardcError naming the files there are."""
    if isinstance(name, Hardware):
        return name
    path = _FOLDER / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.toml")))
        raise ShardcError(f"no hardware called {name!r}; known are {known}")
    data = tomllib.loads(path.read_text())
    return Hardware(
        name,
        data["flops"],
        data["memory_bandwidth"],
        data["launch"],
        data["devices_per_node"],
        Link(**data["inside"]),
        Link(**data["between"]),
    )


def this_hardware() -> str:
    """The hardware file that fits this machine: by the CUDA device's name, else `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    return "a100" if "A100" in torch.cuda.get_device_name() else "h100"
