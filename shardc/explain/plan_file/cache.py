"""The cache of plans: what one process has solved, the next one takes.

The key has all that a plan depends on: the program, the mesh, the hardware, the options, what parameters are stored as,
the versions of torch and of shardc, and shardc's code. `SHARDC_PLAN_CACHE` names another folder, or is `off`.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from pathlib import Path

import torch

import shardc.explain
from shardc.explain.plan import Plan
from shardc.explain.plan_file.as_json import FORMAT, as_json, written
from shardc.explain.plan_file.asked import hardware_json, options_json
from shardc.explain.plan_file.fingerprint import digest, fingerprint
from shardc.explain.plan_file.reading import PlanFile
from shardc.ir.cached_files import cache_folder, keep_file, used
from shardc.planning.compilation import Compilation

VARIABLE = "SHARDC_PLAN_CACHE"
WORTH = 0.1
"""CPU-seconds: what takes less to solve is not kept."""


def cached_at(c: Compilation, *more: object) -> Path | None:
    """The file in which the plan of a program that was factored is, or would be, or what else is found for it that also
    depends on `more`; None if nothing is to be cached."""
    folder = os.environ.get(VARIABLE, "")
    if not c.options.cache or folder == "off":
        return None
    stored = [[str(one.key[0]), one.dims, one.text] for one in c.constraints]
    parts = [
        FORMAT, version("shardc"), _code(), torch.__version__, c.mesh.axes, hardware_json(c.options.device),
        options_json(c.options), stored, c.dims, c.time_limit, fingerprint(c.factored).digest, *more,
    ]  # fmt: skip
    return (Path(folder) if folder else cache_folder("plans")) / f"{digest(parts, 32)}.json"


def look(path: Path) -> PlanFile | None:
    """The plan that is kept in a file; None if there is none, or it is damaged."""
    try:
        found = PlanFile.read(path)
        used(path)
        return found
    except Exception:  # whatever is wrong with the file, the program is planned again
        return None


def keep(path: Path, plan: Plan) -> None:
    """Keep a plan for later processes, if it took long to find."""
    if plan.phases.get("assign", 0.0) >= WORTH:
        keep_file(path, written(as_json(plan)))


@functools.cache
def _code() -> str:
    """A hash of shardc's code: a plan is as good as the code that found it."""
    root = Path(str(shardc.explain.__file__)).parents[1]
    folders = (root, root / "passes", root / "runtime")  # the last two may be links, which rglob does not follow
    files = sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})
    return digest([path.read_text(encoding="utf-8") for path in files], 32)
