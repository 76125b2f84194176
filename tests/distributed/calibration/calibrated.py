"""Measures this machine into the hardware file that is named, and compares what it predicts with what is measured."""

import sys
from pathlib import Path

import torch

from shardc.cost import calibrate as calibration
from shardc.cost.calibrate import _Benchmark, calibrate, layout_of_processes, toml
from shardc.cost.hardware import hardware
from shardc.ir.mesh import Mesh
from shardc.runtime import DistributedMesh, all_reduce, local_mesh

mesh = local_mesh(layout_of_processes())
assert isinstance(mesh, DistributedMesh)
path = Path(sys.argv[1])
# a factor of two is asked of it, not what plans are compared by; the command line measures as users do
calibration.BLOCKS, calibration.BLOCK, calibration.COMPUTING = 3, 0.02, 0.05
calibration.DTYPES = calibration.DTYPES[:1]


def predicted_over_measured() -> float:
    """Of an all-reduce of a size that was not among those measured; the same on all ranks."""
    size, seconds = _Benchmark(mesh).point(all_reduce, "local", 600_000)
    ratio = measured.device.collective_seconds(all_reduce, size, Mesh.parse("local=2"), "local") / seconds
    return float(all_reduce(torch.tensor(ratio), axis="local")) / mesh.size


for _ in range(4):  # other work on the machine may disturb what is measured first and vanish before what is compared
    measured = calibrate(mesh, "mine")
    ratios = [mesh.run(predicted_over_measured, lambda _: ())[0] for _ in range(5)]
    if any(0.5 < ratio < 2 for ratio in ratios):
        break
if mesh.rank == 0:
    path.write_text(toml(measured))
    print(path.read_text())
    loaded = hardware(path)
    assert loaded.name == path.stem and loaded.devices_per_node == 2
    assert 0 <= loaded.inside.overlap == round(measured.device.inside.overlap, 2) <= 1
    assert 0 <= loaded.inside.stall == float(f"{measured.device.inside.stall:.4g}")
    for kind in loaded.algorithms:
        for size in (1e3, 1e6):
            mesh_of_two = Mesh.parse("tp=2")
            one, other = (d.collective_seconds(kind, size, mesh_of_two, "tp") for d in (loaded, measured.device))
            assert abs(one / other - 1) < 1e-2
    print("ratios", *sorted(ratios))

calibration.SIZES, calibration.BLOCKS, calibration.BLOCK, calibration.COMPUTING = calibration.SIZES[:2], 1, 0.005, 0.02
apart = calibrate(local_mesh({"node": 2, "local": 1}), "apart")
assert [*apart.fits] == ["between"]
assert 0 <= apart.device.inside.overlap == apart.device.between.overlap <= 1
