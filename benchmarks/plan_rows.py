"""Rows of `planner.py --only models`: one model on one mesh within one bound, planned in a fresh process.

Every row is added to a file of JSON lines as soon as it is known, and no row that is there is planned again. A model on
a mesh is planned without a bound first: the bounds are parts of the peak of that plan.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import large_models

HERE = Path(__file__).resolve().parent
ROWS = Path(tempfile.gettempdir()) / "shardc_models.jsonl"
HARDWARE, STATES = "h100", 8.0
PARTS = (1.0, 0.6, 0.35)
"""Bounds, as parts of the peak of the plan without one."""
LIMIT = 120
"""CPU-seconds of a row, building the model and capturing it included, after which its process is ended."""


@dataclass(frozen=True)
class Row:
    """A model on a mesh. Without a bound `part` is 0."""

    model: str
    mesh: str
    part: float


def rows(models: Iterable[str], axes: Sequence[int], parts: Sequence[float]) -> Iterator[Row]:
    for model in models:
        for count in axes:
            for part in (0.0, *parts):
                yield Row(model, large_models.meshes(model)[count - 1], part)


def measured(wanted: Iterable[Row], file: Path) -> dict[Row, dict[str, Any]]:
    """What is known of rows; those that are not in the file are planned and added to it."""
    known: dict[Row, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row, found = json.loads(line)
        known[Row(**row)] = found
    found: dict[Row, dict[str, Any]] = {}
    for row in wanted:
        if row not in known:
            peak = known.get(Row(row.model, row.mesh, 0.0), {}).get("peak", 0.0)
            known[row] = _apart(row, peak) if peak or not row.part else {"ended": "no plan without a bound"}
            with file.open("a") as lines:
                lines.write(json.dumps([asdict(row), known[row]]) + "\n")
            print(_line(row, known[row]), file=sys.stderr, flush=True)
        found[row] = known[row]
    return found


def _apart(row: Row, peak: float) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "plan_rows.py"), json.dumps([asdict(row), peak])]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if done.returncode:
        taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        late = taken >= LIMIT - 1.0
        said = [line for line in done.stderr.splitlines() if "Error:" in line] or ["killed"]
        found["ended"] = f"stopped after {LIMIT} s" if late else said[-1].rpartition("Error: ")[2]
    return found


def plan(row: Row, peak: float) -> None:
    """Plan a row in this process; prints what is found as it is found."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    import torch

    torch.set_num_threads(1)
    import shardc

    model, inputs = large_models.build(row.model)
    within = {"memory": row.part * peak} if row.part else {"memory": "unbounded"}
    start = time.process_time()
    compiled = shardc.compile(model, row.mesh, inputs, hardware=HARDWARE, optimizer=STATES, **within)
    total, plan = time.process_time() - start, compiled.plan
    phases = plan.phases
    print(json.dumps({
        "total": total, "assign": phases["assign"], "capture": phases["capture"], "cost": plan.cost,
        "lower": plan.lower_bound, "predicted": plan.predicted, "peak": plan.memory.peak, "bound": row.part * peak,
    }), flush=True)  # fmt: skip
    start = time.process_time()
    proved = plan.check()
    print(json.dumps({"proved": proved, "check": time.process_time() - start}), flush=True)


def table(found: dict[Row, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table."""
    head = ["model", "mesh", "bound", "seconds", "gap", "proved anew", "used", "seconds a step", "check"]
    return head, [_cells(row, one) for row, one in found.items()]


def summary(found: dict[Row, dict[str, Any]]) -> str:
    """What all bounded rows have together."""
    bounded = {row: one for row, one in found.items() if row.part}
    planned = [one for one in bounded.values() if "cost" in one]
    if not planned:
        return ""
    seconds, gaps = [one["total"] for one in planned], [1.0 - one["lower"] / one["cost"] for one in planned]
    return (
        f"{len(planned)} of {len(bounded)} planned, {sum(t <= 60 for t in seconds)} within 60 s, median "
        f"{statistics.median(seconds):.1f} s; gap at most 1e-2 in {sum(g <= 1e-2 for g in gaps)}, at most 1e-3 in "
        f"{sum(g <= 1e-3 for g in gaps)}"
    )


def _cells(row: Row, one: dict[str, Any]) -> list[str]:
    bound = f"{row.part:g}" if row.part else "none"
    if "cost" not in one:
        return [row.model, row.mesh, bound, one.get("ended", "")[:120], *[""] * 5]
    anew = f"{1.0 - one['proved'] / one['cost']:.1e}" if "proved" in one else "–"
    used = f"{one['peak'] / one['bound']:.3f}" if one["bound"] else f"{one['peak'] / 1e9:.1f} GB"
    check = f"{one['check']:.1f}" if "check" in one else one.get("ended", "")
    return [row.model, row.mesh, bound, f"{one['total']:.1f}", f"{1.0 - one['lower'] / one['cost']:.1e}", anew, used,
            f"{one['predicted']:.4g}", check]  # fmt: skip


def _line(row: Row, one: dict[str, Any]) -> str:
    return " | ".join(_cells(row, one))


if __name__ == "__main__":
    os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved
    asked, peak_of_free = json.loads(sys.argv[1])
    plan(Row(**asked), peak_of_free)
