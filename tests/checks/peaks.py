"""What ranks of a virtual mesh hold at most while they run one operator under a strategy."""

from __future__ import annotations

from torch import Tensor

from checks.brute_force import Call, scatter
from checks.meter import Meter
from shardc.ir.mesh import Mesh
from shardc.rules.factors.strategy import Strategy
from shardc.runtime import VirtualMesh, load


def peaks(call: Call, strategy: Strategy, mesh: Mesh) -> list[int]:
    """Bytes that every rank holds at most, its operands included, without what is inside kernels of torch."""
    source, bases, _ = call.lower([strategy], mesh)
    machine = VirtualMesh(dict(mesh.axes))
    parts = [scatter(tensor, layout, mesh, machine) for tensor, layout in bases]
    module = load(source)

    def run(*given: Tensor) -> int:
        meter = Meter()
        meter.show(given)
        with meter:
            made = module.forward(*given)
        assert made is not None
        return meter.peak

    return machine.run(run, lambda rank: tuple(p[rank] for p in parts), random=True)
