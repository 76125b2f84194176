"""Buckets: several small all-reduces (say) over one axis run as one, over a flat buffer, and pay its latency once.

    alone       launch + start + latency + B · per_byte                     for each operand of B bytes
    in buckets  the same, once a bucket, + launch + 2 B / memory_bandwidth  to copy its operands into the buffer

All times are seconds, and all sizes are bytes. The two lines are the α-β model of `shardc/cost/collectives.py`, plus
the copy into the buffer, which reads and writes every byte once. A collective that works on a copy of its operand
anyway, as an all-reduce does, works on the buffer instead: there the copy costs nothing more. So does a reduce-scatter
that the backend runs as an all-reduce.

A bucket is full once latency is at most `SLACK` of the time that its bytes take. Operands fill buckets equally: as few
as hold them, or more where that saves `LITTLE`. Backward hides part of every bucket but the last, so that of n buckets
of T bytes in all these seconds are seen:

    seen(n) = n · seconds(T / n) - min((n - 1) · hidden(T / n), (n - 1) / n · backward)

An operand that gains nothing by a bucket stays alone; so does one that would fill it by itself. The solver charges an
operand its share of a bucket, and `shardc/passes/bucket.py` fills buckets by the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.collective import AnyCollective

SLACK = 0.05
LITTLE = 0.01
"""What part of backward more buckets have to save: they start within layers, which are then no longer alike."""


@dataclass(frozen=True)
class Buckets:
    """What buckets cost on one mesh. Sizes are bytes of local operands. No bucket is meant to hold more than `most`.
    Backward computes for `backward` seconds, beside which buckets may be sent."""

    mesh: Mesh
    device: Hardware
    most: float = math.inf
    backward: float = 0.0

    def alone(self, collective: AnyCollective, axis: str, size: float) -> float:
        """Seconds of one collective by itself."""
        return self.device.collective_seconds(collective, size, self.mesh, axis)

    def seconds(self, collective: AnyCollective, axis: str, size: float) -> float:
        """Seconds of a bucket of `size` bytes in all: its collective, and what it takes to fill it."""
        copies = collective.works_on_copy or self.device.algorithms.get(collective) == (all_reduce.name,)
        copied = 0.0 if copies else 2.0 * size / self.device.memory_bandwidth
        return self.alone(collective, axis, size) + self.device.launch + copied

    def full(self, collective: AnyCollective, axis: str) -> float:
        """Bytes of a full bucket: the least size at which latency is at most `SLACK` of the transfer, and never more
        than `most`. The transfer runs at the rate of the backend's best algorithm for long operands."""
        lines = self.device.collective_lines(collective, self.mesh, axis)
        allowed = (1.0 + SLACK) * min(line.per_byte for line in lines)
        sizes = (line.latency / (allowed - line.per_byte) for line in lines if line.per_byte < allowed)
        return min(*sizes, self.most, math.inf)

    def fill(self, collective: AnyCollective, axis: str, sizes: Sequence[float]) -> float:
        """Bytes of every bucket if operands of `sizes` bytes fill buckets equally; 0 if no bucket saves time."""
        most = min(self.full(collective, axis), sum(sizes))
        total = sum(size for size in sizes if self.joins(collective, axis, size, most))
        if not total:
            return 0.0
        counts = [math.ceil(total / most)]
        while counts[-1] < len(sizes):  # all counts, or steps of at most a quarter
            counts.append(counts[-1] + math.ceil(counts[-1] / 4))
        seen = [self._seen(collective, axis, total, count) for count in counts]
        enough = min(seen) + LITTLE * self.backward
        return total / next(count for count, seconds in zip(counts, seen, strict=True) if seconds <= enough)

    def _seen(self, collective: AnyCollective, axis: str, total: float, count: int) -> float:
        """Seconds of `count` equal buckets of `total` bytes in all that backward does not hide."""
        fill = total / count
        hidden = self.device.hidden(self.mesh, axis, self.alone(collective, axis, fill)) if self.backward else 0.0
        return count * self.seconds(collective, axis, fill) - (count - 1) * min(hidden, self.backward / count)

    def joins(self, collective: AnyCollective, axis: str, size: float, fill: float) -> bool:
        """Whether an operand takes less time in a bucket of `fill` bytes than alone."""
        return self.saved(collective, axis, size, fill) > 0.0

    def hidden(self, collective: AnyCollective, axis: str, size: float, fill: float) -> float:
        """The part (0 to 1) of an operand's collective, or of its bucket's, during which the rank can compute."""
        seconds = self.alone(collective, axis, fill if self.joins(collective, axis, size, fill) else size)
        return self.device.hidden(self.mesh, axis, seconds) / seconds if seconds else 0.0

    def least(self, collective: AnyCollective, axis: str, size: float, fill: float) -> float:
        """Seconds that an operand adds: alone, or its share of a bucket of `fill` bytes."""
        alone = self.alone(collective, axis, size)
        return min(alone, self._share(collective, axis, size, fill)) if fill else alone

    def saved(self, collective: AnyCollective, axis: str, size: float, fill: float) -> float:
        """Seconds that a bucket of `fill` bytes saves for an operand, compared with a collective of its own."""
        return self.alone(collective, axis, size) - self._share(collective, axis, size, fill) if fill else 0.0

    def _share(self, collective: AnyCollective, axis: str, size: float, fill: float) -> float:
        if size >= self.full(collective, axis):  # others would gain nothing by it, and it would wait for them
            return self.alone(collective, axis, size)
        return self.seconds(collective, axis, fill) * size / fill


@dataclass(frozen=True)
class Sharing:
    """What a gradient costs among others. `gradients` are the bytes of all gradients of its dtype, each unsplit.

    Backward computes for `backward` seconds a byte of all gradients. That much of a gradient's sending time is hidden.
    """

    buckets: Buckets
    gradients: tuple[float, ...]
    backward: float = 0.0
    _fills: dict[tuple[AnyCollective, str, float], float] = field(
        default_factory=dict[tuple[AnyCollective, str, float], float]
    )

    def seconds(self, collective: AnyCollective, axis: str, size: float, part: float) -> float:
        """Seconds that a collective adds: alone, or its share of a bucket. Its operand has `size` bytes, which is
        `part` (0 to 1) of the whole gradient. The model assumes that every other gradient is split in the same way."""
        return self.buckets.least(collective, axis, size, self._fill(collective, axis, part))

    def hidden(self, collective: AnyCollective, axis: str, size: float, part: float) -> float:
        """The part (0 to 1) of such a collective's time, or of its bucket's, that backward can hide.

        Two things stay visible: the time that the rank's cores spend on the collective, and the bucket that is sent
        last, when backward has ended.
        """
        fill = self._fill(collective, axis, part) if collective.bucket is not None else 0.0
        sent = fill if self.buckets.joins(collective, axis, size, fill) else size
        last = min(sent / (part * sum(self.gradients)), 1.0)
        return self.buckets.hidden(collective, axis, size, fill) * (1.0 - last)

    def _fill(self, collective: AnyCollective, axis: str, part: float) -> float:
        key = collective, axis, part
        if key not in self._fills:
            self._fills[key] = self.buckets.fill(collective, axis, [part * whole for whole in self.gradients])
        return self._fills[key]

    def exposed(self, seconds: np.ndarray, floor: np.ndarray, whole: float) -> np.ndarray:
        """The seconds of conversions of a gradient of `whole` bytes that backward cannot hide, elementwise.

        Nothing can hide the `floor` of each. A gradient hides behind its share of backward, which is proportional to
        its bytes, so all gradients together hide no more seconds than backward computes.
        """
        return np.maximum(floor, seconds - self.backward * whole)
