"""`shardc run`."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace

import torch

from shardc.commands.shows import Shows
from shardc.commands.user_file import OnMesh, load_values
from shardc.family import compiled
from shardc.inspect.progress import working
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.one_step import compared


@dataclass(frozen=True)
class RunCommand(OnMesh, Shows):
    """Run one step on the mesh (virtual, or under torchrun) and compare it with a single device."""

    def run(self) -> int:
        torch.manual_seed(0)
        model, inputs = load_values(self.file)
        with working(f"compiling {self.file.name} for {self.mesh}"):
            single = copy.deepcopy(model)
            options = replace(self.options, data=None)  # inputs() gives the whole batch on every rank
            program = compiled(ModelCall.of(model, inputs), Mesh.parse(self.mesh), options)
        differences = compared(program, model, single, inputs)
        if os.environ.get("RANK", "0") == "0":
            self.show("\n".join(map(str, differences)), differences)
        return 0
