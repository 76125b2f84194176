"""A plan as plain data, which `json` writes: what it was made for, what it decides, what it costs, what is proved.

{"version": 1, "mesh": {"dp": 2, "tp": 2}, ...,
 "parameters": {"layers.*.up.weight": "f32[256@tp, 64]"},
 "operators": {"layers.*.up mm": "m@dp, n@tp -> f32[32@dp, 256@tp]"}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from shardc.analysis.conversions import Conversion
from shardc.explain.plan import Plan
from shardc.explain.plan_file.asked import hardware_json, options_json
from shardc.explain.plan_file.fingerprint import digest, fingerprint
from shardc.planning.compilation import Compilation
from shardc.planning.given.entries import entries_of, outputs_of
from shardc.planning.given.names import OPERATORS, OUTPUTS, SECTIONS, folded, pattern_of
from shardc.planning.given.posing import proof_of

FORMAT = 1
"""The version of the format. It changes when a file of the old one can no longer be read."""

DECIDED = (*SECTIONS.values(), OUTPUTS, OPERATORS)
"""The sections that hold decisions. A person may edit them."""


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data. Raises ShardcError for a plan that was unpickled, without the problem that it solves."""
    c = plan.explained().c
    data: dict[str, Any] = {
        "version": FORMAT,
        "shardc": version("shardc"),
        "torch": torch.__version__,
        "mesh": plan.mesh.sizes,
        "options": {**options_json(c.options), "randomness": c.randomness},
        "predicted": _predicted(plan),
        "notes": list(plan.notes),
        **_decided(c),
        "conversions": _conversions(plan.conversions),
        "hardware": hardware_json(c.options.device),
        "program": {**fingerprint(c.factored).as_json(), "sizes": dict(c.sizes)},
    }
    data["proof"] = _proof(plan, c, decisions_digest(data))
    return data


def written(data: Mapping[str, Any]) -> str:
    """The data as the text of a file: JSON with one entry a line, two levels deep, so that `diff` shows what moved."""

    def block(value: Any) -> str:
        if isinstance(value, dict) and value:
            lines = [f"    {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()]
            return "{\n" + ",\n".join(lines) + "\n  }"
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join([f"    {json.dumps(one)}" for one in value]) + "\n  ]"
        return json.dumps(value)

    return "{\n" + ",\n".join([f"  {json.dumps(key)}: {block(value)}" for key, value in data.items()]) + "\n}\n"


def decisions_digest(data: Mapping[str, Any]) -> str:
    """A hash of the decisions: what is proved is proved of these."""
    return digest([data.get(section, {}) for section in DECIDED], 16)


def _decided(c: Compilation) -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {section: {} for section in DECIDED}
    for (section, name), text in entries_of(c.factored, c.assignment, c.mesh).items():
        sections[section][name] = text
    sections[OUTPUTS] = outputs_of(c.factored, c.assignment, c.mesh)
    return {section: folded(entries) for section, entries in sections.items() if entries}


def _predicted(plan: Plan) -> dict[str, Any]:
    """Seconds and bytes of a rank in a step."""
    return {
        "seconds": plan.predicted,
        "compute_seconds": plan.compute,
        "conversion_seconds": sum(one.seconds for one in plan.conversions),
        "hidden_seconds": plan.hidden,
        "bytes_sent": plan.bytes_per_axis,
        "memory_bytes": plan.memory.peak,
        "memory_parts": dict(plan.memory.parts),
        "memory_phase": plan.memory.phase,
        "memory_place": plan.memory.place,
    }


def _conversions(conversions: tuple[Conversion, ...]) -> list[dict[str, Any]]:
    """Collectives and local steps; those that are alike but for the number of their layer are one, with their count
    and the sums of what they send and take."""
    groups: dict[tuple[str, ...], list[Conversion]] = {}
    for one in conversions:
        place = pattern_of(one.place.partition(",")[0].partition(":")[0])  # lines move
        groups.setdefault((one.phase, one.kind, one.axis, place), []).append(one)
    return [
        {
            "phase": phase, "kind": kind, "axis": axis, "module": place, "count": len(group),
            "bytes": sum(one.sent for one in group), "seconds": sum(one.seconds for one in group),
        }
        for (phase, kind, axis, place), group in groups.items()
    ]  # fmt: skip


def _proof(plan: Plan, c: Compilation, of: str) -> dict[str, Any]:
    """What is proved, and what it takes to pose the problem again. Multipliers are those of a bound on memory."""
    proof = proof_of(c, plan.cost, plan.lower_bound)
    multipliers = {str(position): value for position, value in proof.multipliers.items()}
    return {**asdict(proof), "folded_axes": list(proof.folded_axes), "multipliers": multipliers, "decisions": of}
