"""A fixed sample of the operator database: nothing wrong in any layout, what was right and split stays so.

`make opinfo` runs all of it, and renews what is recorded here when something got better.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from opinfo.judge import PHASES, RECORDED, SAMPLES
from opinfo.summary import BEST_FIRST, phase, status
from opinfo.workers import Worker

KNOWN: dict[str, dict[str, str]] = json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process of its own: torch's database sets global flags when it is imported."""
    process = Worker(SAMPLES, timeout=120)
    yield process
    process.close()


@pytest.mark.parametrize("name", KNOWN)
def test_operator(worker: Worker, name: str) -> None:
    record = worker.judge(name)
    assert record.status == "ok"
    wrong = [(run.layout, v.why) for kind in PHASES for run, v in phase(record, kind).runs if v.status == "wrong"]
    assert wrong == []
    now = status(record)
    for kind, before in KNOWN[name].items():
        for have, had in zip(now[kind].split(), before.split(), strict=True):
            failures = [(run.layout, v.status, v.why) for run, v in phase(record, kind).runs if v.status != "ok"]
            assert BEST_FIRST[have] <= BEST_FIRST[had], f"{kind} was {before}, is {now[kind]}: {failures}"


def test_the_sample_is_large() -> None:
    assert len(KNOWN) >= 150
