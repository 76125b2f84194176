"""`shardc explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from shardc.commands.shows import Shows
from shardc.commands.user_file import OnMesh
from shardc.errors import ShardcError


@dataclass(frozen=True)
class ExplainCommand(OnMesh, Shows):
    """Tell which demands conflict, or why a value has its layout."""

    why: Annotated[str | None, arg(metavar="VALUE", help_behavior_hint="(without it: conflicts)")] = None
    """A parameter, a module (its output), input:0, or a printed name."""
    layout: Annotated[str | None, arg(metavar="LAYOUT", help_behavior_hint="(like 'f32[256@tp, 64]' or 'tp,-')")] = None
    """The layout to compare with."""

    def run(self) -> int:
        if self.layout is not None and self.why is None:
            raise ShardcError("--layout says how a value should lie; name the value with --why")
        plan = self.compiled().plan
        if self.why is None:
            conflicts = plan.conflicts()
            text = "\n\n".join(map(str, conflicts)) or "what was demanded needs no split dim gathered or moved"
            self.show(text, conflicts)
        else:
            answer = plan.why(self.why) if self.layout is None else plan.why_not(self.why, self.layout)
            self.show(str(answer), answer)
        return 0
