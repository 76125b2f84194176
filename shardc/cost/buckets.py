"""Buckets: small collectives of one kind over one axis run as one, over a flat buffer, and pay its latency once.

    alone       launch + start + latency + B · per_byte                     for each operand of B bytes
    in buckets  the same, once a bucket, + launch + 2 B / memory_bandwidth  to copy its operands into the buffer

A bucket is full where its collective is within `SLACK` of what its bytes take alone. Operands fill as few buckets as
hold them, equally; one that takes no longer by itself stays by itself. The solver charges an operand its share of a
bucket, and `shardc/passes/bucket.py` fills buckets by the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.collective import AnyCollective

SLACK = 0.05


@dataclass(frozen=True)
class Buckets:
    """What buckets cost on one mesh. Sizes are bytes of local operands; no bucket is meant to hold more than `most`."""

    mesh: Mesh
    device: Hardware
    most: float = math.inf

    def alone(self, kind: AnyCollective, axis: str, size: float) -> float:
        """Seconds of one collective by itself."""
        return self.device.collective_seconds(kind, size, self.mesh, axis)

    def seconds(self, kind: AnyCollective, axis: str, size: float) -> float:
        """Seconds of a bucket of `size` bytes in all: its collective and the copy that fills it."""
        return self.alone(kind, axis, size) + self.device.launch + 2.0 * size / self.device.memory_bandwidth

    def full(self, kind: AnyCollective, axis: str) -> float:
        """The bytes from which on latency is at most `SLACK` of a collective's transfer, at the rate of the backend's
        best algorithm for long operands; or the most that a bucket may hold."""
        lines = self.device.collective_lines(kind, self.mesh, axis)
        allowed = (1.0 + SLACK) * min(line.per_byte for line in lines)
        near = (line.latency / (allowed - line.per_byte) for line in lines if line.per_byte < allowed)
        return min(*near, self.most, math.inf)

    def fill(self, kind: AnyCollective, axis: str, sizes: Sequence[float]) -> float:
        """The bytes of every bucket where operands of `sizes` fill buckets equally; 0 where none is worth one."""
        most = min(self.full(kind, axis), sum(sizes))
        total = sum(size for size in sizes if self.joins(kind, axis, size, most))
        return total / math.ceil(total / most) if total else 0.0

    def joins(self, kind: AnyCollective, axis: str, size: float, fill: float) -> bool:
        """Whether an operand takes less time in a bucket of `fill` bytes than alone."""
        return self.saved(kind, axis, size, fill) > 0.0

    def hidden(self, kind: AnyCollective, axis: str, size: float, fill: float) -> float:
        """What part of the time of an operand's collective, or of its bucket's, a rank can compute in."""
        seconds = self.alone(kind, axis, fill if self.joins(kind, axis, size, fill) else size)
        return self.device.hidden(self.mesh, axis, seconds) / seconds if seconds else 0.0

    def least(self, kind: AnyCollective, axis: str, size: float, fill: float) -> float:
        """Seconds that an operand adds: alone, or its share of a bucket of `fill` bytes."""
        alone = self.alone(kind, axis, size)
        return min(alone, self._share(kind, axis, size, fill)) if fill else alone

    def saved(self, kind: AnyCollective, axis: str, size: float, fill: float) -> float:
        """Seconds that an operand takes less in a bucket of `fill` bytes than alone."""
        return self.alone(kind, axis, size) - self._share(kind, axis, size, fill) if fill else 0.0

    def _share(self, kind: AnyCollective, axis: str, size: float, fill: float) -> float:
        return self.seconds(kind, axis, fill) * size / fill


@dataclass(frozen=True)
class Sharing:
    """What a gradient costs among others: `gradients` are the bytes of all of its dtype, each whole. Backward computes
    for `beneath` seconds a byte of all gradients, and so much of what a gradient takes to send is hidden."""

    buckets: Buckets
    gradients: tuple[float, ...]
    beneath: float = 0.0
    _fills: dict[tuple[AnyCollective, str, float], float] = field(
        default_factory=dict[tuple[AnyCollective, str, float], float]
    )

    def seconds(self, kind: AnyCollective, axis: str, size: float, part: float) -> float:
        """Seconds that a collective adds whose operand of `size` bytes is `part` of a whole gradient: alone, or its
        share of a bucket. Every other gradient is taken to be split as this one is."""
        return self.buckets.least(kind, axis, size, self._fill(kind, axis, part))

    def hidden(self, kind: AnyCollective, axis: str, size: float, part: float) -> float:
        """What part of such a collective's time, or of its bucket's, backward can hide: but for the rank's own work,
        and for what is sent last, when backward has ended."""
        fill = self._fill(kind, axis, part) if kind.bucket is not None else 0.0
        sent = fill if self.buckets.joins(kind, axis, size, fill) else size
        last = min(sent / (part * sum(self.gradients)), 1.0)
        return self.buckets.hidden(kind, axis, size, fill) * (1.0 - last)

    def _fill(self, kind: AnyCollective, axis: str, part: float) -> float:
        key = kind, axis, part
        if key not in self._fills:
            self._fills[key] = self.buckets.fill(kind, axis, [part * whole for whole in self.gradients])
        return self._fills[key]

    def exposed(self, seconds: np.ndarray, own: np.ndarray, whole: float) -> np.ndarray:
        """What is left of the `seconds` of conversions of a gradient of `whole` bytes when backward has hidden what it
        can of them; no fewer than `own`, which nothing can hide.

        Every gradient hides beneath its share of backward, by its bytes: all together, no more than backward computes.
        """
        return np.maximum(own, seconds - self.beneath * whole)
