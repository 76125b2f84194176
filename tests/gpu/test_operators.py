"""On a GPU: a sample of torch's operator database, in layouts of a mesh of parts of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from gpu.device import DEVICE, needs_a_gpu
from opinfo.judge import PHASES, RECORDED
from opinfo.summary import phase
from opinfo.workers import Worker

pytestmark = needs_a_gpu
EVERY = 2
"""Of the operators that the CPU's sample has, every so many."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process of its own: torch's database sets global flags when it is imported."""
    process = Worker(samples=1, timeout=120, device=DEVICE.type)
    yield process
    process.close()


@pytest.mark.parametrize("name", [*json.loads(RECORDED.read_text())][::EVERY])
def test_operator(worker: Worker, name: str) -> None:
    record = worker.judge(name)
    assert record.status in ("ok", "no samples")
    failed = [(run.layout, v.status, v.why) for kind in PHASES for run, v in phase(record, kind).runs]
    assert [each for each in failed if each[1] in ("wrong", "error")] == []
