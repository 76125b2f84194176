"""What differs between two plans: what they are for, what moved, what is sent, and what that costs.

parameters   layers.*.up.weight    f32[256@tp, 64]    ->    f32[256, 64]           x32
forward      all_reduce over tp    layers.*.down            gone                   x32     4.0 MiB less    1.20 ms less
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardc.explain.plan_file.as_json import DECIDED
from shardc.ir.printing import in_bytes, in_seconds
from shardc.ir.report import Columns, Report, Section
from shardc.planning.given.entries import ARROW, END
from shardc.planning.given.names import OPERATORS, pattern_of

ABSENT = "-"
_COUNT = re.compile(r" x(\d+)$")


@dataclass(frozen=True)
class PlanDiff:
    """The differences from the plan `before` to the plan `after`, both as plain data. `print(diff)` shows them."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.report())

    @property
    def moved(self) -> tuple[tuple[str, str, str, str, int], ...]:
        """Section, name, what each plan says, and for how many: of repeated layers one entry."""
        return tuple(entry for section in DECIDED for entry in self._moved(section))

    def report(self) -> Report:
        """What `print(diff)` shows, in sections."""
        inputs = [
            (section, name, one, "->", other, f"x{count}" if count > 1 else "")
            for section, name, one, other, count in self.moved
            if section != OPERATORS
        ]
        operators = [
            (name, *_told(one, other), f"x{count}" if count > 1 else "")
            for section, name, one, other, count in self.moved
            if section == OPERATORS
        ]
        tables = {
            "made for": Columns(list(self._asked()), "<<<<"),
            "a step, per rank": Columns(list(self._costs()), "<><>>"),
            "tensors that moved": Columns(inputs, "<<<<<<"),
            "operators that run otherwise": Columns(operators, "<<<<<"),
            "what is sent or sliced otherwise": Columns(list(self._conversions()), "<<<<>>>"),
        }
        shown = [Section(title, table) for title, table in tables.items() if table.rows]
        same = (
            [] if any(table.rows for title, table in tables.items() if title != "a step, per rank") else ["no change"]
        )
        return Report([*same, self._head()], shown)

    def _head(self) -> str:
        one, other = (plan["predicted"]["seconds"] for plan in (self.before, self.after))
        share = f" ({other / one - 1.0:+.1%})" if one else ""
        return f"predicted  {in_seconds(one)} -> {in_seconds(other)} a step{share}"

    def _asked(self) -> Iterator[tuple[str, str, str, str]]:
        one, other = self.before, self.after
        yield from _rows("", {"mesh": _axes(one["mesh"])}, {"mesh": _axes(other["mesh"])})
        yield from _rows("", {"hardware": one["hardware"]["name"]}, {"hardware": other["hardware"]["name"]})
        yield from _rows("option ", one["options"], other["options"])
        yield from _rows("", {"shardc": one["shardc"]}, {"shardc": other["shardc"]})
        if one["program"]["fingerprint"] != other["program"]["fingerprint"]:
            yield "the program", "differs", "", ""

    def _costs(self) -> Iterator[tuple[str, str, str, str, str]]:
        one, other = self.before["predicted"], self.after["predicted"]
        names = {"compute_seconds": "compute", "conversion_seconds": "conversions", "hidden_seconds": "of which hidden"}
        for key, name in names.items():
            yield from _amounts(name, one[key], other[key], in_seconds)
        axes = dict.fromkeys([*one["bytes_sent"], *other["bytes_sent"]])
        for axis in axes:
            sent, now = (plan["bytes_sent"].get(axis, 0.0) for plan in (one, other))
            yield from _amounts(f"sent over {axis}", sent, now, in_bytes)
        yield from _amounts("memory, the most", one["memory_bytes"], other["memory_bytes"], in_bytes)

    def _moved(self, section: str) -> Iterator[tuple[str, str, str, str, int]]:
        one, other = self.before.get(section, {}), self.after.get(section, {})
        counts = {**_counts(section, self.before), **_counts(section, self.after)}
        named: dict[str, dict[str, None]] = {}
        for name in (*one, *other):
            named.setdefault(pattern_of(name), {}).update({name: None} if "*" not in name else {})
        for pattern, names in named.items():
            alike: dict[tuple[str, str], list[str]] = {}
            rest = counts.get(pattern, 1) - len(names)  # those for which both plans have nothing but the pattern
            for name in [*names, *([pattern] * rest if "*" in pattern else [])]:
                told, now = (plan.get(name, plan.get(pattern)) or ABSENT for plan in (one, other))
                if told != now:
                    alike.setdefault((told, now), []).append(name)
            for (told, now), group in alike.items():
                yield section, group[0] if len(group) == 1 else pattern, told, now, len(group)

    def _conversions(self) -> Iterator[tuple[str, str, str, str, str, str, str]]:
        sides = [
            {(one["phase"], one["kind"], one["axis"], one["module"]): one for one in plan["conversions"]}
            for plan in (self.before, self.after)
        ]
        nothing = {"count": 0, "bytes": 0.0, "seconds": 0.0}
        for key in dict.fromkeys([*sides[0], *sides[1]]):
            before, after = (side.get(key, nothing) for side in sides)
            if (before["count"], before["bytes"]) != (after["count"], after["bytes"]):
                what = "new" if not before["count"] else "gone" if not after["count"] else ""
                phase, kind, axis, module = key
                yield (
                    what, phase, f"{kind} over {axis}", module, f"x{before['count']} -> x{after['count']}",
                    _signed(after["bytes"] - before["bytes"], in_bytes),
                    _signed(after["seconds"] - before["seconds"], in_seconds),
                )  # fmt: skip


def _told(one: str, other: str) -> tuple[str, str, str]:
    """Two entries of an operator: their strategies, and what is shared and kept; the layouts made follow from them."""

    def short(text: str) -> str:
        head, *clauses = text.split(END)
        return END.join([head.partition(ARROW)[0], *clauses])

    return (one, "->", other) if short(one) == short(other) else (short(one), "->", short(other))


def _rows(
    prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, str]]:  # fmt: skip
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name), after.get(name)
        if one != other:
            yield f"{prefix}{name}", _plain(one), "->", _plain(other)


def _plain(value: Any) -> str:
    return "not said" if value is None or value == {} else str(value)


def _axes(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def _amounts(
    name: str, before: float, after: float, text: Callable[[float], str]
) -> Iterator[tuple[str, str, str, str, str]]:
    if text(before) != text(after):
        yield name, text(before), "->", text(after), _signed(after - before, text)


def _signed(amount: float, text: Callable[[float], str]) -> str:
    if not amount:
        return ""
    return ("-" if amount < 0 else "+") + text(abs(amount))


def _counts(section: str, plan: Mapping[str, Any]) -> dict[str, int]:
    """How many entries of a section have a pattern."""
    program, counts = plan["program"], dict[str, int]()
    entries = program["operators"] if section == OPERATORS else {
        key.removeprefix(f"{section} "): text for key, text in program["given"].items() if key.startswith(f"{section} ")
    }  # fmt: skip
    for name, text in (program["returned"] if section == "outputs" else entries).items():
        found = _COUNT.search(text)
        pattern = pattern_of(name)
        counts[pattern] = counts.get(pattern, 0) + (int(found[1]) if found else 1)
    return counts
