"""`shardc trace`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from shardc.commands.shows import check_folder
from shardc.commands.user_file import OnMesh

TRACE = arg(aliases=["-o"], metavar="TRACE.JSON")


@dataclass(frozen=True)
class TraceCommand(OnMesh):
    """Write the predicted timeline of a step as a trace, for ui.perfetto.dev or chrome://tracing."""

    output: Annotated[Path, TRACE]
    """Write the trace here."""

    def run(self) -> int:
        check_folder(self.output)
        self.compiled().trace(self.output)
        print(f"wrote {self.output}", file=sys.stderr)
        return 0
