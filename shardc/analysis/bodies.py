"""What runs for one operator under a strategy, in seconds: planner, timeline and plan all ask here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shardc.cost.clock import TimedStep, Transfer, rounded, seconds_of
from shardc.cost.conversion import step_seconds
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.rules.factors.bodies import Sent, drawn, imbalance, steps, work
from shardc.rules.factors.strategy import Shape, Strategy
from shardc.runtime.collectives.collective import AnyCollective

Inner = tuple[AnyCollective, str, float, float]
"""A collective inside an operator's body: which, axis, bytes of the local operand, seconds."""


@dataclass(frozen=True)
class Body:
    """The steps of an operator, and all collectives in them."""

    mesh: Mesh
    device: Hardware
    steps: tuple[TimedStep, ...]
    sent: tuple[Inner, ...]

    @cached_property
    def compute(self) -> float:
        """Seconds that the rank computes."""
        return sum(step.compute for step in self.steps)

    @cached_property
    def sending(self) -> float:
        """Seconds that its collectives take, each alone."""
        return sum(seconds for *_, seconds in self.sent)

    @cached_property
    def exposed(self) -> float:
        """Seconds of its collectives that it does not hide behind what it computes."""
        if not any(step.beside for step in self.steps):
            return self.sending
        taken = seconds_of(self.steps, self.mesh, self.device)
        return rounded(taken - self.compute, taken)


def body_of(shape: Shape, strategy: Strategy, mesh: Mesh, device: Hardware) -> Body:
    """What runs for an operator. Every step of a ring is a kernel of its own, which reads its operands and writes what
    it makes."""
    flops, moved = work(shape, strategy, mesh)
    slowest, drawing = imbalance(shape, strategy), 0.0
    if shape.drawn is not None:
        drawing = device.drawing_seconds(drawn(shape, strategy, mesh), stream=shape.drawn.stream)
    made: list[TimedStep] = []
    inner: list[Inner] = []

    def timed(several: Sequence[Sent]) -> tuple[Transfer, ...]:
        known = [(one.collective, one.axis, one.size, slowest * _seconds(one, mesh, device)) for one in several]
        inner.extend(known)
        return tuple([(axis, seconds) for _, axis, _, seconds in known])

    for step in steps(shape, strategy, mesh):
        rest = moved, shape.dtype, shape.fused.launches
        compute = device.compute_seconds(step.part * flops, *rest) if shape.computes else 0.0
        compute += device.compute_seconds(0.0, step.copied, shape.dtype) if step.copied else 0.0
        compute += step.part * drawing
        made.append(TimedStep(slowest * compute, timed(step.before), timed(step.beside), timed(step.after)))
    return Body(mesh, device, tuple(made), tuple(inner))


def _seconds(sent: Sent, mesh: Mesh, device: Hardware) -> float:
    if sent.by and mesh.sizes[sent.axis] > 1:
        return device.passing_seconds(sent.size, mesh, sent.axis, sent.by)
    return step_seconds(sent.collective, sent.axis, sent.size, mesh, device)
