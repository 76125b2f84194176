"""Questions that are asked of the plan beforehand, since a page cannot compile: why, and what another layout costs.

A search for another plan takes as long as the first one. So few are made in a large model, and the page has the command
for the others. Repeated layers are asked about once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from shardc.errors import ShardcError
from shardc.explain.explanations import Explainer, Why
from shardc.explain.plan import Placed, Plan

MOST_NODES = 20_000
"""Nodes of the program times searches for other plans, at most."""

MOST_SECONDS = 5.0
"""CPU-seconds of searches after which none begins."""

MOST_SEARCHES = 24
DEAREST = 12
"""Values that are asked about because their conversions take longest, beside all parameters."""

MOST_LAYOUTS = 24
"""Alternative layouts of one value that are listed."""


def pattern(name: str) -> str:
    """The name of a value in all repeated layers: `layers.*.up.weight`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def answers(plan: Plan, tensors: Sequence[Placed], nodes: int) -> list[dict[str, Any]]:
    """What the plan answers about parameters, inputs and the dearest conversions, in a program of `nodes` nodes. Where
    no other plan was searched, `extra` has no cost of the best of them."""
    explainer = plan.explainer
    if explainer is None:
        return []
    asked: list[tuple[Why, tuple[str, ...]]] = []
    for name in _names(plan, tensors):
        with suppress(ShardcError):  # an output that is an input; nobody makes it
            asked.append((explainer.why(name, compare=False), explainer.alternatives(name)))
    searches = min(MOST_SEARCHES, MOST_NODES // max(nodes, 1))
    dearest = sorted(asked, key=lambda one: -_conversions(one[0]))
    compared = {why.value for why, _ in [one for one in dearest if one[1]][:searches]}
    until, answered = time.process_time() + MOST_SECONDS, dict[str, dict[str, Any]]()
    for why, others in dearest:
        compare = why.value in compared and time.process_time() < until
        answered[why.value] = _answer(explainer, why, others, compare)
    made = [answered[why.value] for why, _ in asked]
    _price(explainer, [one for one in made if one["value"] in compared], searches - len(compared), until)
    return made


def _conversions(why: Why) -> float:
    """Seconds of the conversions of a value."""
    return sum(step.seconds for step in (*why.shared, *(step for reader in why.readers for step in reader.steps)))


def _names(plan: Plan, tensors: Sequence[Placed]) -> Iterable[str]:
    """One value of each repeated layer and layout."""
    found: dict[tuple[str, str], str] = {}
    for one in tensors:
        if one.role != "output":
            found.setdefault((pattern(one.name), f"{one.dtype}{one.layout}"), one.name)
    dearest: dict[str, str] = {}
    for conversion in sorted(plan.conversions, key=lambda one: -one.seconds):
        value = conversion.value.partition(" and ")[0]
        dearest.setdefault(f"{re.sub(r'_[0-9]+$', '', value)} {pattern(conversion.place)}", value)
    return dict.fromkeys([*found.values(), *list(dearest.values())[:DEAREST]])


def _answer(explainer: Explainer, why: Why, others: Sequence[str], compare: bool) -> dict[str, Any]:
    why = explainer.why(why.value) if compare else why
    layouts = dict.fromkeys(others[:MOST_LAYOUTS], "")
    if why.runner_up is not None and not why.runner_up.conflict:
        layouts[why.runner_up.layout] = why.runner_up.summary
    known = compare or not others
    lines = [line for line in str(why).splitlines() if known or not line.startswith("  next best")]
    return {"value": why.value, "pattern": pattern(why.value), "layout": why.layout, "why": lines, "instead": layouts}


def _price(explainer: Explainer, made: Sequence[dict[str, Any]], searches: int, until: float) -> None:
    """Spend the searches that are left, and the CPU-seconds, on alternatives, value after value, dearest first."""
    for one in made:
        for layout in [layout for layout, cost in one["instead"].items() if not cost][: max(searches, 0)]:
            if time.process_time() >= until:
                return
            searches -= 1
            try:
                other = explainer.why_not(one["value"], layout)
            except ShardcError:
                continue
            one["instead"][layout] = f"impossible: {other.conflict}" if other.conflict else other.summary
