"""Programs that were captured already, planned and lowered for one mesh."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.ir.program import Program
from shardc.options import Options
from shardc.passes.pipeline import PIPELINE, run
from shardc.planning.compilation import Compilation
from shardc.planning.constraints import ParameterDemand


def compiled_program(
    program: Program, mesh: Mesh, device: Hardware, *, demands: Iterable[ParameterDemand] = (), whole: bool = True,
    mode: str = "auto", model: nn.Module | None = None,
) -> dict[str, Compilation]:  # fmt: skip
    """What every pass after capture leaves, by its name."""
    options = Options(mode=mode, hardware=device, outputs="full" if whole else "sharded")  # type: ignore[arg-type]
    call = ModelCall(model or nn.Module(), (), {})
    snapshots: dict[str, Compilation] = {}
    run(PIPELINE[1:], Compilation(call, mesh, options, program=program, demands=tuple(demands)), snapshots)
    return snapshots
