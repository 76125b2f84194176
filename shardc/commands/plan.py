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
from shardc.options import AUTO, Options, SearchOptions, batch_range
from shardc.search.batches import resized
from shardc.search.ranking import MeshSearch
from shardc.search.search import search

FILE_OR_CONFIG = "Python file with model() and inputs(), or a config.json of transformers, or the folder of one."
ONE_OF = create_mutex_group(required=True, title="mesh, or devices")


@dataclass(frozen=True)
class PlanCommand(Shows):
    """Print the plan: layouts, conversions, predicted time, proof."""

    file: Annotated[Path, Positional, arg(metavar="FILE", help=FILE_OR_CONFIG)]
    options: Annotated[SearchOptions, FLAT]
    mesh: Annotated[str | None, ONE_OF, AXES] = None
    devices: Annotated[int | None, ONE_OF, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Instead: plan for all meshes of so many devices, with the micro-batches that memory needs, rank the plans by
    tokens a second, and print the command for the best."""
    seq: Annotated[int | None, arg(metavar="TOKENS", help_behavior_hint="(for a config)")] = None
    """How many tokens a sequence has."""

    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PLAN.JSON", help_behavior_hint="")] = None
    """Write the plan here, for --plan, for `shardc diff`, and to edit."""

    def run(self) -> int:
        if self.devices is not None:
            return self._search(self.devices)
        assert self.mesh is not None  # one of the two is required
        kept = replace(self.options, microbatches=None, batch=None)
        idle = [flag for flag in spelled(kept, SearchOptions) if flag not in spelled(kept, Options)]
        if idle:
            raise ShardcError(f"{' '.join(idle)} is for a search; ask for one with --devices in place of --mesh")
        rows = self.options.batch
        if isinstance(rows, str):
            raise ShardcError(f"--batch {rows} is for a search: name a number, or --devices in place of --mesh")
        if self.output is not None:
            check_folder(self.output)
        call, options = self._call(rows), replace(self.options, microbatches=self.options.microbatches or 1)
        other = rows if not is_config(self.file) else None
        call = call if other is None else call.example(lambda _: other)
        with working(f"compiling {self.file.name} for {self.mesh}"), resized(other):
            plan = compiled(call, Mesh.parse(self.mesh), options).plan
        self.show(plan.report(), plan)
        if self.output is not None:
            plan.save(self.output)
            print(f"wrote {self.output}", file=sys.stderr)
        return 0

    def _search(self, devices: int) -> int:
        if self.output is not None:
            raise ShardcError("-o writes the plan for one mesh; name it with --mesh in place of --devices")
        batch, options = self.options.batch, self.options
        if is_config(self.file) and batch is not None:
            low, high = (devices, 0) if batch == AUTO else batch_range(batch)
            call = self._call(low)
            options = replace(options, batch=None if low == high else batch)
        else:
            call = self._call(None)
        ranking = search(call, devices, options)
        command = shlex.join(["shardc", "plan", str(self.file), *self._best(ranking)])
        report = ranking.report()
        self.show(replace(report, tail=[*report.tail, "", command]), {**data(ranking), "command": command})
        return 0

    def _best(self, ranking: MeshSearch) -> list[str]:
        """The flags that plan for the best of a ranking."""
        rows = ranking.batch if self.options.batch is not None else None
        sizes = [f"--{name}={size}" for name, size in (("batch", rows), ("seq", self.seq)) if size]
        chosen = replace(
            self.options, microbatches=ranking.microbatches, optimizer=ranking.optimizer or self.options.optimizer
        )
        return [*sizes, f"--mesh={ranking.best}", *spelled(chosen, Options)]

    def _call(self, batch: int | None) -> ModelCall:
        """What is planned: the call of a Python file, or the training step of a config."""
        if is_config(self.file):
            return step_from_config(self.file, batch, self.seq)
        if self.seq is not None:
            raise ShardcError(f"--seq is for a config; how long the inputs of {self.file} are, inputs() says")
        return ModelCall.of(*load_file(self.file))
