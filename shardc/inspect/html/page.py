"""The page: one HTML file with the records, the styles, the scripts and d3 in it. It asks nothing of the network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

from shardc.explain.plan import Plan
from shardc.inspect.html.data import Asking, plan_records
from shardc.planning.compilation import Compilation

SCRIPTS = ("dom", "tree", "value", "memory", "timeline", "graph", "compare", "main")
"""In the order in which they run."""


@dataclass(frozen=True)
class Reported:
    """A plan that is shown: the compilation after every pass, the plan, and how a reader asks more of it."""

    snapshots: Mapping[str, Compilation]
    plan: Plan
    asking: Asking


def report_page(shown: Sequence[Reported]) -> str:
    """The page of a plan; of two plans, side by side."""
    model = type(shown[0].snapshots["capture"].call.model).__name__
    records = [{"name": str(one.plan.mesh), **plan_records(one.snapshots, one.plan, one.asking)} for one in shown]
    names = " and ".join(str(one.plan.mesh) or "one device" for one in shown)
    return page(f"{model} on {names}", records)


def page(title: str, plans: Sequence[Mapping[str, Any]]) -> str:
    """The page that shows the records of one or two plans."""
    parts = files("shardc.inspect.html").joinpath("page")

    def text(name: str) -> str:
        return parts.joinpath(name).read_text(encoding="utf-8")

    return Template(text("page.html")).substitute(
        title=html.escape(title),
        style=text("page.css"),
        library=text("d3.min.js"),
        script="\n".join(text(f"{name}.js") for name in SCRIPTS),
        data=in_script({"title": title, "plans": plans}),
    )


def in_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element, or begins a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
