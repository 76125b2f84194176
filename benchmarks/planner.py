"""The planner against itself at depth, against HiGHS on the same problem, and against what papers derived by hand.

    python benchmarks/planner.py            # everything; the tables of README.md
    python benchmarks/planner.py --only time
    python benchmarks/planner.py --only models --models Falcon-180B --axes 2 3    # only when asked for: hours in all

Times are CPU-seconds, every case of them in a fresh process; those that a ratio compares are taken in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import large_models
import numpy as np
import plan_rows
import torch
from compile import machine
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor, nn

from shardc.inspect.progress import tracked

os.environ["SHARDC_PLAN_CACHE"] = "off"  # what is measured is solved

HERE = Path(__file__).resolve().parent
HARDWARE, SEQUENCE = "h100", 4096
SHALLOW, DEEP = 32, 126
STATES = 8
"""Bytes that the optimizer holds for an element of a parameter, under a bound on memory: two moments in float32."""
HIGHS_LIMIT = 240.0
"""Seconds of wall time after which HiGHS is stopped."""
HIGHS_MEMORY = 0.85
"""The part of this machine's memory that a process may address while HiGHS runs in it."""


@dataclass(frozen=True)
class Case:
    """One model, forward and backward, on one mesh."""

    model: str
    layers: int
    mesh: str
    batch: int
    memory: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}, {self.layers} layers" + f", {self.memory}" * bool(self.memory)


TIMED = (
    Case("Llama-3-8B", 32, "dp=4,tp=8", 32),
    Case("Mixtral-8x7B", 32, "dp=4,tp=8", 32),
    Case("Llama-3-405B", SHALLOW, "node=16,gpu=8", 128),
    Case("Llama-3-405B", DEEP, "node=16,gpu=8", 128),
)
DEEPER = (  # three axes, or a bound on memory
    Case("Mixtral-8x7B", 32, "dp=4,ep=8", 32, "80GB"),
    Case("DeepSeek-V3", 61, "dp=8,ep=32", 256, "80GB"),
    Case("Llama-3-405B", DEEP, "dp=8,cp=4,tp=8", 256),
    Case("Llama-3-405B", SHALLOW, "node=16,gpu=8", 128, "25GB"),
    Case("Llama-3-405B", DEEP, "node=16,gpu=8", 128, "80GB"),
    Case("Llama-3-405B", DEEP, "dp=8,cp=4,tp=8", 128, "80GB"),
)
SOLVED = (
    Case("Llama-3-8B", 2, "dp=4,tp=8", 32),
    Case("Llama-3-8B", 8, "dp=4,tp=8", 32),
    Case("Llama-3-8B", 0, "dp=4,cp=4,tp=8", 32),  # embedding, last norm, head and loss
    Case("Llama-3-8B", 2, "dp=4,cp=4,tp=8", 32),
)


def build(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and its inputs, on the meta device, in bf16; it gives the loss alone."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    import llama

    if case.model.startswith("Llama"):
        size = case.model.rpartition("-")[2].lower()
        return llama.build(size, case.layers, llama.LlamaForCausalLMLoss), llama.example_inputs(case.batch, SEQUENCE)
    import transformers

    class WithLoss(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, labels=labels, use_cache=False).loss

    name = {"Mixtral-8x7B": "Mixtral", "DeepSeek-V3": "DeepseekV3"}[case.model]
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=case.layers, use_cache=False)
    with torch.device("meta"):
        tokens = torch.empty(case.batch, SEQUENCE, dtype=torch.int64)
        model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
    return WithLoss(model), {"input_ids": tokens, "labels": torch.empty_like(tokens)}


def timed(case: Case) -> dict[str, Any]:
    """Compile one case in this process: CPU-seconds by phase, and what was proved; then prove it anew."""
    import shardc.api
    from shardc.capture import trace as capture

    stitching, fill = 0.0, capture.fill

    def filled(*args: Any) -> Any:
        nonlocal stitching
        start = time.process_time()
        program = fill(*args)
        stitching += time.process_time() - start
        return program

    capture.fill = filled
    model, inputs = build(case)
    start = time.process_time()
    within = {"memory": case.memory, "optimizer": STATES} if case.memory else {"memory": "unbounded"}
    compiled = shardc.compile(model, case.mesh, inputs, hardware=HARDWARE, **within)
    total = time.process_time() - start
    plan = compiled.plan
    phases = dict(plan.phases)
    rest = total - sum(phases.values())
    start = time.process_time()
    proved = plan.check()
    check = time.process_time() - start
    start = time.process_time()
    assert compiled.code  # written when it is asked for, no part of the plan
    code = time.process_time() - start
    whole = total + check
    return {"phases": {**phases, "rest": rest, "total": total, "check": check, "in all": whole,
                       "but for stitching": whole - stitching, "code": code},
            "gap": 1 - plan.lower_bound / plan.cost, "checked": 1 - proved / plan.cost,
            "seconds": plan.predicted, "peak": plan.memory.peak}  # fmt: skip


def problem_of(case: Case) -> Any:
    """The cost network of one case, as it is given to the solver."""
    import shardc.api
    from shardc.passes import assign

    class Caught(Exception):
        pass

    caught: list[Any] = []

    def catch(problem: Any, **_: Any) -> Any:
        caught.append(problem)
        raise Caught

    before, assign.solve = assign.solve, catch
    try:
        model, inputs = build(case)
        shardc.compile(model, case.mesh, inputs, hardware=HARDWARE, memory="unbounded")
    except Caught:
        pass
    finally:
        assign.solve = before
    return caught[0]


def highs(problem: Any) -> tuple[float, float, str, float]:
    """The best plan by HiGHS, what it proved, why it ended early, if it did, and its CPU-seconds.

    The textbook's program, with a 0/1 variable for every value that is allowed, and for every pair of neighbours'
    values one that is 1 where both are. Values whose rows of a table are equal count as one there: it has the same
    optimum, and needs less memory."""
    scale = 1e6  # HiGHS stops at absolute gaps of 1e-6
    place: list[np.ndarray] = []
    costs: list[np.ndarray] = []
    count = rows = 0
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for unary in problem.unary:
        allowed = np.flatnonzero(np.isfinite(unary))
        index = np.full(len(unary), -1)
        index[allowed] = count + np.arange(len(allowed))
        place.append(index)
        costs.append(unary[allowed])
        entries.append((np.full(len(allowed), rows), index[allowed], np.ones(len(allowed))))
        count, rows = count + len(allowed), rows + 1
    values = count
    for (one, other), table in problem.edges.items():
        small, groups = table, list[np.ndarray]()
        for end in (one, other):  # rows first, then columns
            _, first, group = np.unique(small, axis=0, return_index=True, return_inverse=True)
            groups.append(np.where(place[end] >= 0, group.reshape(-1), -1))
            small = small[first].T
        a, b = np.nonzero(np.isfinite(small))
        pairs = count + np.arange(len(a))
        for end, group, chosen, size in zip((one, other), groups, (a, b), small.shape, strict=True):
            own = np.flatnonzero(group >= 0)
            entries.append((rows + chosen, pairs, np.ones(len(pairs))))
            entries.append((rows + group[own], place[end][own], -np.ones(len(own))))
            rows += size
        costs.append(small[a, b])
        count += len(a)
    row, column, factor = (np.concatenate(part) for part in zip(*entries, strict=True))
    right = np.concatenate([np.ones(len(problem.unary)), np.zeros(rows - len(problem.unary))])
    matrix = coo_array((factor, (row, column)), shape=(rows, count)).tocsr()
    start = time.process_time()
    found = milp(
        np.concatenate(costs) * scale, constraints=LinearConstraint(matrix, right, right), bounds=Bounds(0, 1),
        integrality=(np.arange(count) < values).astype(np.int8),
        options={"time_limit": HIGHS_LIMIT, "mip_rel_gap": 1e-9},
    )  # fmt: skip
    best = float(found.fun) / scale if found.x is not None else float("inf")
    bound = float(found.mip_dual_bound) / scale if found.mip_dual_bound is not None else 0.0
    ended = f"stopped at {HIGHS_LIMIT:.0f} s wall" if found.status == 1 else found.message
    return best, bound, "" if found.status == 0 else ended, time.process_time() - start


def against_highs(case: Case) -> dict[str, Any]:
    """One problem, given to both in this process: CPU-seconds and objectives."""
    from shardc.passes.assign import solved

    problem = problem_of(case)
    start = time.process_time()
    ours = solved(problem, HIGHS_LIMIT)
    between = time.process_time()
    allowed = int(HIGHS_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    try:
        best, bound, ended, theirs = highs(problem)
    except MemoryError:
        best, bound, ended = float("inf"), 0.0, f"out of memory ({allowed / 1e9:.0f} GB allowed)"
        theirs = time.process_time() - between
    return {"variables": len(problem.unary), "ours": between - start, "cost": ours.cost, "exact": bool(ours.exact),
            "theirs": theirs, "best": best, "bound": bound, "ended": ended}  # fmt: skip


def apart(what: str, case: Case) -> dict[str, Any]:
    """What `timed` or `against_highs` finds in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps([what, asdict(case)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case.name} on {case.mesh}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, in columns."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def times() -> str:
    """How long compiling takes, by phase, and how it grows with depth."""
    found = {case: apart("time", case) for case in tracked((*TIMED, *DEEPER), "time")}
    phases = list(next(iter(found.values()))["phases"])
    rows = [
        [case.name, case.mesh, *(f"{one['phases'].get(phase, 0.0):.2f}" for phase in phases),
         proved(one["gap"]), proved(one["checked"]), f"{one['seconds']:.3f}", f"{one['peak'] / 1e9:.1f}"]
        for case, one in found.items()
    ]  # fmt: skip
    shallow, deep = (found[case]["phases"] for case in TIMED[-2:])
    growth = [f"{deep[p] / shallow[p]:.1f}" if shallow.get(p, 0.0) >= 0.02 else "–" for p in phases]
    rows.append([f"ratio, {DEEP / SHALLOW:.1f} times the layers", "", *growth, "", "", "", ""])
    head = ["model", "mesh", *phases, "plan", "proved anew", "seconds a step", "GB a device"]
    return f"Compiling:\n\n{markdown(head, rows)}\n\n"


def proved(gap: float) -> str:
    return "optimal" if gap < 1e-8 else f"within {gap:.1e}"


def solvers() -> str:
    """Our solver and HiGHS on the same problems."""
    rows: list[list[str]] = []
    for case in tracked(SOLVED, "highs"):
        one = apart("highs", case)
        end = f", {one['ended']}" if one["ended"] else ""
        best = f"{one['best']:.9g}" if one["best"] < float("inf") else "none found"
        if one["ended"]:
            best += f", at least {one['bound']:.4g}"
        ratio = f"{'> ' if one['ended'] else ''}{one['theirs'] / one['ours']:.0f}"
        cost = f"{one['cost']:.9g}{'' if one['exact'] else ' (not proved)'}"
        rows.append([case.name, case.mesh, str(one["variables"]), f"{one['ours']:.2f}", f"{one['theirs']:.1f}{end}",
                     ratio, cost, best])  # fmt: skip
    head = ["model", "mesh", "variables", "shardc", "HiGHS", "ratio", "objective", "HiGHS's objective"]
    return f"Solving the same network, CPU-seconds and seconds of the plan:\n\n{markdown(head, rows)}\n\n"


def closed_forms() -> str:
    """What papers derived by hand, over grids."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import checks.closed_forms as known

    shapes = ((8192, 1024, 4096), (2048, 8192, 1024), (65536, 4096, 2048), (512, 2048, 8192))
    equal = cheaper = dearer = best = count = 0
    for devices in tracked((4, 8, 16, 32), "AxoNN"):
        for shape in shapes:
            pairs = [(c, c.seconds(), c.planned(True)) for c in known.axonn_cases(devices, (shape,))]
            count += len(pairs)
            equal += sum(abs(paper - ours) <= 1e-9 * paper for _, paper, ours in pairs)
            best += min(pairs, key=lambda p: p[1])[0] == min(pairs, key=lambda p: p[2])[0]
            free = [(c.planned(False), paper) for c, paper, _ in pairs]
            cheaper += sum(ours < paper * (1 - 1e-9) for ours, paper in free)
            dearer += sum(ours > paper * (1 + 1e-9) for ours, paper in free)
    rows = [
        ["AxoNN's layer, its layouts", f"{count} configurations", f"{equal} cost what the formulas say"],
        ["AxoNN's layer, best configuration", f"{4 * len(shapes)} shapes x devices", f"{best} the same"],
        ["AxoNN's layer, products free", f"{count} configurations", f"{dearer} dearer, {cheaper} cheaper"],
    ]
    sizes = (256, 1024, 4096)
    layers = [known.Poseidon(m, n, k, p) for m in sizes for n in sizes for k in (1, 8, 64, 512) for p in (4, 8, 16)]
    ways: dict[str, int] = {}
    right = decided = strict = 0
    for layer in tracked(layers, "Poseidon"):
        seconds, plan = layer.seconds(), layer.planned().plan
        least = min(seconds.values())
        way = min(seconds, key=lambda w: seconds[w])
        right += abs(plan.cost - least) <= 1e-9 * least
        ways[way] = ways.get(way, 0) + 1
        kinds = {c.kind for c in plan.conversions if c.sent}
        first, second = seconds["reduce the gradient"], seconds["gather the factors"]
        if min(first, second) == least and first != second:
            strict += 1
            decided += (kinds == {"all_gather"}) == layer.inequality
    rows += [
        ["Poseidon, least of four ways", f"{len(layers)} layers", f"{right} cost what the formula says"],
        ["Poseidon, the inequality", f"{strict} layers where one of its two ways is best", f"{decided} as it says"],
    ]
    rows += [[f"of them: {way}", "", str(number)] for way, number in ways.items()]
    for recipe in tracked(known.recipes(), "recipes"):
        ours, free = recipe.planned(False), recipe.planned(True)
        same = all(abs(known.sent(ours)[k] - v) < 1 for k, v in recipe.sends.items())
        same = same and known.sent(ours).keys() == recipe.sends.keys()
        answer = "sends what the recipe sends" if same else f"sends {known.sent(ours)}"
        rows.append([recipe.name, recipe.mesh, f"{answer}; free: {free.plan.cost / ours.plan.cost:.3f} of its time"])
    return f"Closed forms:\n\n{markdown(['what', 'over', 'found'], rows)}\n"


def models(names: Sequence[str], axes: Sequence[int], parts: Sequence[float], file: Path) -> str:
    """Large models within bounds on memory, planned a row at a time; rows that the file has are not planned again."""
    found = plan_rows.measured(plan_rows.rows(names, axes, parts), file)
    return f"Models within bounds:\n\n{markdown(*plan_rows.table(found))}\n\n{plan_rows.summary(found)}\n"


SECTIONS = {"time": times, "highs": solvers, "forms": closed_forms}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=[*SECTIONS, "models"], help="one section")
    parser.add_argument("--models", default=",".join(large_models.BUILDERS), help="of `--only models`, by comma")
    parser.add_argument("--axes", type=int, nargs="+", default=[1, 2, 3, 4], help="of their meshes")
    parser.add_argument("--parts", type=float, nargs="+", default=plan_rows.PARTS, help="of the free peak, as bounds")
    parser.add_argument("--rows", type=Path, default=plan_rows.ROWS, help="the file that keeps what was measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        what, case = json.loads(options.case)
        print(json.dumps({"time": timed, "highs": against_highs}[what](Case(**case))))
        return
    print(f"CPU-seconds; sequences of {SEQUENCE} tokens, bf16, costs of {HARDWARE}. Machine: {machine()}.\n")
    if options.only == "models":
        print(models(options.models.split(","), options.axes, options.parts, options.rows))
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            print(section(), flush=True)


if __name__ == "__main__":
    main()
