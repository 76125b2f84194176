"""The time of a rank that computes while collectives are under way.

    clock.start("dp", 3.0)    an all-reduce takes 3 seconds alone; overlap 0.5, stall 0
    clock.compute(2.0)        takes 3 seconds, and 2 seconds of the all-reduce are done
    clock.wait(flight)        1 second

A rank computes one thing after another, and every mesh axis carries one collective after another. A collective takes
`1 - overlap` of the rank's cores. While the rank computes beside it, both take `2 - overlap` times as long; with
several axes, 1 plus the sum of all `1 - overlap`.

While the rank waits, collectives take their time, or that sum of it, if it is more than 1. Every collective that is
started ahead also costs the `stall` of its link.

The body of an operator is a sequence of steps. One that computes `c` seconds beside a permute of `p` seconds takes
`max(c, p) + (1 - overlap) * min(c, p) + stall`. Planner and timeline both ask this clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh

_RESIDUE = 1e-12
"""A difference of seconds that is a smaller part of its terms is a rounding error."""
Transfer = tuple[str, float]
"""A collective: its axis, and the seconds that it takes alone."""


class TimedStep(NamedTuple):
    """One step of an operator's body, in seconds: the collectives that the rank awaits `before` it computes, those that
    run `beside` that and are awaited then, and those that follow."""

    compute: float
    before: tuple[Transfer, ...] = ()
    beside: tuple[Transfer, ...] = ()
    after: tuple[Transfer, ...] = ()


class Flight(NamedTuple):
    """A collective that was started: its axis, and the seconds of all collectives started there, up to itself."""

    axis: str
    until: float


class Clock:
    """The time of the rank, `now`, in seconds, and how much is left of every collective that was started. By axis,
    `lost` are the seconds that the rank waits, is slowed down or stalls on its account."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        self.now = 0.0
        self._mesh, self._device = mesh, device
        beside = {axis: device.overlapping(mesh, axis) for axis in mesh.names}
        self._loads = {axis: 1.0 - overlap for axis, (overlap, _) in beside.items()}
        self._stalls = {axis: stall for axis, (_, stall) in beside.items()}
        self._started = dict.fromkeys(mesh.names, 0.0)  # seconds of all collectives of an axis
        self.lost = dict.fromkeys(mesh.names, 0.0)
        self._left: dict[str, float] = {}  # the part of them that has not run yet, for axes that have any

    def hides(self, axis: str, seconds: float) -> bool:
        """Whether computing beside a collective of `seconds` saves time. The collective first waits for those that were
        started on its axis."""
        return self._device.hidden(self._mesh, axis, self._left.get(axis, 0.0) + seconds) > 0.0

    def run(self, axis: str, seconds: float) -> None:
        """A collective runs, and the rank waits for it."""
        self.wait(self._enqueue(axis, seconds))

    def start(self, axis: str, seconds: float) -> Flight:
        """A collective of `seconds` is started; the rank goes on computing."""
        self.lost[axis] += self._stalls[axis]
        self.compute(self._stalls[axis])
        return self._enqueue(axis, seconds)

    def _enqueue(self, axis: str, seconds: float) -> Flight:
        self._started[axis] += seconds
        self._left[axis] = self._left.get(axis, 0.0) + seconds
        return Flight(axis, self._started[axis])

    def compute(self, seconds: float) -> None:
        """The rank computes what takes `seconds` alone."""
        while self._left and seconds > 0.0:
            step = min(seconds, *self._left.values())
            for axis in self._left:
                self.lost[axis] += step * self._loads[axis]
            self._go_on(step, 1.0 + self._load())
            seconds -= step
        self.now += seconds

    def wait(self, flight: Flight) -> None:
        """The rank waits until a collective has ended."""
        begun = self.now
        while rest := self.rest(flight):
            self._go_on(min(rest, *self._left.values()), max(1.0, self._load()))
        self.lost[flight.axis] += self.now - begun

    def rest(self, flight: Flight) -> float:
        """The seconds that a collective would still take alone; 0 if it has ended."""
        rest = self._left.get(flight.axis, 0.0) - (self._started[flight.axis] - flight.until)
        return rest if rest > _RESIDUE * self._started[flight.axis] else 0.0

    def beside(self, flight: Flight) -> float:
        """The seconds that a collective still takes if the rank goes on computing."""
        return self.rest(flight) * (1.0 + self._load())

    def step(self, step: TimedStep) -> None:
        """The rank runs one step of an operator's body."""
        for axis, seconds in step.before:
            self.run(axis, seconds)
        flights = [self.start(axis, seconds) for axis, seconds in step.beside]
        self.compute(step.compute)
        for flight in flights:
            self.wait(flight)
        for axis, seconds in step.after:
            self.run(axis, seconds)

    def _load(self) -> float:
        """The part of the cores that all collectives under way would take together; it may be more than 1."""
        return sum([self._loads[axis] for axis in self._left])

    def _go_on(self, step: float, taking: float) -> None:
        """Every collective under way advances by `step` of its seconds, each of which takes `taking` seconds."""
        self.now += step * taking
        self._left = {axis: left - step for axis, left in self._left.items() if left > step}


def seconds_of(steps: Iterable[TimedStep], mesh: Mesh, device: Hardware) -> float:
    """What the steps of a body take if nothing else is under way."""
    clock = Clock(mesh, device)
    for step in steps:
        clock.step(step)
    return clock.now


def rounded(difference: float, of: float) -> float:
    """A difference of seconds between terms that sum to `of`; 0 if it is a rounding error."""
    return difference if abs(difference) > _RESIDUE * of else 0.0
