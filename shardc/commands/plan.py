"""`shardc plan`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg, create_mutex_group

from shardc.commands.user_file import AXES, FLAT, UserFile, compile_file, load_file
from shardc.errors import ShardcError
from shardc.flags import spelled
from shardc.inspect.console import show
from shardc.options import Options, SearchOptions
from shardc.search import search

ONE_OF = create_mutex_group(required=True, title="mesh, or devices")


@dataclass(frozen=True)
class PlanCommand:
    """Print the plan: layouts, conversions, predicted time, proof."""

    file: UserFile
    options: Annotated[SearchOptions, FLAT]
    mesh: Annotated[str | None, ONE_OF, AXES] = None
    devices: Annotated[int | None, ONE_OF, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Instead: plan for all meshes of so many devices, rank them, and print the command for the best."""

    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PLAN.JSON", help_behavior_hint="")] = None
    """Write the plan here, for --plan, for `shardc diff`, and to edit."""

    def run(self) -> int:
        flags = spelled(self.options, Options)
        if self.devices is not None:
            if self.output is not None:
                raise ShardcError("-o writes the plan for one mesh; name it with --mesh in place of --devices")
            ranking = search(*load_file(self.file), self.devices, self.options)
            show(ranking.report())
            print("\n" + shlex.join(["shardc", "plan", str(self.file), f"--mesh={ranking.best}", *flags]))
            return 0
        assert self.mesh is not None  # one of the two is required
        idle = [flag for flag in spelled(self.options, SearchOptions) if flag not in flags]
        if idle:
            raise ShardcError(f"{' '.join(idle)} is for a search; ask for one with --devices in place of --mesh")
        plan = compile_file(self.file, self.mesh, self.options).plan
        show(plan.report())
        if self.output is not None:
            plan.save(self.output)
            print(f"wrote {self.output}", file=sys.stderr)
        return 0
