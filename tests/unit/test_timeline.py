"""When collectives end, as the cost model has it."""

from dataclasses import replace

import pytest

from shardc.cost.hardware import hardware
from shardc.mesh import Mesh
from shardc.passes.timeline import Clock


@pytest.fixture
def clock() -> Clock:
    h100 = hardware("h100")
    return Clock(Mesh.parse("dp=2,tp=2"), replace(h100, inside=replace(h100.inside, overlap=0.75)))


def test_a_collective_that_was_started_keeps_the_rank_busy_for_what_does_not_overlap(clock: Clock) -> None:
    assert clock.start("dp", 4.0) == 4.0 and clock.now == 1.0
    clock.now += 2.0
    clock.wait(4.0)
    assert clock.now == 4.0


def test_an_axis_carries_one_after_another_each_for_all_of_its_time(clock: Clock) -> None:
    assert [clock.start("dp", 4.0) for _ in range(3)] == [4.0, 8.0, 12.0]
    assert clock.now == 3.0
    assert clock.start("tp", 1.0) == 4.0  # axes carry theirs side by side
