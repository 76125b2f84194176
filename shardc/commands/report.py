"""`shardc report`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from shardc.commands.shows import check_folder
from shardc.commands.user_file import OnMesh, compile_file
from shardc.flags import spelled
from shardc.inspect.html.data import Asking
from shardc.inspect.html.page import report_page
from shardc.inspect.progress import working
from shardc.ir.named_files import write_file
from shardc.ir.printing import in_bytes
from shardc.options import Options


@dataclass(frozen=True)
class ReportCommand(OnMesh):
    """Write the plan as one HTML page: modules, layouts, memory, timeline, graphs, and answers to why."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT.HTML")] = Path("report.html")
    """Where the page is written."""
    against: Annotated[str | None, arg(metavar="AXIS=SIZE,...", help_behavior_hint="(like dp=8)")] = None
    """A second mesh: the page shows both plans, side by side."""

    def run(self) -> int:
        check_folder(self.output)
        meshes = [self.mesh] if self.against is None else [self.mesh, self.against]
        programs = [(mesh, compile_file(self.file, mesh, self.options)) for mesh in meshes]
        with working("writing the report"):
            page = report_page([program.reported(self._asking(mesh)) for mesh, program in programs])
        write_file(self.output, page)
        print(f"wrote {self.output} ({in_bytes(len(page))})")
        return 0

    def _asking(self, mesh: str) -> Asking:
        """The command that asks a plan of this file more."""
        flags = spelled(self.options, Options)
        return Asking(shlex.join(["shardc", "explain", str(self.file), f"--mesh={mesh}", *flags]), shell=True)
