"""Programs that were captured already, planned and lowered for one mesh."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.program import Program
from shardc.options import Options
from shardc.passes.pipeline import NAMES, PIPELINE, part, run
from shardc.planning.compilation import Compilation
from shardc.planning.constraints import ParameterDemand

_ASKS_NO_MESH = part("normalize", "factor")


def factored_program(program: Program, mesh: Mesh, model: nn.Module | None = None) -> dict[str, Compilation]:
    """What the passes leave that ask about no mesh, by their names: on any mesh the same, so compilations share it."""
    call = ModelCall(model or nn.Module(), (), {})
    snapshots: dict[str, Compilation] = {}
    run(_ASKS_NO_MESH, Compilation(call, mesh, Options(hardware="cpu"), program=program), snapshots)
    return snapshots


def compiled_program(
    program: Program, mesh: Mesh, device: Hardware, *, demands: Iterable[ParameterDemand] = (), whole: bool = True,
    mode: str = "auto", model: nn.Module | None = None, factored: dict[str, Compilation] | None = None,
) -> dict[str, Compilation]:  # fmt: skip
    """What every pass after capture leaves, by its name. `factored` is `factored_program` of the program, where it is
    known already."""
    options = Options(mode=mode, hardware=device, outputs="full" if whole else "sharded")  # type: ignore[arg-type]
    known, demanded = factored or factored_program(program, mesh, model), tuple(demands)
    snapshots = {name: replace(c, mesh=mesh, options=options, demands=demanded) for name, c in known.items()}
    run(PIPELINE[NAMES.index("factor") + 1 :], snapshots["factor"], snapshots)
    return snapshots
