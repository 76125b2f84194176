"""`shardc profile`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist

from shardc.commands.shows import check_folder
from shardc.commands.trace import TRACE
from shardc.commands.user_file import OnMesh, load_values
from shardc.errors import ShardcError
from shardc.family import compiled
from shardc.inspect.console import show
from shardc.inspect.measured import MeasuredRank, differences, measuring, processes
from shardc.inspect.progress import working
from shardc.inspect.trace import write
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.printing import in_seconds
from shardc.ir.report import Report
from shardc.one_step import step


@dataclass(frozen=True)
class ProfileCommand(OnMesh):
    """Run steps on the mesh (virtual, or under torchrun), and compare what the last took with what was predicted."""

    output: Annotated[Path, TRACE]
    """Write both timelines here, as one trace."""
    steps: int = 3
    """Run so many steps; the last is measured."""

    def run(self) -> int:
        if self.steps < 1:
            raise ShardcError(f"--steps={self.steps} measures nothing; ask for one step or more")
        check_folder(self.output)
        torch.manual_seed(0)
        model, inputs = load_values(self.file)
        with working(f"compiling {self.file.name} for {self.mesh}"):
            options = replace(self.options, data=None)  # inputs() gives the whole batch on every rank
            program = compiled(ModelCall.of(model, inputs), Mesh.parse(self.mesh), options)
        executable = program.executable
        with measuring(executable, program.code) as measured:
            for _ in range(self.steps):
                measured.clear()
                step(program, inputs)
        ranks = _gathered(measured.ranks())
        if os.environ.get("RANK", "0") == "0":
            expected, found = program.timeline(), processes(ranks, program.statements())
            write(self.output, [expected, *found])
            lasted = max((one.end for one in found[0].slices), default=0.0)
            head = [f"predicted {in_seconds(program.plan.predicted)} a step, measured {in_seconds(lasted)} on rank 0"]
            show(Report(head, [differences(expected, found[0])]))
            print(f"wrote {self.output}", file=sys.stderr)
        return 0


def _gathered(ranks: list[MeasuredRank]) -> list[MeasuredRank]:
    """Those of all ranks, on rank 0; every process has its own clock, and begins at 0."""
    if not dist.is_initialized():
        return ranks
    first = dist.get_rank() == 0
    everywhere: list[list[MeasuredRank]] = [[] for _ in range(dist.get_world_size() if first else 0)]
    dist.gather_object(ranks, everywhere if first else None)
    return [one for here in everywhere for one in here]
