"""Totals over all operators, and the page that tells them beside DTensor's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from opinfo.judge import PHASES, Record, Run, Verdict

DTENSOR = {
    "forward": {"applicable": 643, "split layouts": 585, "split": 452, "only whole": 75, "failing": 58,
                "clean": 539, "wrong": 8},
    "backward": {"applicable": 489, "split layouts": 442, "split": 331, "only whole": 75, "failing": 36,
                 "clean": 419, "wrong": 10},
}  # fmt: skip
"""torch 2.13's DTensor on the same entries, samples and layouts, on four simulated ranks."""

DTENSOR_CLEAN = 479
"""Operators that DTensor runs clean, forward and backward."""

ROWS = {
    "applicable": "operators with an operand to split",
    "split layouts": "of these given a split operand",
    "split": "right, with the computation really split",
    "only whole": "right only by gathering first",
    "failing": "not right in any split layout",
    "clean": "right in all layouts",
    "wrong": "some wrong value",
}


BEST_FIRST = {"clean": 0, "refused": 1, "wrong": 2, "split": 0, "-": 0, "whole": 1}
"""The words of `status`, each with its rank among those that may stand in its place."""


@dataclass
class Phase:
    """One operator's runs in one phase, those that there was something to compare for."""

    runs: list[tuple[Run, Verdict]]

    @cached_property
    def laid_out(self) -> list[tuple[Run, Verdict]]:
        """The runs whose operands do not all enter whole."""
        return [(run, v) for run, v in self.runs if run.layout != "R"]

    @property
    def applicable(self) -> bool:
        return bool(self.laid_out)

    @cached_property
    def split_layouts(self) -> list[Verdict]:
        return [v for run, v in self.laid_out if run.layout.startswith("S")]

    @property
    def split(self) -> bool:
        return any(v.status == "ok" and v.part in ("some", "full") for v in self.split_layouts)

    @property
    def right_somewhere(self) -> bool:
        return any(v.status == "ok" for v in self.split_layouts)

    @property
    def wrong(self) -> bool:
        return any(v.status == "wrong" for _, v in self.runs)

    @property
    def clean(self) -> bool:
        return all(v.status == "ok" for _, v in self.laid_out) and not self.wrong


def phase(record: Record, name: str) -> Phase:
    """The runs of one phase: `forward` or `backward`."""
    pairs = [(run, run.forward if name == "forward" else run.backward) for run in record.runs]
    return Phase([(run, verdict) for run, verdict in pairs if verdict.status != "skip"])


def clean(record: Record) -> bool:
    """Right, forward and backward, in every layout."""
    forward, backward = (phase(record, name) for name in PHASES)
    return forward.applicable and forward.clean and (not backward.applicable or backward.clean)


def status(record: Record) -> dict[str, str]:
    """Per phase: `clean` or `refused` or `wrong`, and `split`, `whole` or `-` (no operand enters split)."""
    found: dict[str, str] = {}
    for name in PHASES:
        part = phase(record, name)
        if part.applicable:
            state = "wrong" if part.wrong else "clean" if part.clean else "refused"
            work = "split" if part.split else "whole" if part.split_layouts else "-"
            found[name] = f"{state} {work}"
    return found


class Summary:
    """The totals of many records."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)

    def counts(self, name: str) -> dict[str, int]:
        parts = [part for record in self.records if (part := phase(record, name)).applicable]
        given = [part for part in parts if part.split_layouts]
        split = sum(part.split for part in given)
        right = sum(part.right_somewhere for part in given)
        return {
            "applicable": len(parts),
            "split layouts": len(given),
            "split": split,
            "only whole": right - split,
            "failing": len(given) - right,
            "clean": sum(part.clean for part in parts),
            "wrong": sum(part.wrong for part in parts),
        }

    @property
    def clean(self) -> int:
        return sum(map(clean, self.records))

    def totals(self) -> str:
        """The table of totals, in Markdown."""
        mine = {name: self.counts(name) for name in PHASES}
        lines = ["| | shardc forward | backward | DTensor forward | backward |", "| --- | --- | --- | --- | --- |"]
        for key, text in ROWS.items():
            cells = [str(table[name][key]) for table in (mine, DTENSOR) for name in PHASES]
            lines.append(f"| {text} | {' | '.join(cells)} |")
        lines.append(f"| right forward and backward in all layouts | {self.clean} | | {DTENSOR_CLEAN} | |")
        return "\n".join(lines)

    def unrun(self) -> Iterator[str]:
        for record in self.records:
            if record.status != "ok":
                yield f"`{record.name}` ({record.status})"


def page(summary: Summary) -> str:
    """The whole page, in Markdown."""
    runs = Counter(v.status for r in summary.records for name in PHASES for _, v in phase(r, name).runs)
    return f"""# Operators

Every entry of PyTorch's operator database that takes float32, on a mesh of four, each with its operands entering whole,
split along their first dim, split along their second, and partial (all operands so, or the first alone), forward and
backward. Made by `make opinfo`; values are compared with a single device's. The operators are planned for a device so
slow that computing on a part always pays, so what could be split is split, small as the samples are. DTensor was run on
the same samples and layouts.

{summary.totals()}

In all {sum(runs.values())} runs: {", ".join(f"{count} {name}" for name, count in runs.most_common())}.

## Not right in every layout

{_listed(summary, lambda part: not part.clean, _reason)}

## Right, but never split

{_listed(summary, lambda part: bool(part.split_layouts) and part.right_somewhere and not part.split, _steps)}

## Not run

Entries for which torch makes no sample call that runs here, or which did not end in time:
{", ".join(summary.unrun()) or "none"}.
"""


def _listed(summary: Summary, belongs: Callable[[Phase], bool], tell: Callable[[Phase], str]) -> str:
    lines = ["| operator | phase | |", "| --- | --- | --- |"]
    for record in summary.records:
        for name in PHASES:
            part = phase(record, name)
            if part.applicable and belongs(part):
                lines.append(f"| `{record.name}` | {name} | {tell(part)} |")
    return "\n".join(lines)


def _reason(part: Phase) -> str:
    """The first failure, in one cell."""
    bad = [(run, v) for run, v in part.runs if v.status != "ok"]
    run, verdict = next(((r, v) for r, v in bad if v.status == "wrong"), bad[0])
    why = " ".join(verdict.why.split()).replace("|", "/")
    why = re.sub(r"the model, [^ ]*: | \([^ ]*:\d+\)|: write this part of the model.*", "", why)
    return f"{verdict.status} in {run.layout} (and {len(bad) - 1} more of {len(part.runs)}): {why[:160]}"


def _steps(part: Phase) -> str:
    steps = next((v.steps for v in part.split_layouts if v.steps), [])
    return ", ".join(f"`{step}`" for step in steps[:4]).replace("|", "/")
