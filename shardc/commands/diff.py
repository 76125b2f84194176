"""`shardc diff`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from shardc.commands.shows import Shows
from shardc.explain.plan_file.diff import PlanDiff
from shardc.explain.plan_file.reading import PlanFile

SAVED = "A plan that was saved."


@dataclass(frozen=True)
class DiffCommand(Shows):
    """Compare two plans that were saved: what moved, what is sent otherwise, and what that costs."""

    before: Annotated[Path, Positional, arg(metavar="BEFORE.JSON", help=SAVED)]
    after: Annotated[Path, Positional, arg(metavar="AFTER.JSON", help=SAVED)]

    def run(self) -> int:
        report = PlanDiff(PlanFile.read(self.before).data, PlanFile.read(self.after).data).report()
        self.show(report, report)
        return 0
