"""`shardc plan`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, create_mutex_group

from shardc.commands.shows import Shows, check_folder
from shardc.commands.user_file import AXES, FLAT, load_file
from shardc.errors import ShardcError
from shardc.family import compiled
from shardc.flags import spelled
from shardc.from_config import is_config, step_from_config
from shardc.inspect.data import data
from shardc.inspect.progress import working
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.options import Options, SearchOptions
from shardc.search import search

FILE_OR_CONFIG = "Python file with model() and inputs(), or a config.json of transformers, or the folder of one."
ONE_OF = create_mutex_group(required=True, title="mesh, or devices")


@dataclass(frozen=True)
class PlanCommand(Shows):
    """Print the plan: layouts, conversions, predicted time, proof."""

    file: Annotated[Path, Positional, arg(metavar="FILE", help=FILE_OR_CONFIG)]
    options: Annotated[SearchOptions, FLAT]
    mesh: Annotated[str | None, ONE_OF, AXES] = None
    devices: Annotated[int | None, ONE_OF, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Instead: plan for all meshes of so many devices, rank them, and print the command for the best."""
    batch: Annotated[int | None, arg(metavar="ROWS", help_behavior_hint="(for a config)")] = None
    """How many sequences, or pictures, a step takes."""
    seq: Annotated[int | None, arg(metavar="TOKENS", help_behavior_hint="(for a config)")] = None
    """How many tokens a sequence has."""

    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PLAN.JSON", help_behavior_hint="")] = None
    """Write the plan here, for --plan, for `shardc diff`, and to edit."""

    def run(self) -> int:
        flags = spelled(self.options, Options)
        if self.devices is not None:
            if self.output is not None:
                raise ShardcError("-o writes the plan for one mesh; name it with --mesh in place of --devices")
            ranking = search(self._call(), self.devices, self.options)
            sizes = [f"--{name}={size}" for name, size in (("batch", self.batch), ("seq", self.seq)) if size]
            command = shlex.join(["shardc", "plan", str(self.file), *sizes, f"--mesh={ranking.best}", *flags])
            report = ranking.report()
            self.show(replace(report, tail=[*report.tail, "", command]), {**data(ranking), "command": command})
            return 0
        assert self.mesh is not None  # one of the two is required
        idle = [flag for flag in spelled(self.options, SearchOptions) if flag not in flags]
        if idle:
            raise ShardcError(f"{' '.join(idle)} is for a search; ask for one with --devices in place of --mesh")
        if self.output is not None:
            check_folder(self.output)
        call = self._call()
        with working(f"compiling {self.file.name} for {self.mesh}"):
            plan = compiled(call, Mesh.parse(self.mesh), self.options).plan
        self.show(plan.report(), plan)
        if self.output is not None:
            plan.save(self.output)
            print(f"wrote {self.output}", file=sys.stderr)
        return 0

    def _call(self) -> ModelCall:
        """What is planned: the call of a Python file, or the training step of a config."""
        if is_config(self.file):
            return step_from_config(self.file, self.batch, self.seq)
        if self.batch is not None or self.seq is not None:
            raise ShardcError(f"--batch and --seq are for a config; how large a step of {self.file} is, inputs() says")
        return ModelCall.of(*load_file(self.file))
