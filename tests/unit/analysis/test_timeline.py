"""When collectives end, as the cost model has it."""

from dataclasses import replace

import pytest

from shardc.cost.clock import Clock
from shardc.cost.hardware import hardware
from shardc.ir.mesh import Mesh


@pytest.fixture
def clock() -> Clock:
    h100 = hardware("h100")
    return Clock(Mesh.parse("dp=2,tp=2"), replace(h100, inside=replace(h100.inside, overlap=0.75)))


def test_a_collective_and_what_is_computed_beside_it_share_the_cores(clock: Clock) -> None:
    flight = clock.start("dp", 4.0)
    clock.compute(2.0)
    assert clock.now == 2.5 and clock.rest(flight) == 2.0  # both took a quarter longer
    clock.wait(flight)
    assert clock.now == 4.5


def test_once_a_collective_has_ended_the_rank_computes_alone(clock: Clock) -> None:
    flight = clock.start("dp", 4.0)
    clock.compute(6.0)
    assert clock.now == 7.0 and clock.rest(flight) == 0.0  # as `shardc calibrate` measures overlap: 6 + (1 - 0.75) 4
    clock.wait(flight)
    assert clock.now == 7.0


def test_an_axis_carries_one_after_another_and_axes_theirs_side_by_side(clock: Clock) -> None:
    first, second, third = clock.start("dp", 4.0), clock.start("dp", 4.0), clock.start("tp", 1.0)
    assert [clock.rest(one) for one in (first, second, third)] == [4.0, 8.0, 1.0]
    clock.wait(first)
    assert clock.now == 4.0 and clock.rest(second) == 4.0 and clock.rest(third) == 0.0


def test_a_rank_that_waits_leaves_collectives_its_cores_and_no_more() -> None:
    h100 = hardware("h100")
    clock = Clock(Mesh.parse("dp=2,tp=2"), replace(h100, inside=replace(h100.inside, overlap=0.01)))
    one, other = clock.start("dp", 1.0), clock.start("tp", 2.0)
    clock.wait(one)
    clock.wait(other)
    assert clock.now == pytest.approx(2 * 0.99 + 1.0)  # both took the cores, then one alone


def test_each_that_runs_beside_costs_its_stall() -> None:
    h100 = hardware("h100")
    device = replace(h100, inside=replace(h100.inside, overlap=0.75, stall=1.0))
    clock = Clock(Mesh.parse("dp=2,tp=2"), device)
    clock.start("dp", 4.0)
    clock.compute(6.0)
    assert clock.now == 8.0 and clock.hides("dp", 4.0) and not clock.hides("dp", 1.25)
    clock.start("dp", 1.0)
    assert clock.hides("dp", 1.25)  # there it would have to be waited for what is under way, too
    clock.compute(1.0)
    assert clock.now == 10.25
    clock.run("tp", 4.0)
    assert clock.now == 14.25  # nothing is computed beside it
    assert device.hidden(Mesh.parse("dp=2,tp=2"), "dp", 4.0) == 2.0


def test_what_a_computing_rank_leaves_is_told_beforehand(clock: Clock) -> None:
    flight = clock.start("dp", 4.0)
    left = clock.beside(flight)
    clock.compute(8.0)
    assert left == 5.0 and clock.now == 8.0 + 1.0


def test_collectives_of_several_axes_take_from_the_cores_together(clock: Clock) -> None:
    one, other = clock.start("dp", 1.0), clock.start("tp", 3.0)
    clock.compute(2.0)
    assert clock.now == 1.5 + 1.25 and clock.rest(one) == 0.0 and clock.rest(other) == 1.0
