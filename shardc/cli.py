"""The command line: `shardc plan | explain | compile | run | trace | profile FILE --mesh dp=2,tp=2`,
`shardc diff A.json B.json`, and `shardc calibrate FILE.toml`.

FILE is a Python file with two functions: `model()` gives the module, `inputs()` its inputs, a tuple or a dict.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import subcommand

from shardc.commands.calibrate import CalibrateCommand
from shardc.commands.compile import CompileCommand
from shardc.commands.diff import DiffCommand
from shardc.commands.explain import ExplainCommand
from shardc.commands.plan import PlanCommand
from shardc.commands.profile import ProfileCommand
from shardc.commands.report import ReportCommand
from shardc.commands.run import RunCommand
from shardc.commands.trace import TraceCommand
from shardc.errors import ShardcError
from shardc.flags import parsed

Command = (
    Annotated[PlanCommand, subcommand("plan")]
    | Annotated[ExplainCommand, subcommand("explain")]
    | Annotated[ReportCommand, subcommand("report")]
    | Annotated[CompileCommand, subcommand("compile")]
    | Annotated[RunCommand, subcommand("run")]
    | Annotated[DiffCommand, subcommand("diff")]
    | Annotated[TraceCommand, subcommand("trace")]
    | Annotated[ProfileCommand, subcommand("profile")]
    | Annotated[CalibrateCommand, subcommand("calibrate")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 2 for what the user can mend."""
    try:
        command: Command = parsed(Command, arguments, "Shard PyTorch programs over a mesh of devices.")
        return command.run()
    except ShardcError as error:
        print(f"shardc: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough of it: `shardc plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
