"""Measures four processes as two nodes of two: links inside, between, and along an axis that spans both."""

import sys
from pathlib import Path

from shardc.cost import calibrate as calibration
from shardc.cost.calibrate import calibrate, report, toml
from shardc.cost.collectives import ALGORITHMS
from shardc.cost.hardware import hardware
from shardc.ir.mesh import Mesh
from shardc.runtime import DistributedMesh, local_mesh

mesh = local_mesh({"node": 2, "local": 2})
assert isinstance(mesh, DistributedMesh)
calibration.SIZES, calibration.DTYPES = calibration.SIZES[:2], calibration.DTYPES[:1]
calibration.BLOCKS, calibration.BLOCK, calibration.COMPUTING = 1, 0.005, 0.02
measured = calibrate(mesh, "apart")
assert [*measured.fits] == ["inside", "between", "spanning"]
assert all([one.collective for one in fits] == [*ALGORITHMS] for fits in measured.fits.values())
if mesh.rank == 0:
    path = Path(sys.argv[1])
    path.write_text(toml(measured))
    print(path.read_text(), report(measured), sep="\n")
    loaded = hardware(path)
    for kind in ALGORITHMS:
        own, apart = loaded.between.of(kind, alone=True), loaded.between.of(kind)
        assert own == loaded.between.spanning[kind] != apart == loaded.between.measured[kind]
        assert loaded.collective_seconds(kind, 1e6, Mesh.parse("all=4"), "all") > loaded.launch
