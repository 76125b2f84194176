"""`shardc compile`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from shardc.commands.shows import check_folder
from shardc.commands.user_file import OnMesh
from shardc.inspect.console import show, show_code
from shardc.passes.pipeline import NAMES as PASSES

PASS = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PASS",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
    choices=PASSES,
)


@dataclass(frozen=True)
class CompileCommand(OnMesh):
    """Print the generated code, or the graph after a pass."""

    print_after: Annotated[str | None, PASS, arg(help_behavior_hint="")] = None
    """Print the graph as this pass leaves it."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="OUT.PY", help_behavior_hint="")] = None
    """Write the generated code here."""

    def run(self) -> int:
        if self.output is not None:
            check_folder(self.output)
        program = self.compiled()
        if self.print_after is not None:
            show(program.graph(self.print_after))
        if self.output is not None:
            program.save(self.output)
            print(f"wrote {self.output}", file=sys.stderr)
        elif self.print_after is None:
            show_code(program.code)
        return 0
