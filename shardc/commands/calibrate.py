"""`shardc calibrate`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from shardc.commands.shows import Shows, check_folder
from shardc.errors import ShardcError
from shardc.inspect.progress import working
from shardc.runtime import DistributedMesh, local_mesh


@dataclass(frozen=True)
class CalibrateCommand(Shows):
    """Measure this machine, or under torchrun the cluster, and write what --hardware takes."""

    file: Annotated[Path, Positional, arg(metavar="FILE.toml", help="Where the hardware file is written.")]
    processes: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="(default: one a GPU, else 2)")] = None
    """Without torchrun: how many."""

    def run(self) -> int:
        if self.file.suffix != ".toml":
            raise ShardcError(f"{self.file}: a hardware file is called *.toml")
        check_folder(self.file)
        if self.processes is not None and self.processes < 1:
            raise ShardcError(f"--processes={self.processes} measure nothing; ask for one or more")
        return self._measure() if "RANK" in os.environ else self._start_processes()

    def _start_processes(self) -> int:
        processes = self.processes or torch.cuda.device_count() or 2
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*torchrun, "-m", "shardc.cli", "calibrate", str(self.file), *(["--json"] if self.json else [])]
        return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode

    def _measure(self) -> int:
        from shardc.cost import calibrate  # scipy takes a second to import

        mesh = local_mesh(calibrate.layout_of_processes())
        assert isinstance(mesh, DistributedMesh)
        with working("measuring"):
            measured = calibrate.calibrate(mesh, self.file.stem)
        if mesh.rank == 0:
            self.file.write_text(calibrate.toml(measured))
            self.show(calibrate.report(measured), measured.device)
            self.say(f"wrote {self.file}")
        return 0
